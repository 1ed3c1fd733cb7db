"""Writes figures as one HTML page without outside references, or as PNG files."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeinf.report.analysis import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0; }
.facts { color: #444; margin: 0 0 1rem; overflow-wrap: anywhere; }
.grid { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; } figcaption { color: #444; font-size: .9rem; }
img { width: 100%; height: auto; display: block; }
.table { overflow-x: auto; margin-bottom: 1.5rem; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
"""  # noqa: E501


def write_report(path: str | Path, analyses: Sequence[Analysis]) -> None:
    """One self-contained file: no scripts, fonts or images from elsewhere."""
    sections = "".join(_section(analysis) for analysis in analyses)
    Path(path).write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Routing report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Routing report</h1>\n{sections}</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def write_pngs(folder: str | Path, analyses: Sequence[Analysis]) -> list[Path]:
    """One PNG per trace and figure; returns what was written."""
    from moeinf.report.figures import FIGURES

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, analysis in enumerate(analyses):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", analysis.trace.name.removesuffix(".safetensors"))
        for title, _, draw in FIGURES:
            name = re.sub(r"[^a-z]+", "-", title.lower())
            path = folder / f"{number + 1}-{stem}-{name}.png"
            path.write_bytes(_render(draw(analysis), "png"))
            written.append(path)
    return written


def _section(analysis: Analysis) -> str:
    from moeinf.report.figures import FIGURES

    info = analysis.trace.info()
    facts = (
        f"{info['model'] or 'unknown model'}: {info['num_layers']} layers of "
        f"{info['num_experts']} experts, top {info['top_k']}; {info['prefill_tokens']:,} prompt "
        f"and {info['decode_tokens']:,} decode tokens; sequences: {info['sequences']:,}; "
        f"{info['experts_used']:,} of {analysis.trace.total_experts:,} experts used."
    )
    if info["source"]:
        facts += f" Source: {info['source']}."
    figures = "".join(
        f'<figure><h3>{html.escape(title)}</h3><img alt="{html.escape(title)}" '
        f'src="data:image/svg+xml;base64,'
        f'{base64.b64encode(_render(draw(analysis), "svg")).decode("ascii")}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
        for title, caption, draw in FIGURES
    )
    return (
        f"<section>\n<h2>{html.escape(analysis.trace.name)}</h2>\n"
        f'<p class="facts">{html.escape(facts)}</p>\n'
        f"<h3>Decode hit rate in percent</h3>\n{_table(analysis)}"
        f'<div class="grid">\n{figures}</div>\n</section>\n'
    )


def _table(analysis: Analysis) -> str:
    from moeinf.report.figures import rate_of

    head = "".join(f"<th>{share}%</th>" for share in analysis.shares)
    rows = "".join(
        f"<tr><td>{html.escape(policy)}</td>"
        + "".join(f"<td>{100 * rate_of(result):.1f}</td>" for result in results)
        + "</tr>\n"
        for policy, results in analysis.results.items()
    )
    return (
        '<div class="table"><table>\n<thead><tr><th>slots</th>'
        f"{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )


def _render(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date the same trace gives the same file.
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
