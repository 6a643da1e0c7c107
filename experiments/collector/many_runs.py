"""How long `vkd.collect` takes over many runs, and how much memory: `python experiments/collector/many_runs.py`.

Writes run directories as vkd.train leaves them (result.json, config.yaml, status.json, metrics.jsonl; no weights) for a
grid of alpha and beta with several seeds, some of them failed, collects them twice, each time in a process of its own,
and prints seconds and peak memory of both, with where they were measured, as JSON.

    python experiments/collector/many_runs.py [runs=10000] [folder=FOLDER] [output=FILE]
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkd.command import parse_words
from vkd.composition import compose_config
from vkd.config import parse
from vkd.records.reading import read_run
from vkd.training.environment import processor_name

SEEDS = 10
EPOCHS = 30
STUDY = "many"

COLLECT = """
import re, sys
from pathlib import Path
from vkd.collect import main
code = main(sys.argv[1:])
# What getrusage says would be at least the memory of the process that started this one.
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1], file=sys.stderr)
sys.exit(code)
"""


@dataclass
class Words:
    """runs: how many; folder: where to make them, in place of a temporary one; output: a JSON file for the figures."""

    runs: int = 10_000
    folder: str | None = None
    output: str | None = None


def digest(*parts: Any) -> str:
    """64 hexadecimal digits that stand for the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def figures(top1: float, draw: random.Random) -> dict[str, float]:
    """The metrics of an epoch around an accuracy."""
    line = {"train/loss": 9 - top1 / 20, "train/cross_entropy": 3 - top1 / 50, "train/kd": 6 - top1 / 30}
    for split in ("val", "test"):
        own = top1 + draw.gauss(0, 0.2)
        line |= {f"{split}/top1": own, f"{split}/top5": min(99.0, own + 20), f"{split}/nll": 4 - own / 30}
        line |= {f"{split}/ece": 0.1, f"{split}/entropy": 4 - own / 25, f"{split}/agreement": own + 1}
        line |= {f"{split}/teacher_kl": 2 - own / 60}
    return line


def write(folder: Path, content: dict[str, Any], config: str, history: list[dict[str, Any]], failed: bool) -> None:
    """Write one run's directory."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    status = {"state": "failed" if failed else "done", "reason": "the loss is not finite" if failed else ""}
    (folder / "status.json").write_text(json.dumps(status | {"epoch": EPOCHS, "epochs": EPOCHS}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    if not failed:
        (folder / "result.json").write_text(json.dumps(content, indent=2))


def make_runs(root: Path, count: int) -> None:
    """Write `count` runs of a grid of alpha and beta below `root`."""
    import yaml

    draw = random.Random(0)
    words = ["dataset=cifar100", "pair=resnet20_resnet8", "recipe=quick", "divergence=abkd", "teacher.checkpoint=t.pth"]
    values = parse(compose_config(words)).as_dict()
    points = math.ceil(count / SEEDS)
    across = math.ceil(math.sqrt(points))
    pair = root / STUDY / "cifar_resnet20-cifar_resnet8"
    for number in range(count):
        point, seed = divmod(number, SEEDS)
        alpha, beta = round(0.05 * (point % across), 2), round(0.05 * (point // across), 2)
        values["divergence"] |= {"alpha": alpha, "beta": beta}
        values["seed"] = seed
        top1 = 60 - 5 * (alpha - 0.8) ** 2 - 5 * (beta - 0.3) ** 2 + draw.gauss(0, 0.3)
        history = [
            {"epoch": epoch, **figures(top1 * epoch / EPOCHS, draw), "seconds": 9.0 * epoch}
            for epoch in range(1, EPOCHS + 1)
        ]
        fingerprint = digest(point, seed)
        names = ("method", "cross_entropy_weight", "divergence", "seed", "recipe", "precision")
        content = {
            "format": 1,
            "fingerprint": fingerprint,
            "group": digest(point),
            "study": STUDY,
            "dataset": {"name": "cifar100", "identity": digest("data"), "val_fraction": 0.1, "classes": 100}
            | {"train": 45_000, "val": 5_000, "test": 10_000},
            "teacher": {"arch": "cifar_resnet20", "accuracy": {"val": 70.0, "test": 69.0}, "sha256": digest("teacher")}
            | {"saw_val": "unknown", "source": "checkpoint", "parameters": 278_324, "macs": 40_818_944},
            "student": {"arch": "cifar_resnet8", "parameters": 83_892, "macs": 12_507_392},
            **{name: values[name] for name in names},
            "metrics": {name: value for name, value in history[-1].items() if "/" in name},
            "reliability": {
                split: {"counts": [200] * 15, "confidence": [6.0 + 13 * k for k in range(15)], "correct": [9] * 15}
                for split in ("val", "test")
            },
            "timing": {"seconds": 270.0, "images_per_second": 700.0, "evaluation_images_per_second": 3_000.0},
            "environment": {"torch": "2.14.1", "timm": "1.0.31", "python": "3.11.7", "device": "cpu (2 threads)"}
            | {"git": "0" * 12, "command": f"python -m vkd.train divergence.alpha={alpha} divergence.beta={beta}"},
        }
        folder = pair / f"kd-abkd-s{seed}-{fingerprint[:8]}"
        write(folder, content, yaml.safe_dump(values, sort_keys=False), history, failed=number % 97 == 96)
    if read_run(folder).state not in ("done", "failed"):
        raise SystemExit(f"vkd does not take {folder} for a run")


def collect(root: Path) -> dict[str, float]:
    """Collect in a process of its own: its seconds and its peak memory in MiB."""
    words = [f"study={STUDY}", f"runs_root={root / 'runs'}", f"results_root={root / 'results'}"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COLLECT, *words], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"seconds": round(seconds, 2), "peak_mib": round(int(done.stderr.splitlines()[-1]) / 1024)}


def main() -> None:
    """Make the runs, collect them twice and say how that went."""
    words = parse_words(Words, sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(words.folder or temporary)
        if not (root / "runs" / STUDY).exists():
            make_runs(root / "runs", words.runs)
        report = {
            "command": "python experiments/collector/many_runs.py",
            "runs": sum(1 for _ in (root / "runs" / STUDY).glob("*/*")),
            "epochs_a_run": EPOCHS,
            "first": collect(root),
            "second": collect(root),
            "processor": processor_name(),
            "python": ".".join(map(str, sys.version_info[:3])),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if words.output:
        Path(words.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
