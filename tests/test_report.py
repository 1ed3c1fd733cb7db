"""The report and the command line over traces."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_traces import random_trace

import moeinf
from moeinf.cli import main
from moeinf.report import findings
from moeinf.report.analysis import (
    adjacent_overlap,
    analyse,
    predictor_quality,
    reuse_distances,
)
from moeinf.traces.trace import Trace


@pytest.fixture
def trace_file(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "a <b> & c.safetensors"
    random_trace(seed).save(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["moeinf", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    if caught.value.code not in (0, None):
        raise RuntimeError(str(caught.value.code))


def test_simulate_prints_the_documented_json(
    trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        monkeypatch, "simulate", trace_file, "--policy", "lru,learned", "--slots", "10%,7", "--json"
    )
    found = json.loads(capsys.readouterr().out)
    assert [(r["policy"], r["slots"]) for r in found] == [
        ("lru", 6), ("lru", 7), ("learned", 6), ("learned", 7),
    ]  # fmt: skip
    expected = moeinf.simulate(trace_file, policy="learned", slots=7).as_dict()
    assert found[-1] == expected
    assert {"trace", "hit_rate_decode", "hit_rate_all", "hits", "accesses"} <= set(expected)


def test_simulate_draws_a_plot_and_starts_eam_from_a_collection(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moeinf.EAMC.from_traces([random_trace(1)]).save(tmp_path / "c.safetensors")
    run(
        monkeypatch, "simulate", trace_file, "--eamc", tmp_path / "c.safetensors",
        "--plot", tmp_path / "p.png",
    )  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nonsense"], "no policy is named 'nonsense'"),
        (["--slots", "0"], "slots: expected 1 to"),
        (["--slots", ","], "--slots: expected at least one"),
    ],
)
def test_simulate_says_in_one_line_what_is_wrong(
    arguments: list[str], message: str, trace_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(monkeypatch, "simulate", trace_file, *arguments)


def test_a_report_is_one_file_that_needs_nothing_else(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "r.html"
    run(monkeypatch, "report", trace_file, "-o", page, "--png", tmp_path / "png")
    text = page.read_text()
    assert "a &lt;b&gt; &amp; c.safetensors" in text and "<b>" not in text
    assert 'name="viewport"' in text and "<script" not in text
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert len(sources) == 14, "seven pictures, for light and for dark pages"
    for source in sources:
        assert source.startswith("data:image/svg+xml;base64,")
        assert b"<svg" in base64.b64decode(source.partition(",")[2])
    assert len(list((tmp_path / "png").glob("*.png"))) == 7


def test_a_missing_matplotlib_is_named(trace_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.axes'] = None\n"
        "from moeinf.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(trace_file), "-o", str(tmp_path / "r.html")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install 'moeinf[report]'" in done.stderr and "Traceback" not in done.stderr


def hand_made() -> Trace:
    routes = [[[0, 1]], [[1, 2]], [[0, -1]], [[0, 3]]]
    return Trace.from_arrays(routes, num_experts=4, sequence=[0, 0, 0, 1])


def test_reuse_overlap_and_prediction_are_what_they_say() -> None:
    trace = hand_made()
    assert sorted(reuse_distances(trace).tolist()) == [1, 1, 2]
    # Token 1 shares one of two with token 0, token 2 none of its one; token 3 starts anew.
    np.testing.assert_allclose(adjacent_overlap(trace), [1 / 3])
    recall, precision = predictor_quality(trace)["previous"]
    assert recall == pytest.approx(2 / 7) and precision == pytest.approx(2 / 5)


def test_every_picture_says_what_it_shows() -> None:
    analysis = analyse(hand_made(), policies=("lru", "learned", "belady"), shares=(50,))
    belady, learned = (
        f"{analysis.results[name][0].hit_rate_decode:.0%}" for name in ("belady", "learned")
    )
    said = findings.hit_rates(analysis)
    assert said.startswith(f"With 50% of the experts in slots learned finds {learned} there, lru ")
    assert said.endswith(f"Belady's optimum {belady}")
    # Of seven routes three go to expert 0, and every expert has one.
    assert "expert 0 of layer 0: 43%" in findings.heat_map(analysis)
    assert "every expert is used" in findings.heat_map(analysis)
    assert findings.sorted_heat_map(analysis).startswith("2 of 4 experts")
    assert findings.reuse_distance(analysis) == (
        "67% of the reuses come with the next token, 100% within 8"
    )
    assert "33%" in findings.overlap(analysis)
    assert findings.layer_rates(analysis).startswith("learned finds least in layer 0")
    assert "names most" in findings.predictors(analysis)
