"""What the benchmark found, as one JSON file with everything that is needed to measure it again."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from vkd.config import Config, config_directory
from vkd.divergences import DIVERGENCES
from vkd.errors import ConfigError
from vkd.records.atomic import write_json_atomically
from vkd.speed import divergence_costs
from vkd.speed.alternation import Part, alternate, ratio
from vkd.speed.loops import LOOPS, Loops, as_measured
from vkd.speed.profile import measure_profile
from vkd.speed.startup import measure_startup
from vkd.training.environment import describe_device, environment, processor_name

if TYPE_CHECKING:
    from vkd.benchmark import BenchmarkConfig

logger = logging.getLogger("vkd")

RATIOS = {
    **{f"{name}/classic": (name, "classic") for name in LOOPS if name != "classic"},
    "run/bound": ("run", "bound"),
    "fused/run": ("fused", "run"),
    "plain/cached": ("plain", "cached"),
}
"""Which rates are divided by which. `plain/cached` is what a step with cached views costs of one without a teacher."""

OPTIONAL = ("cached", "fused")
"""What not every config has: left out, with the reason, unless it was asked for."""


def measure(own: BenchmarkConfig, config: Config, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Everything that the command measures.

    Args:
        own: its own keys.
        config: of the runs that it measures.
        folder: where files may lie as long as it measures.
        words: the command line.

    Returns:
        `pair`, `dataset`, `batch_size`, `precision`, `students`, `device`, `environment` and how it was measured;
        `images_per_second`: of every loop a list with a figure for each repetition, empty for one that was not
        measured, that of `fused` in student-images; `ratios` of them, median, least and most over the repetitions;
        `peak_memory_bytes`: of every loop what it holds between steps and what a step takes on top; `left_out`: what
        could not be measured, and why; `profile`, `divergences`, `startup_seconds`.

    Raises UserError for wrong input.
    """
    shapes = [divergence_costs.parse_shape(shape) for shape in own.shapes]
    config = as_measured(config, folder)
    loops = Loops(config, own.students)
    device = loops.device
    wanted = own.parts or [*LOOPS, "profile", "divergences", "startup"]
    report: dict[str, Any] = {
        "format": 1,
        "pair": pair_name(config),
        "teacher": {"arch": config.teacher.arch, "random_weights": loops.has_random_teacher},
        "student": {"arch": config.student.arch},
        "dataset": config.dataset.name,
        "batch_size": config.recipe.batch_size,
        "precision": config.precision,
        "students": own.students,
        "workers": config.workers,
        "method": config.method,
        "divergence": config.divergence or None,
        "device": describe_device(device),
        "environment": _environment(device, words),
        "repetitions": own.repetitions,
    }
    report.update(_measure_loops(own, loops, [name for name in LOOPS if name in wanted]))
    report["profile"], report["divergences"], report["startup_seconds"] = {}, [], {}
    if "profile" in wanted:
        logger.info("profiling the bound's step")
        report["profile"] = measure_profile(loops.bound(compiled=False), repetitions=own.repetitions)
    loops.close()
    del loops  # with all that they hold
    if "divergences" in wanted:
        fitting = [divergence_costs.fitting(shape, device) for shape in shapes]
        logger.info("measuring %d divergences at %s", len(list(DIVERGENCES)), ", ".join(map(str, fitting)))
        costs = divergence_costs.measure(configured_divergences(), fitting, device=device, repetitions=own.repetitions)
        report["divergences"] = [dataclasses.asdict(cost) for cost in costs]
    if "startup" in wanted:
        logger.info("starting vkd.train %d times", own.repetitions)
        try:
            report["startup_seconds"] = measure_startup(own.repetitions, [f"device={config.device}"])
        except RuntimeError as error:  # what was measured before is worth keeping
            report["left_out"]["startup"] = str(error)
    return report


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write a report to its file in `folder`, which is made if need be; the file's path."""
    name = f"{device_name(report)}_{report['pair']}_{report['precision']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / name, report)
    return folder / name


def pair_name(config: Config) -> str:
    """Teacher and student in a word: `resnet56_resnet20`."""
    return "_".join(arch.removeprefix("cifar_") for arch in (config.teacher.arch, config.student.arch))


def device_name(report: dict[str, Any]) -> str:
    """The hardware as a word that a file's name may hold: `nvidia_h100_80gb_hbm3`, `cpu_amd_epyc_2_threads`."""
    kind, _, described = report["device"].partition(" ")
    hardware = report["environment"]["hardware"]
    threads = f"{hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"
    words = f"cpu {hardware['processor']} {threads}" if kind == "cpu" else described or kind
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def _measure_loops(own: BenchmarkConfig, loops: Loops, names: Sequence[str]) -> dict[str, Any]:
    # The run first: its pace decides the number of steps. Then those that have its teacher; the cached one has another.
    order = sorted(names, key=["run", "fused", "bound", "plain", "classic", "cached"].index)
    parts: list[Part] = []
    left_out = {}
    for name in order:
        logger.info("making ready: %s", LOOPS[name])
        try:
            parts.append(loops.make(name))
        except (ConfigError, torch.OutOfMemoryError) as error:
            wrong_input = isinstance(error, ConfigError)
            if wrong_input and (own.parts is not None or name not in OPTIONAL):
                raise
            left_out[name] = error.problem if wrong_input else str(error).splitlines()[0]
            logger.info("left out: %s (%s)", name, left_out[name])
    figures: dict[str, list[float]] = {name: [] for name in LOOPS}
    # Workers have up to two batches ready each; behind that many steps the queue is as full as the loop keeps it.
    settling_steps = 2 * loops.config.workers + 2
    rates = None
    if parts:
        rates = alternate(
            parts,
            device=loops.device,
            repetitions=own.repetitions,
            steps=own.steps,
            seconds=own.seconds,
            settling_steps=settling_steps,
            on_progress=lambda said: logger.info("%s", said),
        )
        figures.update(rates.images_per_second)
    return {
        "steps": None if rates is None else rates.steps,
        "untimed_steps": settling_steps,
        "switches": loops.switches,
        "images_per_second": figures,
        "ratios": {
            name: None if spread is None else dataclasses.asdict(spread)
            for name, spread in ((name, ratio(figures, *pair)) for name, pair in RATIOS.items())
        },
        "peak_memory_bytes": {part.name: part.weigh(loops.device) for part in parts},
        "left_out": left_out,
    }


def configured_divergences() -> dict[str, dict[str, Any]]:
    """Every divergence with its parameters as its file in `conf/` has them."""
    found = {}
    for name in DIVERGENCES:
        values = OmegaConf.to_container(OmegaConf.load(config_directory() / "divergence" / f"{name}.yaml"))
        found[name] = {key: value for key, value in values.items() if key not in ("name", "temperature")}
    return found


def _environment(device: torch.device, words: Sequence[str]) -> dict[str, Any]:
    facts = environment(device)
    del facts["package"], facts["host"]  # of this machine, in a file that is to be shared
    facts["command"] = shlex.join(["python", "-m", "vkd.benchmark", *words])
    facts["hardware"] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    return facts


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
