"""Kills a sweep at random moments, again and again, and holds what it ends with against the sweep that nobody touched.

    python experiments/trust/kills.py kills=200 output=results/trust/kills.json

Six students are trained side by side on the embedded digits. A child process runs the sweep's command, is killed with
SIGKILL after a random time, and the same command is given again; when a sweep is done, its students are compared bit by
bit with those of the undisturbed sweep, and another one is begun, until there were enough kills. Sweeps take turns
between the VARIANTS.

Children are forked from a process that has imported torch, so that the random moments fall into the work of a run and
not into seconds of imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import vkd.train
from vkd.command import import_training, parse_words
from vkd.records.atomic import write_json_atomically

SWEEP = [
    "-m", "hydra/launcher=fused", "dataset=digits", "teacher.arch=cifar_resnet8_width4",
    "student.arch=cifar_resnet8_width4", "teacher.recipe.epochs=1", "teacher.allow_chance_accuracy=true",
    "method=kd,dkd", "divergence=abkd", "divergence.alpha=0.5", "divergence.beta=0,0.5,1", "recipe.epochs=3",
    "recipe.batch_size=128", "tracker=none", "device=cpu",
]  # fmt: skip

VARIANTS = {
    "fp32, a checkpoint after every step": ["checkpoint_minutes=0"],
    "fp32, moving average, a checkpoint every 60 ms": ["recipe.ema_decay=0.9", "checkpoint_minutes=0.001"],
    "bf16, checkpoints at the end of epochs": ["precision=bf16", "checkpoint_minutes=null"],
    "fp32, one student after the other": ["hydra/launcher=basic", "checkpoint_minutes=0.001"],
}
"""What the words of a sweep end with."""

STUDENTS = 6
TIMED = ("seconds", "images_per_second")


@dataclass
class Words:
    """The keys of this script.

    kills: how many.
    seed: of the random moments.
    variants: how many of the VARIANTS, from the first.
    output: the JSON file of the report; null prints it alone.
    """

    kills: int = 200
    seed: int = 0
    variants: int = len(VARIANTS)
    output: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; 0 where every student is what it would have been, else 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse_words(Words, words)
    torch.set_num_threads(1)
    import_training()
    from vkd.training.environment import environment

    moments = random.Random(options.seed)
    variants = dict(list(VARIANTS.items())[: options.variants])
    report: dict[str, Any] = {
        "command": shlex.join(["python", "experiments/trust/kills.py", *words]),
        "sweep": shlex.join(["python", "-m", "vkd.train", *SWEEP]),
        "variants": variants,
        "students": STUDENTS,
        "sweeps": [],
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expected, seconds = {}, {}
        for number, (name, more) in enumerate(variants.items()):
            place = _place(root, f"undisturbed-{number}")
            began = time.perf_counter()
            code = _wait(_start(place, more))
            seconds[name] = time.perf_counter() - began
            expected[name] = _students(place)
            if code != 0 or len(expected[name]) != STUDENTS:
                raise RuntimeError(f"the undisturbed sweep ended with {code}: {(place / 'said').read_text()}")
        while (done := sum(sweep["kills"] for sweep in report["sweeps"])) < options.kills:
            name = list(variants)[len(report["sweeps"]) % len(variants)]
            place = _place(root, f"disturbed-{len(report['sweeps'])}")
            sweep = _disturbed(place, variants[name], seconds[name], moments, options.kills - done)
            found = _students(place)
            sweep.equal = sum(found.get(run) == bits for run, bits in expected[name].items())
            report["sweeps"].append({"variant": name, **asdict(sweep)})
            print(
                f"{done + sweep.kills:4d} kills; {name}: {sweep.kills}, equal {sweep.equal} of {STUDENTS}", flush=True
            )
            shutil.rmtree(place)
    sweeps = report["sweeps"]
    report["kills"] = sum(sweep["kills"] for sweep in sweeps)
    report["killed_while"] = dict(sum((Counter(sweep["killed_while"]) for sweep in sweeps), Counter()))
    report["resumed_within_an_epoch"] = sum(sweep["resumed_within_an_epoch"] for sweep in sweeps)
    report["students_compared"] = STUDENTS * len(sweeps)
    report["students_equal"] = sum(sweep["equal"] for sweep in sweeps)
    report["failures_said"] = sum(sweep["failures_said"] for sweep in sweeps)
    report["seconds"] = round(time.perf_counter() - started)
    facts = environment(torch.device("cpu"))
    # Neither a path nor a name of this machine, in a file that is to be shared; the command stands above.
    report["environment"] = {name: fact for name, fact in facts.items() if name not in ("package", "host", "command")}
    print(json.dumps({key: value for key, value in report.items() if key not in ("sweeps", "variants")}, indent=2))
    if options.output is not None:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(options.output, report)
    return 0 if report["students_equal"] == report["students_compared"] and report["failures_said"] == 0 else 1


@dataclass
class Disturbed:
    """What happened to one sweep.

    kills, starts: how often it was killed and started.
    killed_while: what the runs were at when it was: of each kill the states of their directories.
    resumed_within_an_epoch: how often a student went on from the middle of an epoch.
    failures_said: commands that ended by themselves with another exit code than 0.
    equal: students that are, bit by bit, those of the undisturbed sweep.
    """

    kills: int = 0
    starts: int = 0
    killed_while: dict[str, int] | None = None
    resumed_within_an_epoch: int = 0
    failures_said: int = 0
    equal: int = 0


def _disturbed(place: Path, more: Sequence[str], seconds: float, moments: random.Random, most: int) -> Disturbed:
    """Kill a sweep at random moments until it is done, at most so many times."""
    sweep, states = Disturbed(), Counter()
    while True:
        child = _start(place, more)
        sweep.starts += 1
        # Mostly a fraction of the whole, so that a sweep takes many kills; now and then a long one.
        moment = moments.uniform(0.0, seconds * moments.choice((0.3, 0.6, 1.2)))
        try:
            code = _wait(child, timeout=moment if sweep.kills < most else None)
        except TimeoutError:
            states[_state(place)] += 1
            os.kill(child, signal.SIGKILL)
            _wait(child)
            sweep.kills += 1
            continue
        if code == 0:
            break
        sweep.failures_said += 1
        if sweep.failures_said > 3:
            raise RuntimeError(f"the sweep ended with {code}: {(place / 'said').read_text()[-4000:]}")
    logs = [path.read_text() for path in place.glob("runs/*/*/*/train.log")]
    sweep.resumed_within_an_epoch = sum(
        "going on after step" in line and "after step 0 " not in line for log in logs for line in log.splitlines()
    )
    sweep.killed_while = dict(states)
    return sweep


def _place(root: Path, name: str) -> Path:
    """A folder for a sweep, with the teacher of the sweep before in it."""
    place = root / name
    place.mkdir()
    teachers = root / "undisturbed-0" / "runs" / "teachers"
    if teachers.exists() and name.startswith("disturbed") and int(name.split("-")[1]) % 3:
        # In every third sweep the teacher's training is disturbed too.
        shutil.copytree(teachers, place / "runs" / "teachers")
    return place


def _start(place: Path, more: Sequence[str]) -> int:
    """Fork a process that runs the sweep's command in `place`; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(place)
        with (place / "said").open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = vkd.train.main([*SWEEP, *more])
    finally:
        os._exit(code)


def _wait(child: int, timeout: float | None = None) -> int:
    """The exit code of a child, negative for a signal. Raises TimeoutError where it goes on for longer."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        found, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(0.002)


def _runs(place: Path) -> Iterator[Path]:
    """The directories of the students that there are."""
    yield from sorted(place.glob("runs/digits/*/*"))


def _state(place: Path) -> str:
    """What a sweep is at, in words."""
    states = Counter()
    for run in _runs(place):
        try:
            states[json.loads((run / "status.json").read_text())["state"]] += 1
        except (OSError, ValueError, KeyError):
            states["new"] += 1
    if not states:
        return "before the students"
    return "students training" if states["running"] + states["new"] else "between students"


def _students(place: Path) -> dict[str, str]:
    """Of each finished student a hash of its weights and of all that it has recorded but the clock."""
    students = {}
    for run in _runs(place):
        if not (run / "result.json").exists():
            continue
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(run / "student.safetensors").items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if key not in TIMED} for line in history]
        result = json.loads((run / "result.json").read_text())
        kept.append({key: value for key, value in result.items() if key not in ("timing", "environment")})
        digest.update(json.dumps(kept, sort_keys=True).encode())
        students[run.name] = digest.hexdigest()
    return students


if __name__ == "__main__":
    sys.exit(main())
