"""`moeinf simulate`: hit rates of policies on recorded traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress

from moeinf.cli import options
from moeinf.cli.output import console, print_json, print_table
from moeinf.output_files import check_writable, replacing
from moeinf.traces.eam import EAMC
from moeinf.traces.simulator import (
    SimulationResult,
    check_policy,
    parse_slots,
    policy_names,
    simulate,
)
from moeinf.traces.trace import Trace


def command(
    traces: options.Traces,
    policy: Annotated[
        str,
        typer.Option(
            help="Policies, comma-separated, with parameters as in eam:matched=5: "
            f"{', '.join(policy_names())}."
        ),
    ] = ",".join(policy_names()),
    slots: Annotated[
        str, typer.Option(help="Budgets, comma-separated: counts, or shares of all experts.")
    ] = "5%,10%,20%,30%",
    eamc: Annotated[
        Path | None, typer.Option(help="A saved collection that eam starts from.")
    ] = None,
    json: options.Json = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw hit rate against budget into this PNG.")
    ] = None,
) -> None:
    """Replays traces against policies and budgets, counting as the live cache does."""
    pictures = [] if plot is None else _pictures(plot, len(traces))
    for picture in pictures:
        check_writable(picture)
    policies = _listed("policy", policy)
    for name in policies:
        check_policy(name)
    budgets = _listed("slots", slots)
    if eamc is not None and not any(_is_eam(name) for name in policies):
        raise ValueError(f"--eamc: a collection is for the policy 'eam', found --policy {policy}")
    collection = EAMC.load(eamc) if eamc is not None else None
    loaded = [Trace.load(path) for path in traces]
    for trace in loaded:
        for budget in budgets:
            parse_slots(budget, trace.total_experts)

    results: list[list[SimulationResult]] = []
    with Progress(console=console(stderr=True), transient=True) as bar:
        for trace in loaded:
            of_trace = []
            for name in policies:
                for budget in budgets:
                    of_trace.append(_simulate(bar, trace, name, budget, collection))
            results.append(of_trace)

    if json:
        print_json([result.as_dict() for of_trace in results for result in of_trace])
    else:
        for trace, of_trace in zip(loaded, results, strict=True):
            _print(trace, policies, budgets, of_trace)
    for picture, trace, of_trace in zip(pictures, loaded, results, strict=False):
        _plot(picture, trace, of_trace)


def _simulate(
    bar: Progress, trace: Trace, policy: str, slots: str, collection: EAMC | None
) -> SimulationResult:
    task = bar.add_task(escape(f"{trace.name} {policy} {slots}"), total=trace.num_tokens)

    def advance(done: int, total: int) -> None:
        bar.update(task, completed=done)

    result = simulate(
        trace,
        policy=policy,
        slots=slots,
        eamc=collection if _is_eam(policy) else None,
        progress=advance,
    )
    bar.remove_task(task)
    return result


def _is_eam(policy: str) -> bool:
    return policy.partition(":")[0] == "eam"


def _listed(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"--{option}: expected at least one, found {text!r}")
    return parts


def _print(
    trace: Trace, policies: list[str], budgets: list[str], results: list[SimulationResult]
) -> None:
    rows = []
    for i, name in enumerate(policies):
        row = [name]
        for result in results[i * len(budgets) : (i + 1) * len(budgets)]:
            rate = result.hit_rate_decode
            row.append("-" if rate is None else f"{100 * rate:.2f}")
        rows.append(row)
    slots = [str(result.slots) for result in results[: len(budgets)]]
    columns = [f"{b} ({s})" if b != s else b for b, s in zip(budgets, slots, strict=True)]
    print_table(
        f"{trace.name}: decode hits in percent, by slots ({trace.total_experts} experts)",
        ["policy", *columns],
        rows,
    )


def _pictures(path: Path, count: int) -> list[Path]:
    """One file for each trace: out.png, out-2.png, ..."""
    return [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(2, count + 1))]


def _plot(path: Path, trace: Trace, results: list[SimulationResult]) -> None:
    from moeinf.report.figures import draw_hit_rates

    by_policy: dict[str, list[SimulationResult]] = {}
    for result in results:
        by_policy.setdefault(result.policy, []).append(result)
    with replacing(path) as part:
        draw_hit_rates(by_policy, trace.total_experts).savefig(part, format="png")
