"""The finished runs that a user named, or the message that says why there are none."""

from __future__ import annotations

from pathlib import Path

from vkd.errors import ConfigError, UserError, nearest
from vkd.records.reading import Run, read_run, read_runs


def finished_run(folder: Path) -> Run:
    """The run in the directory that `run=` named. Raises ConfigError where there is none, or it is not done."""
    expected = "the directory of a finished run, with its config.yaml, result.json and student.safetensors"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = [folder.parent] if folder.exists() else [folder.with_name(name) for name in nearest(folder.name, beside)]
        raise ConfigError(f"run={folder} {what}", expected=expected, hint=" or ".join(f"run={path}" for path in near))
    run = read_run(folder)
    if run.done:
        return run
    hint = f"python -m vkd.train from={folder}" if run.content else ""
    raise ConfigError(f"{folder} is no finished run: {run.why}", expected=expected, hint=hint)


def require_study_name(study: str) -> None:
    """Raise ConfigError where `study` can be no name of a folder below the folder of all runs."""
    parts = Path(study).parts
    if Path(study).is_absolute() or not parts or any(part.startswith(".") for part in parts):
        raise ConfigError(f"study={study} is no name of a study", expected="the name of a folder in runs_root")


def finished_runs(runs_root: Path, study: str) -> list[Run]:
    """All runs of a study, of which at least one is finished; their paths are relative to `runs_root`.

    Raises UserError where none is, ConfigError where `study` is no name of a folder below it.
    """
    require_study_name(study)
    runs = list(read_runs(runs_root / study, relative_to=runs_root))
    if any(run.done for run in runs):
        return runs
    folders = [path.name for path in runs_root.iterdir() if path.is_dir()] if runs_root.is_dir() else []
    near = " or ".join(f"study={name}" for name in nearest(study, {name for name in folders if name[0] != "."}))
    where = "there is no finished run in" if (runs_root / study).is_dir() else "there is no folder"
    raise UserError(f"nothing to analyse: {where} {runs_root / study}", hint=near)
