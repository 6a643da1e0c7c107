"""The folder of a study's results: the table in its forms, the figures and the report."""

from __future__ import annotations

from pathlib import Path

from vkd.errors import UserError
from vkd.records.archive import to_lines
from vkd.records.atomic import write_bytes_atomically, write_text_atomically
from vkd.records.grouping import Table
from vkd.records.latex import to_latex
from vkd.records.published import DEFAULT
from vkd.records.sweep_index import FILE_NAME as SWEEP_FILE
from vkd.records.sweep_index import FOLDER as SWEEPS
from vkd.records.tables import to_csv, to_markdown

FIGURES = ("accuracy", "alpha_beta", "alpha_beta_line", "curves", "reliability", "cost")
ANALYSES = ("mass_step", "mass_training")
"""Figures of `vkd.analyze`, which the report shows where they are there."""
RESULTS = (
    *("table.md", "table.csv", "table.tex", "report.html", "runs.jsonl"),
    *(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")),
)
"""Every file that `write_results` may write."""


def inputs_of(study: str, *, folder: Path, runs_root: Path) -> list[Path]:
    """What the results of a study are made from beside its runs and published figures: files that need not be there."""
    root = folder.absolute()
    for _ in range(len(Path(study).parts) + 1):
        root = root.parent
    return [
        root / "experiments" / study / "README.md",
        folder / "analysis.json",
        *(folder / f"{name}.svg" for name in ANALYSES),
        *sorted((runs_root / SWEEPS).glob(f"*/{SWEEP_FILE}")),
    ]


def write_results(table: Table, folder: Path, *, runs_root: Path, records: bool = False) -> None:
    """Write the files of `RESULTS`, each whole or not at all; of the figures those that have something to show.

    The folder is made where it is not there; a figure of an earlier table that this one has not is removed. Raises
    UserError where the folder cannot be written to, or is the one whose CSV files are read as other people's figures.

    Args:
        runs_root: the folder of all runs, which paths of runs are relative to.
        records: whether the records of the runs are wanted too, in `runs.jsonl`.
    """
    from vkd.records.figures import figures_of
    from vkd.records.plots import to_png, to_svg
    from vkd.records.report import to_html

    if folder.resolve() == Path(DEFAULT).resolve():
        raise UserError(
            f"the results of the study {table.study!r} would lie among the published figures, in {DEFAULT}",
            hint="results_root=FOLDER",
        )
    figures = figures_of(table, runs_root)
    vectors = {name: to_svg(figure) for name, figure in figures.items()}
    texts = {
        "table.md": to_markdown(table),
        "table.csv": to_csv(table),
        "table.tex": to_latex(table),
        "report.html": to_html(table, runs_root=runs_root, folder=folder, figures=vectors),
        **({"runs.jsonl": to_lines(table)} if records else {}),
    }
    pictures = {
        **{f"{name}.svg": content for name, content in vectors.items()},
        **{f"{name}.png": to_png(figure) for name, figure in figures.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            if name in texts:
                write_text_atomically(folder / name, texts[name])
            elif name in pictures:
                write_bytes_atomically(folder / name, pictures[name])
            else:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}", hint="results_root=FOLDER") from None
