"""The folder of a study's results: the table in its forms, and the plot."""

from __future__ import annotations

from pathlib import Path

from vkd.errors import UserError
from vkd.records.atomic import write_bytes_atomically, write_text_atomically
from vkd.records.grouping import Table
from vkd.records.latex import to_latex
from vkd.records.published import DEFAULT
from vkd.records.tables import to_csv, to_markdown


def write_results(table: Table, folder: Path) -> None:
    """Write table.md, table.csv, table.tex, accuracy.png and accuracy.svg, each whole or not at all.

    The folder is made where it is not there. Raises UserError where it cannot be written to, or is the one whose CSV
    files are read as other people's figures.
    """
    from vkd.records.plots import draw, to_png, to_svg

    if folder.resolve() == Path(DEFAULT).resolve():
        raise UserError(
            f"the results of the study {table.study!r} would lie among the published figures, in {DEFAULT}",
            hint="results_root=FOLDER",
        )
    figure = draw(table)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / "table.md", to_markdown(table))
        write_text_atomically(folder / "table.csv", to_csv(table))
        write_text_atomically(folder / "table.tex", to_latex(table))
        write_bytes_atomically(folder / "accuracy.png", to_png(figure))
        write_bytes_atomically(folder / "accuracy.svg", to_svg(figure))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}", hint="results_root=FOLDER") from None
