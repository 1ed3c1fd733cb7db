"""Writes figures as one HTML page without outside references, or as PNG files."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeinf.output_files import replacing
from moeinf.report.analysis import Analysis
from moeinf.report.findings import OPTIMUM, rate_of

if TYPE_CHECKING:
    from moeinf.report.figures import Picture

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --faint: #555; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e6e6e6; --faint: #a8a8a8; --line: #3a3d42; }
}
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 84rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0; } a { color: inherit; overflow-wrap: anywhere; }
.facts { color: var(--faint); margin: 0 0 1rem; overflow-wrap: anywhere; }
.grid { display: grid; gap: 2rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; } .subject { color: var(--faint); font-size: .9rem; margin: 0; }
figcaption { color: var(--faint); font-size: .9rem; }
img { width: 100%; height: auto; display: block; margin: .5rem 0; }
.table { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
.top { font-weight: 700; }
th:first-child { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 30rem) { table { font-size: .78rem; } th, td { padding: .25rem .22rem; } }
"""  # noqa: E501


def write_report(path: str | Path, analyses: Sequence[Analysis]) -> None:
    """One self-contained file: no scripts, fonts or images from elsewhere."""
    names = [html.escape(analysis.trace.name) for analysis in analyses]
    contents = ""
    if len(names) > 1:
        items = (f'<li><a href="#trace-{i}">{name}</a></li>' for i, name in enumerate(names, 1))
        contents = f"<ul>{''.join(items)}</ul>\n"
    sections = "".join(_section(i, analysis) for i, analysis in enumerate(analyses, 1))
    with replacing(path) as part:
        part.write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>Routing of {', '.join(names)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>How experts are used, and what a cache of them finds</h1>\n"
            f"{contents}{sections}</main>\n</body>\n</html>\n",
            encoding="utf-8",
        )


def write_pngs(folder: str | Path, analyses: Sequence[Analysis]) -> list[Path]:
    """One PNG per trace and figure; returns what was written."""
    from moeinf.report.figures import PICTURES

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, analysis in enumerate(analyses):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", analysis.trace.name.removesuffix(".safetensors"))
        for picture in PICTURES:
            name = re.sub(r"[^a-z]+", "-", picture.title.lower())
            path = folder / f"{number + 1}-{stem}-{name}.png"
            with replacing(path) as part:
                part.write_bytes(picture.render(analysis, "png"))
            written.append(path)
    return written


def _section(number: int, analysis: Analysis) -> str:
    from moeinf.report.figures import PICTURES

    info = analysis.trace.info()
    facts = (
        f"{info['model'] or 'unknown model'}: {info['num_layers']} layers of "
        f"{info['num_experts']} experts, top {info['top_k']}; {info['prefill_tokens']:,} prompt "
        f"and {info['decode_tokens']:,} decode tokens; sequences: {info['sequences']:,}; "
        f"{info['experts_used']:,} of {analysis.trace.total_experts:,} experts used."
    )
    if info["source"]:
        facts += f" Source: {info['source']}."
    figures = "".join(_figure(picture, analysis) for picture in PICTURES)
    return (
        f'<section>\n<h2 id="trace-{number}">{html.escape(analysis.trace.name)}</h2>\n'
        f'<p class="facts">{html.escape(facts)}</p>\n'
        f"<h3>Decode hit rate in percent, by share of experts in slots</h3>\n{_table(analysis)}"
        f'<div class="grid">\n{figures}</div>\n</section>\n'
    )


def _figure(picture: Picture, analysis: Analysis) -> str:
    """A finding, the picture in two colour schemes, and how to read it."""
    light, dark = (
        "data:image/svg+xml;base64,"
        + base64.b64encode(picture.render(analysis, "svg", dark=is_dark)).decode("ascii")
        for is_dark in (False, True)
    )
    title, finding, caption = map(
        html.escape, (picture.title, picture.finding(analysis), picture.caption)
    )
    return (
        f'<figure><p class="subject">{title}</p><h3>{finding}</h3><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{title}: {finding}" src="{light}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _table(analysis: Analysis) -> str:
    """One row per budget, because a phone is narrow. The best online policy is bold."""
    online = [policy for policy in analysis.results if policy != OPTIMUM]
    head = "".join(f"<th>{html.escape(policy)}</th>" for policy in analysis.results)
    rows = ""
    for i, share in enumerate(analysis.shares):
        rates = {policy: rate_of(results[i]) for policy, results in analysis.results.items()}
        top = max((f"{100 * rates[policy]:.1f}" for policy in online), key=float, default="")
        cells = ""
        for policy, rate in rates.items():
            text = f"{100 * rate:.1f}"
            mark = ' class="top"' if policy in online and text == top else ""
            cells += f"<td{mark}>{text}</td>"
        rows += f"<tr><th>{share}%</th>{cells}</tr>\n"
    return (
        '<div class="table"><table>\n<thead><tr><th>slots</th>'
        f"{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )
