"""What `vkd.analyze` found, as tables for a terminal and as the files of a study's analysis."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vkd.errors import UserError
from vkd.records.atomic import write_bytes_atomically, write_json_atomically, write_text_atomically
from vkd.records.reading import clean

_Column = tuple[str, str, Callable[[float], str]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _short(value: float) -> str:
    return f"{value:.3g}"


GRADIENT: list[_Column] = [
    ("D", "divergence", "{:.3g}".format),
    ("target %", "share/target", _percent),
    ("under %", "share/under", _percent),
    ("over %", "share/over", _percent),
    ("classes", "effective_classes", "{:.1f}".format),
    ("prefers q, under", "preference/under", _signed),
    ("prefers q, over", "preference/over", _signed),
]
"""Title, statistic and form of the columns that say where the gradient goes."""
FACTORS: list[_Column] = [
    (f"{factor}, {group}", f"{factor}/{group}", _short)
    for factor in ("hardness", "confidence")
    for group in ("target", "under", "over")
]
"""The same for what it is made of."""

WORDS = """\
p is the teacher's distribution and q the student's, at the temperature T of the divergence D; D is nats for a
Kullback-Leibler divergence. Of the classes other than the label's (*target*) those with q < p are *under*-estimated,
the rest *over*-estimated.

- *target, under, over %*: shares of the L1 norm of the gradient of D by the student's logits, mean over images.
- *classes*: over how many classes that norm is spread, exp(entropy of the shares).
- *prefers q*: partial correlation of the log mass ratio of a step with q among the under- or over-estimated classes,
  p - q held constant. 0: equally wrong classes are treated alike, whatever the student gives them (forward KL). Above
  0: of equally under-estimated ones those with the larger q are raised more, of equally over-estimated ones those with
  the smaller q are lowered more (reverse KL).
- *bound*: the largest ratio of |LogR| - |N| to its bound over all images and classes, never above 1.
- *hardness*: |p^alpha - q^alpha| / |alpha|, or |ln p - ln q| at alpha = 0; *confidence*: q^beta; means over the classes
  of a group, then over images.

Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
alpha-beta-Divergence", ICML 2025 (arXiv 2505.04560): Prop. 3.1 and 4.2, Thm. 3.2."""


def divergence_label(divergence: dict[str, Any]) -> str:
    """A divergence in words, with its parameters and temperature: "abkd (0.8, 0.3), T = 4"."""
    point = [f"{divergence[name]:g}" for name in ("alpha", "beta") if name in divergence]
    words = clean(divergence["name"]) + (f" ({', '.join(point)})" if point else "")
    others = [f"{name} {value}" for name, value in divergence.items() if name not in _SAID and value is not False]
    return ", ".join([words, *others, f"T = {divergence['temperature']:g}"])


_SAID = frozenset({"name", "alpha", "beta", "temperature"})


def _cells(entry: dict[str, Any], columns: Sequence[_Column], *, spread: bool = False) -> list[str]:
    """The statistics of one epoch as text; with `spread`, their standard deviation over seeds too."""
    cells = []
    for _, name, form in columns:
        found = entry["statistics"].get(name)
        if found is None:
            cells.append("-")
            continue
        std = found["std"] if spread else None
        cells.append(form(found["mean"]) + (f" ± {form(std).lstrip('+')}" if std is not None else ""))
    return cells


def _count(entry: dict[str, Any], columns: Sequence[_Column]) -> str:
    """Of how many seeds the statistics of one epoch are: "3", or "2-3" where some seeds have not all of them."""
    counts = [found["n"] for _, name, _ in columns if (found := entry["statistics"].get(name)) is not None]
    return "-".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "-"


def _bound(entry: dict[str, Any]) -> str:
    ratio = entry["largest_ratio_to_bound"]
    return "-" if ratio is None else f"{ratio:.3f}"


def _plain(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = 0) -> list[str]:
    """Lines of a table, the first `text` columns to the left, titles of several words in several lines."""
    split = [title.replace(", ", " ").split(" ") for title in header]
    height = max(map(len, split))
    titles = [[*[""] * (height - len(words)), *words] for words in split]
    lines = [[words[line] for words in titles] for line in range(height)] + [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column < text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = 0) -> list[str]:
    rules = ["---" if column < text else "--:" for column in range(len(header))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, rules, *rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _titles(columns: Sequence[_Column]) -> list[str]:
    return [title for title, _, _ in columns]


def run_tables(found: dict[str, Any]) -> str:
    """The analysis of a run, by epoch."""
    epochs = found["epochs"]
    numbers = [str(entry["epoch"]) for entry in epochs]
    gradient = [[n, *_cells(entry, GRADIENT), _bound(entry)] for n, entry in zip(numbers, epochs, strict=True)]
    lines = [
        f"{found['dataset']}: {found['teacher']} -> {found['student']}, {found['method']}, "
        f"{divergence_label(found['divergence'])}, seed {found['seed']}",
        f"means over n = {found['images']:,} images of {found['split']}; bound: of a step of rate {found['rate']:g}",
        *(f"note: {note}" for note in found["notes"]),
        "",
        *_plain(["epoch", *_titles(GRADIENT), "bound"], gradient),
    ]
    if any(entry["statistics"].get("hardness/over") for entry in epochs):
        factors = [[n, *_cells(entry, FACTORS)] for n, entry in zip(numbers, epochs, strict=True)]
        lines += ["", *_plain(["epoch", *_titles(FACTORS)], factors)]
    return "\n".join(lines)


def row_label(row: dict[str, Any]) -> str:
    """A row of a study's analysis in words, with what it stands for."""
    return clean(row["label"]) + (f" ({', '.join(row['stands_for'])})" if row["stands_for"] else "")


def _last_rows(grid: dict[str, Any], columns: Sequence[_Column], *, spread: bool) -> list[list[str]]:
    """Every row after its last epoch."""
    rows = []
    for row in grid["rows"]:
        last = row["epochs"][-1]
        cells = [row_label(row), str(last["epoch"]), _count(last, columns), *_cells(last, columns, spread=spread)]
        rows.append([*cells, _bound(last)] if columns is GRADIENT else cells)
    return rows


def study_tables(found: dict[str, Any]) -> str:
    """The analysis of a study: every row after its last epoch, grid by grid."""
    lines: list[str] = []
    for grid in found["grids"]:
        lines += [
            *([""] if lines else []),
            f"{clean(grid['title'])}, {clean(grid['method'])}: means over n seeds of means over {grid['images']:,} "
            f"images of {grid['split']}",
            *(f"note: {note}" for note in grid["notes"]),
            *_plain(["row", "epoch", "n", *_titles(GRADIENT), "bound"], _last_rows(grid, GRADIENT, spread=False), 1),
        ]
    return "\n".join(lines)


def to_markdown(found: dict[str, Any]) -> str:
    """`analysis.md` of a study."""
    lines = [
        f"# Where probability mass goes: {clean(found['study'])}",
        "",
        f"`{clean(found['command'])}`",
        "",
        WORDS,
    ]
    figures = {
        "mass_step": any(grid["step"] for grid in found["grids"]),
        "mass_training": any(row["stands_for"] for grid in found["grids"] for row in grid["rows"]),
    }
    captions = {
        "mass_step": "One step of each divergence from the same student.",
        "mass_training": "Shares of the gradient over training, and the students' mass in the end.",
    }
    for name, is_there in figures.items():
        if is_there:
            lines += ["", f"![{captions[name]}]({name}.svg)"]
    for grid in found["grids"]:
        lines += ["", f"## {clean(grid['title'])}, {clean(grid['method'])}", ""]
        lines.append(
            f"{grid['images']:,} images of {grid['split']}; mean ± sample standard deviation over n seeds. "
            f"`bound` is that of a step of rate {found['rate']:g} (eta / T^2)."
        )
        lines += [f"- {clean(note)}" if index else f"\n- {clean(note)}" for index, note in enumerate(grid["notes"])]
        lines += ["", "After the last epoch:", ""]
        header = ["row", "epoch", "n"]
        lines += _markdown([*header, *_titles(GRADIENT), "bound"], _last_rows(grid, GRADIENT, spread=True), 1)
        lines += ["", *_markdown([*header, *_titles(FACTORS)], _last_rows(grid, FACTORS, spread=True), 1)]
        lines += _step_words(grid["step"])
        for row in grid["rows"]:
            if row["stands_for"] and len(row["epochs"]) > 1:
                lines += ["", f"Over training, {row_label(row)}, by the n seeds that have a snapshot:", ""]
                body = [
                    [str(entry["epoch"]), _count(entry, GRADIENT), *_cells(entry, GRADIENT, spread=True), _bound(entry)]
                    for entry in row["epochs"]
                ]
                lines += _markdown(["epoch", "n", *_titles(GRADIENT), "bound"], body)
    return "\n".join(lines) + "\n"


def _step_words(step: dict[str, Any] | None) -> list[str]:
    if step is None:
        return []
    rates = ", ".join(f"{name} {entry['rate']:.3g}" for name, entry in step["steps"].items())
    return [
        "",
        f"One step was taken from: {clean(step['from'])}, seed {step['seed']}, after epoch {step['epoch']}; n = "
        f"{step['images']:,} images, T = {step['temperature']:g}. Rates (eta), at which the steps have the same mean "
        f"L1 norm: {rates}.",
    ]


def check_folder(folder: Path) -> None:
    """Raise UserError where the folder of a study's analysis cannot be made or written to. Nothing is made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise _cannot_write(folder, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _cannot_write(folder, os.strerror(errno.EACCES))


def _cannot_write(folder: Path, why: str) -> UserError:
    return UserError(f"cannot write to {folder}: {why}", expected="a folder of yours", hint="results_root=FOLDER")


def write_analysis(found: dict[str, Any], folder: Path) -> None:
    """Write analysis.json, analysis.md, and mass_step and mass_training as .png and .svg, each whole or not at all.

    The folder is made where it is not there. Raises UserError where it cannot be written to.
    """
    from vkd.records.analysis_plots import draw_steps, draw_training
    from vkd.records.plots import to_png, to_svg

    figures = {"mass_step": draw_steps(found), "mass_training": draw_training(found)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / "analysis.json", found)
        write_text_atomically(folder / "analysis.md", to_markdown(found))
        for name, figure in figures.items():
            if figure is not None:
                write_bytes_atomically(folder / f"{name}.png", to_png(figure))
                write_bytes_atomically(folder / f"{name}.svg", to_svg(figure))
    except OSError as error:
        raise _cannot_write(folder, error.strerror) from None
