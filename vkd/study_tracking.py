"""The results of a study as one run of W&B: the table, the figures, the report, and all files as one artifact.

It belongs to the group of the study's own runs, and a study that is collected again has the same one again.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vkd.records.grouping import Table
from vkd.records.results import ANALYSES, RESULTS
from vkd.tracking import artifact_name, may_contact_wandb

logger = logging.getLogger("vkd")

COLLECT = "collect"
"""The job type of the run, which tells it from those of students."""

_TEXTS = frozenset({"group", "seeds", "holes", "variant"})
"""Columns of `table.csv` that hold texts, also where all of them happen to look like numbers."""


def log_study(table: Table, folder: Path, *, tracker: str, project: str, entity: str | None, directory: Path) -> None:
    """Log what the collector wrote as the W&B run `STUDY-table`; where that fails, warn once.

    `table.csv` becomes a table of W&B in which numbers are numbers, every PNG an image `figures/NAME`, `report.html`
    the page `report`, and all files of the folder together the artifact `STUDY-results`.

    Args:
        table: of the study.
        folder: with its results; what is not there is left out.
        tracker: none; offline, which contacts nobody; or wandb, which does where a key is configured.
        project, entity: W&B's.
        directory: where W&B's files lie, in its folder `wandb`. Offline files of the same study there are replaced.
    """
    if tracker == "none":
        return
    # W&B reports its own crashes over the network unless told not to.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        online = tracker == "wandb" and may_contact_wandb(directory)
        identifier = f"table-{hashlib.sha256(table.study.encode()).hexdigest()[:16]}"
        staged = directory.resolve() / "wandb" / f"data-{identifier}"
        for old in [] if online else [staged, *directory.glob(f"wandb/offline-run-*-{identifier}")]:
            shutil.rmtree(old, ignore_errors=True)
        staged.mkdir(parents=True, exist_ok=True)
        import wandb

        with (
            wandb.init(
                project=project,
                entity=entity,
                group=table.study,
                job_type=COLLECT,
                name=f"{table.study}-table",
                id=identifier,
                resume="allow" if online else None,
                dir=str(directory.resolve()),
                mode="online" if online else "offline",
                config={"study": table.study, "metric": table.metric, "command": table.command},
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True),
            ) as run,
            _staged_in(staged),
        ):
            run.log(_shown(folder))
            run.log_artifact(_all_files(table.study, folder))
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        logger.warning("W&B did not take the results (%s); they are in %s", reason, folder)


def _shown(folder: Path) -> dict[str, Any]:
    """What W&B shows of a folder of results, by its name there."""
    import wandb

    shown: dict[str, Any] = {}
    if (file := folder / "table.csv").is_file():
        columns, rows = read_table_csv(file)
        shown["table"] = wandb.Table(columns=columns, data=rows)
    for file in sorted(folder.glob("*.png")):
        shown[f"figures/{file.stem}"] = wandb.Image(str(file))
    if (file := folder / "report.html").is_file():
        # It has a style of its own, and needs no other beside it.
        shown["report"] = wandb.Html(file.read_text(encoding="utf-8"), inject=False, data_is_not_path=True)
    return shown


def read_table_csv(file: Path) -> tuple[list[str], list[list[str | float | None]]]:
    """The columns and the rows of a `table.csv`, a column's cells all numbers or all texts; an empty cell is None."""
    with file.open(newline="", encoding="utf-8") as lines:
        columns, *rows = csv.reader(lines)
    typed = [_typed(name, [row[place] for row in rows]) for place, name in enumerate(columns)]
    return columns, [list(row) for row in zip(*typed, strict=True)]


def _typed(name: str, cells: Sequence[str]) -> list[str | float | None]:
    numbers = [_number(cell) for cell in cells]
    if name not in _TEXTS and all(number is not None for number, cell in zip(numbers, cells, strict=True) if cell):
        return numbers
    return [cell or None for cell in cells]


def _number(cell: str) -> float | None:
    """The finite number that a cell holds; None where it holds none."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _all_files(study: str, folder: Path) -> Any:
    """The artifact with what `vkd.collect` and `vkd.analyze` wrote to a folder of results, and nothing else there."""
    import wandb

    results = wandb.Artifact(artifact_name(f"{study}-results"), type="results", metadata={"study": study})
    analysis = ["analysis.json", "analysis.md", *(f"{name}.{suffix}" for name in ANALYSES for suffix in ("png", "svg"))]
    for file in sorted(folder / name for name in (*RESULTS, *analysis)):
        if file.is_file() and not file.is_symlink():
            results.add_file(str(file), name=file.name)
    return results


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Let W&B keep the copies that it makes of files in `folder` for as long as the context lasts.

    Otherwise they are in the user's home, and stay there when the run's own directory is moved or removed.
    """
    name = "WANDB_DATA_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
