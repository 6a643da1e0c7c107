"""The benchmark's report on a terminal, in 80 columns or more."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vkd.speed.alternation import Spread
from vkd.speed.divergence_costs import REFERENCE
from vkd.speed.loops import LOOPS
from vkd.speed.startup import LIMITS

MOST_OF_PLAIN = 1.1
"""What a step with all views cached is meant to cost at most, of a step without a teacher."""


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print what `vkd.speed.report.measure` gave."""
    for line in _heading(report):
        console.print(line, markup=False, highlight=False)
    if any(report["images_per_second"].values()):
        _print_table(console, *_loops(report))
        for line in _sentences(report):
            console.print(line, markup=False, highlight=False)
    for name, reason in report["left_out"].items():
        console.print(f"{name} was left out: {reason}", markup=False, highlight=False)
    if report["profile"]:
        _print_table(console, *_profile(report))
        for line in _limits(report):
            console.print(line, markup=False, highlight=False)
    for shape in _shapes(report):
        _print_table(console, *_divergences(report, shape))
    if report["startup_seconds"]:
        _print_table(console, *_startup(report))


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def _table(columns: Sequence[str]) -> Table:
    """A table without rows, whose first column is text and the others figures."""
    made = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(Text(column), justify="right" if index else "left", overflow="fold")
    return made


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def _heading(report: dict[str, Any]) -> list[str]:
    environment, hardware = report["environment"], report["environment"]["hardware"]
    place = (
        hardware["accelerator"]
        or f"{hardware['processor']}, {hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"
    )
    lines = [
        "",
        f"{report['pair']} on {report['dataset']}, batches of {report['batch_size']}, {report['precision']}",
        f"{place}; torch {environment['torch']}, timm {environment['timm']}",
    ]
    if report["switches"]:
        lines.append(f"switches {report['switches']}")
    if report["teacher"]["random_weights"]:
        lines.append("the teacher has random weights, which decide no speed")
    return lines


def _loops(report: dict[str, Any]) -> tuple[str, Table]:
    count = f"{report['repetitions']} alternation{'s' * (report['repetitions'] > 1)}"
    title = f"training, {count} of {report['steps']} steps: medians, and the range of ratios"
    table = _table(["loop", "images/s", "x classic", "memory"])
    for name, values in report["images_per_second"].items():
        if not values:
            continue
        total = report["peak_memory_bytes"][name]["total"]
        label = f"fused, {report['students']} students" if name == "fused" else name
        _add(table, label, f"{statistics.median(values):,.0f}", _ratio(report, f"{name}/classic"), _bytes(total))
    return title, table


def _sentences(report: dict[str, Any]) -> list[str]:
    """What the rows are, and what their rates say about each other."""
    lines = [f"{name}: {meaning}" for name, meaning in LOOPS.items() if report["images_per_second"][name]]
    if report["images_per_second"]["fused"]:
        lines.append("images of fused count once for each student")
    lines += ["memory: of tensors, when a step needs most", ""]
    said = {
        "run/bound": "run / bound, images/s",
        "fused/run": "fused / run, student-images/s",
        "plain/cached": "cached / plain, time of a step",
    }
    for name, words in said.items():
        if report["ratios"][name] is not None:
            limit = f"; meant to be at most {MOST_OF_PLAIN}" if name == "plain/cached" else ""
            lines.append(f"{words}: {_ratio(report, name)}{limit}")
    return lines


def _profile(report: dict[str, Any]) -> tuple[str, Table]:
    found = report["profile"]
    table = _table(["of the bound's step", "time", "Gflop/s", "goes into"])
    for name in ("teacher", "student"):
        part = found[name]
        shares = [f"{kind} {100 * share:.0f} %" for kind, share in part["share"].items() if share >= 0.01]
        seconds = _seconds(statistics.median(part["seconds"]))
        _add(table, name, seconds, f"{part['flops_per_second'] / 1e9:,.0f}", "\n".join(shares))
    return f"profile, eager: medians of {report['repetitions']}", table


def _limits(report: dict[str, Any]) -> list[str]:
    """What no run on this device can be above."""
    found = report["profile"]
    lines = [f"a product of large matrices: {found['matrix_flops_per_second'] / 1e9:,.0f} Gflop/s"]
    classic = report["images_per_second"]["classic"]
    for name, limit in found["limit_images_per_second"].items():
        against = f", {limit / statistics.median(classic):.2f} x classic" if classic else ""
        lines.append(f"{name}, were it its convolutions alone at that speed: {limit:,.0f} images/s{against}")
    return lines


def _shapes(report: dict[str, Any]) -> list[list[int]]:
    shapes = []
    for cost in report["divergences"]:
        if cost["shape"] not in shapes:
            shapes.append(cost["shape"])
    return shapes


def _divergences(report: dict[str, Any], shape: list[int]) -> tuple[str, Table]:
    costs = [cost for cost in report["divergences"] if cost["shape"] == shape]
    (reference,) = (cost for cost in costs if cost["name"] == REFERENCE)
    title = f"divergences at {shape}: median of {report['repetitions']}"
    table = _table(["divergence", "forward", "and backward", "x kl_div", "memory", "x kl_div"])
    for cost in costs:
        seconds = statistics.median(cost["seconds"])
        ratios = [mine / theirs for mine, theirs in zip(cost["seconds"], reference["seconds"], strict=True)]
        memory, reference_memory = cost["peak_bytes"], reference["peak_bytes"]
        _add(
            table,
            "torch's kl_div" if cost is reference else _divergence_name(cost),
            _seconds(statistics.median(cost["forward_seconds"])),
            _seconds(seconds),
            f"{statistics.median(ratios):.2f}",
            _bytes(memory),
            f"{memory / reference_memory:.2f}" if memory and reference_memory else "-",
        )
    return title, table


def _divergence_name(cost: dict[str, Any]) -> str:
    numbers = [f"{value:g}" for value in cost["parameters"].values() if not isinstance(value, bool)]
    return cost["name"] + (f" ({', '.join(numbers)})" if numbers else "")


def _startup(report: dict[str, Any]) -> tuple[str, Table]:
    words = {
        "help": "python -m vkd.train --help",
        "import torch": "import torch",
        "import vkd": "import vkd, beyond import torch",
        "first step": "default run, first step done",
    }
    count = len(report["startup_seconds"]["help"])
    table = _table(["what", "seconds", "meant to be under"])
    for name, values in report["startup_seconds"].items():
        limit = f"{LIMITS[name]:g}" if name in LIMITS else "-"
        _add(table, words[name], _in_range(Spread.of(values), ".2f"), limit)
    return f"start-up, seconds: median and range of {count}", table


def _ratio(report: dict[str, Any], name: str) -> str:
    found = report["ratios"].get(name)
    return "-" if found is None else _in_range(Spread(**found), ".2f")


def _in_range(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.least:{form}} to {spread.most:{form}})"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
