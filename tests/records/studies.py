"""Run directories made by hand, for the tests of everything that reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml


def digest(*parts: Any) -> str:
    """64 hexadecimal digits that stand for the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def result(
    method: str = "kd",
    divergence: str | None = "fkld",
    *,
    seed: int = 1,
    top1: float | None = 90.0,
    val: float | None = 91.0,
    dataset: str = "digits",
    teacher: str = "cifar_resnet20",
    student: str = "cifar_resnet8_width4",
    point: tuple[float, float] | None = None,
    recipe: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A `result.json` as a dict. `changes` replace top-level entries after the fingerprints are made."""
    plain = method == "none"
    sources = {"name": divergence, "temperature": 4.0}
    if point:
        sources |= {"alpha": point[0], "beta": point[1], "match_kl_scale": False}
    content = {
        "format": 1,
        "fingerprint": "",
        "group": "",
        "study": "quickstart",
        "dataset": {"name": dataset, "identity": digest(dataset), "val_fraction": 0.2, "classes": 10, "train": 1038},
        "teacher": None
        if plain
        else {
            "arch": teacher,
            "accuracy": {"val": 99.2, "test": 98.9},
            "sha256": digest(teacher, dataset),
            "saw_val": False,
            "source": "trained",
        },
        "student": {"arch": student, "parameters": 5000},
        "method": {} if plain else {name: {"weight": 0.9} for name in method.split("+")},
        "cross_entropy_weight": 1.0 if plain else 0.1,
        "divergence": None if plain or divergence is None else sources,
        "seed": seed,
        "recipe": {"epochs": 20, "batch_size": 64, "lr": 0.1} | (recipe or {}),
        "precision": "fp32",
        "metrics": {"val/top1": val, "test/top1": top1, "test/top1_max_over_epochs": top1, "test/ece": 0.05},
        "timing": {"seconds": 12.3},
        "environment": {"torch": "2.14.1", "timm": "1.0.31", "python": "3.11.7", "device": "cpu (2 threads)"}
        | {"vkd": "0.1.0", "git": None, "command": "python -m vkd.train"}
        | (environment or {}),
    }
    what = {name: content[name] for name in ("dataset", "student", "method", "divergence", "recipe", "precision")}
    point = tuple(map(float, point)) if point else None
    identity = [json.dumps({**what, "divergence": divergence}, sort_keys=True), None if plain else teacher, point]
    content["group"], content["fingerprint"] = digest(identity), digest(identity, seed)
    return content | changes


def config_of(content: dict[str, Any]) -> dict[str, Any]:
    """The `config.yaml` that belongs to a result."""
    names = ("study", "student", "method", "divergence", "seed", "recipe", "cross_entropy_weight", "precision")
    teacher = content["teacher"]
    return {
        **{name: content[name] for name in names},
        "dataset": {"name": content["dataset"]["name"], "val_fraction": content["dataset"]["val_fraction"]},
        "teacher": {"arch": teacher and teacher["arch"], "pretrained": False},
        "student": {"arch": content["student"]["arch"]},
        "device": "auto",
    }


def write_run(runs_root: Path, content: dict[str, Any], status: dict[str, Any] | None = None, name: str = "") -> Path:
    """Write a run's directory; one that `status` says is not done gets no `result.json`. Its path."""
    teacher, divergence = content["teacher"], content["divergence"]
    pair = f"{teacher['arch']}-{content['student']['arch']}" if teacher else content["student"]["arch"]
    label = "-".join(["+".join(content["method"]) or "none", *([divergence["name"]] if divergence else [])])
    name = name or f"{label}-s{content['seed']}-{content['fingerprint'][:8]}"
    folder = runs_root / content["study"] / pair / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(content), sort_keys=False))
    (folder / "status.json").write_text(json.dumps(status or {"state": "done", "epoch": 20, "epochs": 20}))
    if status is None:
        (folder / "result.json").write_text(json.dumps(content))
    return folder
