"""The analysis of recorded runs: their students, teacher and images opened again, and what is found of them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch
from omegaconf import OmegaConf
from torch import Tensor

from vkd.analysis import (
    STATISTICS,
    as_alpha_beta,
    class_groups,
    divergence_gradient,
    image_statistics,
    log_mass_ratio,
    log_softmax,
)
from vkd.composition import compose_config
from vkd.config import Config, fingerprint, parse, run_identity
from vkd.data import Data, Normalization, load_data
from vkd.divergences import Divergence, make_divergence
from vkd.errors import ConfigError, ModelError, UserError, require
from vkd.evaluate import MOST_PIXELS
from vkd.models import create_model, load_into, load_weights, weights_sha256
from vkd.records.alpha_beta import OWN_POINTS
from vkd.records.foreign import confined, read_foreign_config
from vkd.records.grouping import Row, Table, protocol_of
from vkd.records.reading import Run, clean, number
from vkd.records.run_directory import RunDirectory
from vkd.records.statistics import summarise
from vkd.training.assembly import OpenedTeacher, open_given
from vkd.training.environment import choose_device
from vkd.training.measurement import evaluation_mode
from vkd.training.run import directory_of, teacher_training_config
from vkd.training.teacher import Teacher, open_untrained

logger = logging.getLogger("vkd")

FKLD, RKLD, AB = "FKLD", "RKLD", "AB"
"""What a study compares: forward KL, reverse KL, and the point of the alpha-beta divergence that val/top1 chose, or the
best of the others where that is one of these two."""

MOST_EPOCHS = 16
"""Snapshots of a run that the analysis of a study looks at; of more, as many that lie evenly."""

_IMAGES_TOGETHER = 20
"""Images that follow one another in a sample of a split."""
_BLOCK = 2**19
"""Logits whose statistics are computed at once."""
_BINS = 12
"""Of q, in which the classes of all images are counted."""
_FEWEST_IN_BIN = 50
_SHAPES = ("divergence.name", "divergence.alpha", "divergence.beta", "divergence.match_kl_scale")
_SETTINGS = ("method.", "divergence.", "cross_entropy_weight")


@dataclass(frozen=True)
class Request:
    """How runs are to be looked at.

    split: val, train or test; None: val, and train where there is no val.
    images: how many of it, spread evenly over its order.
    rate: eta / T^2 of the steps.
    device: as in `vkd.train`.
    data_root, teacher_checkpoint: where data and the teacher's weights are; None: where the runs' configs say.
    fetch: whether the configs may decide what is downloaded.
    """

    split: str | None = None
    images: int = 1000
    rate: float = 0.1
    device: str = "auto"
    data_root: str | None = None
    teacher_checkpoint: str | None = None
    fetch: bool = False


@dataclass(frozen=True)
class _Images:
    """Some images of one split: uint8 [N, channels, height, width] on the device, and their labels [N] on the CPU."""

    data: Data
    split: str
    pixels: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Scene:
    """What the students of one teacher are looked at with.

    config: of the run that was opened.
    divergence: its own; None for plain training.
    teacher_logits: of the images, [N, C] on the CPU; None for plain training.
    """

    config: Config
    images: _Images
    divergence: Divergence | None
    teacher_logits: Tensor | None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images.targets)


@dataclass
class Workbench:
    """Opens what runs name, each data set and each teacher once as long as they follow one another."""

    request: Request
    _kept: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def scene(self, folder: Path, run: Run) -> Scene:
        """The images of a finished run, its divergence and its teacher's logits. Raises UserError."""
        config = _config(folder, run, self.request)
        hint = f"fetch=true, if {folder} may decide what is downloaded"
        with nullcontext() if self.request.fetch else confined(hint):
            device = choose_device(self.request.device)
            wanted = (dataclasses.asdict(config.dataset), config.data_root)
            images = self._keep("images", wanted, lambda: _open_images(config, device, self.request))
            if config.is_plain:
                return Scene(config, images, None, None)
            worlds = number(run.parameters.get("world_size"))
            sha256 = run.teacher_fact("sha256")
            wanted = (*wanted, dataclasses.asdict(config.teacher), config.runs_root, worlds, sha256)
            logits = self._keep(
                "teacher", wanted, lambda: _teacher_logits(config, images, max(1, int(worlds or 1)), sha256)
            )
        return Scene(config, images, make_divergence(**config.divergence), logits)

    def _keep(self, what: str, wanted: Any, make: Callable[[], Any]) -> Any:
        if what not in self._kept or self._kept[what][0] != repr(wanted):
            self._kept.pop(what, None)
            self._kept[what] = (repr(wanted), make())
        return self._kept[what][1]


@cache
def _usual_values() -> dict[str, Any]:
    """What a config has that says nothing; composing it takes longer than reading a run."""
    return OmegaConf.to_container(compose_config([]))


def _config(folder: Path, run: Run, request: Request) -> Config:
    """The config of a run, checked as a whole, and against the result that stands beside it. Raises ConfigError."""
    values = copy.deepcopy(_usual_values())
    recorded = read_foreign_config(folder)
    names = ["dataset", "student", "teacher", "method", "divergence", "cross_entropy_weight", "recipe", "precision"]
    names += ["data_root", "evaluation_batch_size"]
    values.update({name: recorded[name] for name in names if name in recorded})
    # runs_root/study/pair/run: a run may have been moved together with its teacher.
    above = list(folder.resolve().parents)
    values["runs_root"] = str(above[min(2, len(above) - 1)])
    if request.data_root is not None:
        values["data_root"] = request.data_root
    if request.teacher_checkpoint is not None and values.get("teacher"):
        values["teacher"] = {**values["teacher"], "checkpoint": request.teacher_checkpoint, "pretrained": False}
    config = parse(values)
    found = {"student.arch": (config.student.arch, run.student), "dataset.name": (config.dataset.name, run.dataset)}
    if not config.is_plain:
        found["teacher.arch"] = (config.teacher.arch, run.teacher)
        found["divergence.name"] = (config.divergence.get("name", ""), run.divergence)
        for name in ("alpha", "beta"):
            found[f"divergence.{name}"] = (number(config.divergence.get(name)), getattr(run, name))
    for name, (said, recorded_value) in found.items():
        require(
            said == recorded_value,
            f"{folder}: config.yaml has {name}={said}, and result.json {recorded_value}",
            "the files of one run",
        )
    side = max(config.dataset.image_size or 1, (config.teacher and config.teacher.image_size) or 1)
    require(
        max(config.evaluation_batch_size, request.images) * side**2 <= MOST_PIXELS,
        f"{folder} asks for {request.images:,} images, {config.evaluation_batch_size:,} at a time, of "
        f"{side:,}x{side:,} pixels",
        f"at most {MOST_PIXELS:,} pixels",
        "images=100",
    )
    return config


def _open_images(config: Config, device: torch.device, request: Request) -> _Images:
    data = load_data(config.dataset, config.data_root, device=device, workers=0)
    for note in data.notes:
        logger.info("%s", note)
    split = request.split or ("val" if "val" in data.splits_present else "train")
    if split not in data.splits_present:
        there = sorted(data.splits_present)
        raise ConfigError(
            f"split={split} is not there",
            expected=", ".join(there),
            hint=" or ".join(f"split={name}" for name in there),
        )
    count = min(request.images, data.sizes[split])
    groups = -(-count // _IMAGES_TOGETHER)
    pixels, targets = [], []
    # From evenly spaced places, since the files of a folder are in the order of their classes.
    for group in range(groups):
        batch = next(iter(data.eval_batches(split, batch_size=_IMAGES_TOGETHER, part=(group, groups))))
        pixels.append(batch.images)
        targets.append(batch.targets.cpu())
    return _Images(data, split, torch.cat(pixels)[:count], torch.cat(targets)[:count])


def _teacher_logits(config: Config, images: _Images, world_size: int, sha256: Any) -> Tensor:
    """The teacher's logits of the images [N, C]. Raises UserError where its weights are not there, or are others."""
    data = images.data
    opened = _open_teacher(config, data, world_size)
    if isinstance(sha256, str) and opened.sha256 != sha256:
        raise ModelError(
            f"the weights of the teacher {config.teacher.arch} that are there are not those that the run learnt from",
            expected=f"weights with the sha256 {sha256[:8]}..., not {opened.sha256[:8]}...",
            hint="teacher.checkpoint=FILE, with the file that the run was given",
        )
    teacher: Teacher = opened.freeze(config, data, images.pixels.device, measure=False)
    return _logits(teacher.model, teacher.normalization, images, config.evaluation_batch_size)


def _open_teacher(config: Config, data: Data, world_size: int) -> OpenedTeacher:
    teacher = config.teacher
    if teacher.is_given:
        if teacher.checkpoint is None or Path(teacher.checkpoint).is_file():
            return open_given(config, data)
        missing = f"there is no {teacher.checkpoint}, seen from {Path.cwd()}"
    else:
        own = teacher_training_config(config)
        identity = run_identity(own, data=data.identity, teacher=None, world_size=world_size)
        directory = directory_of(own, fingerprint(identity))
        if directory.is_done(with_weights=True):
            model = open_untrained(config, data)
            load_into(model, load_weights(directory.weights), arch=teacher.arch, source=str(directory.weights))
            return OpenedTeacher(model, weights_sha256(model.state_dict()), source="trained", saw_val=False)
        missing = f"there is no {directory.path}"
    raise ModelError(
        f"the teacher's weights are not there: {missing}",
        expected="the teacher that the run learnt from, since a divergence is of two networks",
        hint="teacher.checkpoint=FILE",
    )


def _logits(model: torch.nn.Module, normalization: Normalization, images: _Images, batch_size: int) -> Tensor:
    """Logits [N, C] on the CPU."""
    with evaluation_mode(model):
        parts = [model(normalization(pixels)).float().cpu() for pixels in images.pixels.split(batch_size)]
    return torch.cat(parts)


def student_files(folder: Path, config: Config) -> dict[int, Path]:
    """The students of a run by the number of epochs behind them: its snapshots, and the one after the last epoch."""
    directory = RunDirectory(folder)
    files = {epoch: path for epoch, path in directory.snapshots().items() if epoch < config.recipe.epochs}
    return {**files, config.recipe.epochs: directory.weights}


def student_logits(scene: Scene, file: Path, run: Run) -> Tensor:
    """The logits [N, C] of a student of `run` in `file`. Raises ModelError where it is damaged or another run's."""
    weights = load_weights(file)
    try:
        with safetensors.safe_open(file, "pt") as opened:
            owner = (opened.metadata() or {}).get("fingerprint")
    except safetensors.SafetensorError as error:
        raise ModelError(f"{file} is no safetensors file: {error}", expected="the file that the run wrote") from error
    if owner not in (None, run.fingerprint):
        raise ModelError(f"{file} holds a student of another run", expected=f"one of the run {run.fingerprint[:8]}")
    data, arch = scene.images.data, scene.config.student.arch
    model = create_model(
        arch, num_classes=data.num_classes, in_channels=data.channels, image_size=data.image_size, seed=0
    )
    load_into(model, weights, arch=arch, source=str(file))
    device = scene.images.pixels.device
    normalization = Normalization(data.mean, data.std, data.channels).to(device)
    return _logits(model.to(device), normalization, scene.images, scene.config.evaluation_batch_size)


# One run


def analyze_run(
    folder: Path, run: Run, workbench: Workbench, *, last_only: bool = False, most_epochs: int | None = None
) -> dict[str, Any]:
    """The analysis of a finished run, as `analysis.json` has it.

    Args:
        folder: of the run, which somebody else may have written.
        run: what was read there.
        workbench: with what was asked for.
        last_only: look at the student after the last epoch alone.
        most_epochs: how many students to look at at most; None: all.

    Raises UserError: plain training, a method without a divergence, data or a teacher that are not there, damaged
    weights.
    """
    require(
        not run.plain,
        f"{folder} learnt from the labels alone, so that there is no teacher to compare it with",
        "the run of a student with a teacher",
    )
    if not run.divergence:
        raise ConfigError(
            f"the method {run.method} of {folder} has no divergence, so that there is no mass ratio of it to look at",
            expected="a method that compares distributions, such as kd",
        )
    scene = workbench.scene(folder, run)
    files = student_files(folder, scene.config)
    notes = _notes(run, scene, files)
    if last_only:
        files = {epoch: files[epoch] for epoch in list(files)[-1:]}
    elif most_epochs is not None and len(files) > most_epochs:
        every = list(files)
        places = sorted({round(place * (len(every) - 1) / (most_epochs - 1)) for place in range(most_epochs)})
        notes.append(f"{len(places)} of {len(every)} students are looked at")
        files = {every[place]: files[every[place]] for place in places}
    divergence, rate = scene.divergence, workbench.request.rate
    epochs, logits = [], None
    for epoch, file in files.items():
        logits = student_logits(scene, file, run)
        epochs.append({"epoch": epoch, **_summary(divergence, logits, scene, rate)})
    return {
        "format": 1,
        "fingerprint": run.fingerprint,
        "dataset": run.dataset,
        "teacher": run.teacher,
        "student": run.student,
        "method": run.method,
        "divergence": {"name": divergence.name, "temperature": divergence.temperature, **divergence.parameters},
        "seed": run.seed,
        "split": scene.images.split,
        "images": scene.count,
        "rate": rate,
        "notes": notes,
        "epochs": epochs,
        "mass_by_rank": mass_by_rank(logits, scene.teacher_logits),
    }


def _notes(run: Run, scene: Scene, files: dict[int, Path]) -> list[str]:
    notes = []
    if run.method != "kd":
        notes.append(
            f"{run.method} applies {run.divergence} in its own way; here it is applied to the logits as they are"
        )
    if as_alpha_beta(scene.divergence, scene.images.data.num_classes) is None:
        notes.append(
            f"{run.divergence} is no alpha-beta divergence: its gradient is that of autograd, and hardness, confidence "
            "and the bound are left out"
        )
    if len(files) == 1:
        notes.append("there are no snapshots (snapshot_every=1 of vkd.train), so this is the last student alone")
    if scene.images.split == "train" and "val" not in scene.images.data.splits_present:
        notes.append("there is no val split, so these are training images, without augmentation")
    return notes


def _summary(divergence: Divergence, logits: Tensor, scene: Scene, rate: float) -> dict[str, Any]:
    """Mean, standard deviation and number of images of each statistic, and the largest ratio to the bound."""
    rows = max(1, _BLOCK // logits.shape[-1])
    blocks = zip(logits.split(rows), scene.teacher_logits.split(rows), scene.images.targets.split(rows), strict=True)
    found = [image_statistics(divergence, *block, rate=rate) for block in blocks]
    values = {name: torch.cat([block[name] for block in found]) for name in STATISTICS if name in found[0]}
    largest = float(values["bound"].max()) if "bound" in values else None
    summaries = {name: summarise(tensor[tensor.isfinite()].tolist()) for name, tensor in values.items()}
    return {
        "largest_ratio_to_bound": largest,
        "statistics": {name: entry and dataclasses.asdict(entry) for name, entry in summaries.items()},
    }


def mass_by_rank(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, list[float]]:
    """Mean probability at temperature 1 of each image's classes in the order of the teacher's: two lists of C."""
    p, q = log_softmax(teacher_logits).exp(), log_softmax(student_logits).exp()
    order = p.argsort(dim=-1, descending=True, stable=True)
    return {"teacher": p.gather(-1, order).mean(dim=0).tolist(), "student": q.gather(-1, order).mean(dim=0).tolist()}


# One step of several divergences


def compare_steps(
    divergences: dict[str, Divergence], student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, rate: float
) -> dict[str, Any]:
    """The log mass ratio of one step of each divergence from the same student.

    The first one has the rate eta = rate * T^2; the others have the rates at which the mean over images of the L1 norm
    of the step is the same, so that what differs is where the mass goes and not how much is moved.

    Args:
        divergences: by name, of one temperature.
        student_logits, teacher_logits: [B, C].
        targets: labels [B].
        rate: eta / T^2 of the first one.

    Returns for each name its rate, and the mean and the quartiles of LogR over images by the rank of a class at the
    teacher, and over classes and images by q, apart for those other than the label that are under- and over-estimated;
    q is at the temperature.
    """
    first = next(iter(divergences.values()))
    temperature = first.temperature
    q, p = log_softmax(student_logits, temperature).exp(), log_softmax(teacher_logits, temperature)
    order = p.argsort(dim=-1, descending=True, stable=True)
    groups = class_groups(student_logits, teacher_logits, targets, temperature=temperature)
    length, found = None, {}
    for name, divergence in divergences.items():
        gradient = divergence_gradient(divergence, student_logits.double(), teacher_logits.double())
        norm = float(gradient.abs().sum(dim=-1).mean())
        length = rate * temperature**2 * norm if length is None else length
        eta = length / norm if norm > 0.0 else 0.0
        ratio = log_mass_ratio(student_logits, gradient, rate=eta, temperature=temperature).total
        by_rank = _band(ratio.gather(-1, order).unbind(dim=-1))
        found[name] = {
            "rate": eta,
            "by_rank": {"rank": list(range(1, ratio.shape[-1] + 1)), **by_rank},
            "under": _by_q(q, ratio, groups.under),
            "over": _by_q(q, ratio, groups.over),
        }
    return {"temperature": temperature, "steps": found}


def _by_q(q: Tensor, ratio: Tensor, members: Tensor) -> dict[str, list[float]]:
    """Mean and quartiles of the log mass ratio of the classes of a group in bins of q that are equally full."""
    q, ratio = q[members], ratio[members]
    bins = min(_BINS, len(q) // _FEWEST_IN_BIN)
    parts = q.argsort(stable=True).tensor_split(bins) if bins else []
    centres = [float(q[part].log().mean().exp()) for part in parts]
    return {"q": centres, **_band([ratio[part] for part in parts])}


def _band(parts: Iterable[Tensor]) -> dict[str, list[float]]:
    """Mean, quartiles and number of the values of each part."""
    parts = list(parts)
    places = torch.tensor([0.25, 0.75], dtype=torch.float64)
    # It takes no more than 2^24 values.
    quartiles = [torch.quantile(part[:: -(-len(part) // 2**20)], places).tolist() for part in parts]
    return {
        "mean": [float(part.mean()) for part in parts],
        "low": [low for low, _ in quartiles],
        "high": [high for _, high in quartiles],
        "n": [len(part) for part in parts],
    }


# A study


@dataclass
class Family:
    """The rows of one column, method and protocol that are compared.

    rows: by what they stand for, `FKLD`, `RKLD` and `AB`, as far as they are there.
    points: all rows of the alpha-beta divergence.
    plain: the row of plain students; None without one.
    notes: what a reader must know.
    """

    index: int
    method: str
    rows: dict[str, Row] = field(default_factory=dict)
    points: list[Row] = field(default_factory=list)
    plain: Row | None = None
    notes: list[str] = field(default_factory=list)


def families_of(table: Table) -> list[Family]:
    """What there is to compare in a table, column by column; the point of a grid is the one that the table chose.

    Where that is forward or reverse KL itself, it is the best of the others by the same val/top1.
    """
    found = []
    for index in range(len(table.columns)):
        rows = [row for row in table.rows if row.cells[index].group is not None and row.cells[index].group.runs]
        kinds: dict[tuple, list[Row]] = {}
        for row in rows:
            if row.key.divergence in ("fkld", "rkld", "abkd"):
                kinds.setdefault((row.key.method, protocol_of(row.cells[index].group)), []).append(row)
        for (method, _), members in kinds.items():
            family = Family(index, method, points=[row for row in members if row.key.divergence == "abkd"])
            _fill(family, members)
            whole = protocol_of(members[0].cells[index].group, teacher=False)
            plain = [row for row in rows if row.key.method == "none"]
            plain = [row for row in plain if protocol_of(row.cells[index].group, teacher=False) == whole]
            family.plain = plain[0] if plain else None
            found.append(family)
    return found


def _fill(family: Family, members: list[Row]) -> None:
    """Choose the rows that a family compares."""
    cells = {id(row): row.cells[family.index] for row in members}
    chosen = [row for row in family.points if cells[id(row)].chosen]
    if not chosen and len(family.points) == 1:
        chosen = family.points
        family.notes.append(f"{chosen[0].label} is the only point of the alpha-beta divergence")
    elif not chosen and family.points:
        family.notes.append("no point of the alpha-beta divergence is chosen, since none has a val/top1")
    if chosen and (chosen[0].key.alpha, chosen[0].key.beta) in OWN_POINTS.values():
        others = [row for row in family.points if (row.key.alpha, row.key.beta) not in OWN_POINTS.values()]
        others = [row for row in others if cells[id(row)].val is not None and cells[id(row)].chosen is not None]
        if others:
            best = max(others, key=lambda row: round(cells[id(row)].val.mean, 9))
            kind = "forward KL" if (chosen[0].key.alpha, chosen[0].key.beta) == OWN_POINTS["fkld"] else "reverse KL"
            family.notes.append(
                f"val/top1 chose {chosen[0].label}, which is {kind} itself; AB is {best.label}, which has the best "
                "val/top1 of the others"
            )
            chosen = [best]
    wanted = _settings(chosen[0], family.index) if chosen else None
    for name, (divergence, point) in zip((FKLD, RKLD), OWN_POINTS.items(), strict=True):
        own = [row for row in members if row.key.divergence == divergence]
        same = [row for row in family.points if (row.key.alpha, row.key.beta) == point]
        fitting = [row for row in own + same if wanted is None or _settings(row, family.index) == wanted]
        if fitting:
            family.rows[name] = fitting[0]
        elif own:
            family.notes.append(f"{name} is left out: its runs have other settings than {chosen[0].label}")
    if chosen:
        family.rows[AB] = chosen[0]


def _settings(row: Row, index: int) -> frozenset[tuple[str, Any]]:
    """Settings of method and divergence but for the divergence's shape."""
    parameters = row.cells[index].group.set_parameters
    return frozenset((k, v) for k, v in parameters if k.startswith(_SETTINGS) and k not in _SHAPES)


def analyze_study(table: Table, runs_root: Path, request: Request) -> dict[str, Any]:
    """The analysis of a study, as its `analysis.json` has it. Raises UserError where there is nothing to analyse.

    Of FKLD, RKLD and the chosen AB point every snapshot, of the other points the student after the last epoch, and one
    step of each from the same student. Runs that differ in their seed alone are averaged.
    """
    workbench = Workbench(request)
    families = families_of(table)
    if not families:
        raise ConfigError(
            f"the study {table.study} has no finished run of fkld, rkld or abkd",
            expected="runs of a method that compares distributions",
            hint="run=DIRECTORY, for the run of another divergence",
        )
    grids = [_analyze_family(family, table, runs_root, workbench) for family in families]
    return {"format": 1, "study": table.study, "command": table.command, "rate": request.rate, "grids": grids}


def _analyze_family(family: Family, table: Table, runs_root: Path, workbench: Workbench) -> dict[str, Any]:
    column, notes = table.columns[family.index], list(family.notes)
    roles = {id(row): name for name, row in reversed(family.rows.items())}
    rows, said = [], {}
    compared = [row for row in table.rows if id(row) in roles]
    others = [row for row in family.points if id(row) not in roles]
    failure: UserError | None = None
    for row in compared + others:
        logger.info("%s: %s", column.title, row.label)
        is_compared = id(row) in roles
        analyses = {}
        for seed, run in sorted(row.cells[family.index].group.runs.items()):
            try:
                found = analyze_run(
                    Path(runs_root, run.path), run, workbench, last_only=not is_compared, most_epochs=MOST_EPOCHS
                )
            except UserError as error:
                failure = failure or error
                notes.append(_left_out(run, error, runs_root))
                continue
            analyses[seed] = said = found
            notes += found["notes"] if is_compared else []
        if analyses:
            names = [name for name, other in family.rows.items() if other is row]
            rows.append(_average(row, names, row.cells[family.index].group.runs, analyses))
    if not said and failure is not None:
        raise failure
    return {
        "title": column.title,
        "dataset": column.dataset,
        "teacher": column.teacher,
        "student": column.student,
        "method": family.method,
        "split": said["split"],
        "images": said["images"],
        "rows": rows,
        "step": _analyze_step(family, runs_root, workbench, notes),
        "notes": list(dict.fromkeys(notes)),
    }


def _left_out(run: Run, error: UserError, runs_root: Path) -> str:
    """Why a run is not in the analysis, without where the runs lie on this machine."""
    return f"{run.path} is left out: {clean(error.problem.replace(f'{runs_root}/', ''))}"


def _average(row: Row, names: list[str], runs: dict[int, Run], analyses: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of what was found of each; the largest ratio to the bound is the largest of all."""
    first = next(iter(analyses.values()))
    epochs = []
    for epoch in sorted({entry["epoch"] for found in analyses.values() for entry in found["epochs"]}):
        entries = [entry for found in analyses.values() for entry in found["epochs"] if entry["epoch"] == epoch]
        statistics = {}
        for name in STATISTICS:
            means = [entry["statistics"][name]["mean"] for entry in entries if entry["statistics"].get(name)]
            statistics[name] = dataclasses.asdict(summarise(means)) if means else None
        ratios = [entry["largest_ratio_to_bound"] for entry in entries]
        largest = None if None in ratios else max(ratios)
        epochs.append({"epoch": epoch, "largest_ratio_to_bound": largest, "statistics": statistics})
    ranks = {
        who: [math.fsum(values) / len(values) for values in zip(*lists, strict=True)]
        for who in ("teacher", "student")
        if (lists := [found["mass_by_rank"][who] for found in analyses.values()])
    }
    return {
        "label": row.label,
        "stands_for": names,
        "divergence": first["divergence"],
        "seeds": sorted(analyses),
        "runs": [run.fingerprint for seed, run in sorted(runs.items()) if seed in analyses],
        "epochs": epochs,
        "mass_by_rank": ranks,
    }


def _analyze_step(family: Family, runs_root: Path, workbench: Workbench, notes: list[str]) -> dict[str, Any] | None:
    """One step of each divergence from the same student, one that is neutral where there is a plain one."""
    for row, name in _starts(family):
        seed, run = min(row.cells[family.index].group.runs.items())
        taught = next(iter(family.rows.values())) if row is family.plain else row
        _, with_teacher = min(taught.cells[family.index].group.runs.items())
        try:
            scene = workbench.scene(Path(runs_root, with_teacher.path), with_teacher)
            own = workbench.scene(Path(runs_root, run.path), run)
            files = student_files(Path(runs_root, run.path), own.config)
            epoch = min((epoch for epoch in files if epoch > 0), default=max(files))
            logits = student_logits(own, files[epoch], run)
        except UserError as error:
            notes.append(_left_out(run, error, runs_root))
            continue
        temperature = scene.divergence.temperature
        divergences = {
            FKLD: make_divergence("fkld", temperature=temperature),
            RKLD: make_divergence("rkld", temperature=temperature),
        }
        if AB in family.rows:
            _, chosen = min(family.rows[AB].cells[family.index].group.runs.items())
            divergences[AB] = workbench.scene(Path(runs_root, chosen.path), chosen).divergence
        targets, rate = scene.images.targets, workbench.request.rate
        steps = compare_steps(divergences, logits, scene.teacher_logits, targets, rate=rate)
        return {"from": name, "seed": seed, "epoch": epoch, "images": scene.count, **steps}
    return None


def _starts(family: Family) -> Iterator[tuple[Row, str]]:
    """Rows whose student a step may be taken from, the first that is there is taken; and what they are called."""
    if family.plain is not None and family.rows:
        yield family.plain, "plain student"
    for name in (AB, FKLD, RKLD):
        if name in family.rows:
            yield family.rows[name], family.rows[name].label
