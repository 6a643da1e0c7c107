"""A student as a file in a format of others: written, opened again by its own reader, compared, put in place."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from omegaconf import OmegaConf
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

import vkd
from vkd.composition import compose_config
from vkd.config import Config, parse
from vkd.data import Data, Normalization, load_data
from vkd.errors import ConfigError, DataError, ModelError, UserError, require
from vkd.evaluate import MOST_PIXELS
from vkd.models import create_model, load_into, load_weights, save_weights
from vkd.records.atomic import write_json_atomically, write_text_atomically
from vkd.records.foreign import confined, read_foreign_config
from vkd.records.model_card import Exported, model_card, seeds_of
from vkd.records.reading import Run, number
from vkd.records.run_directory import RunDirectory

logger = logging.getLogger("vkd")

IMAGES = 8
"""How many images an exported file is checked with."""
SIDES = {"cifar10": 32, "cifar100": 32, "svhn": 32, "fashion_mnist": 28, "stl10": 96}
"""In pixels, of data sets whose images all have one size, which their configs need not say."""
MANIFEST = "export.json"
"""What an export says of itself: a folder with it, and with no file that it does not name, may be replaced."""

_MOST_IN_ONE_FILE = 2**30
"""Bytes of weights in `model.onnx`; what is larger lies beside it, since a protobuf ends at 2 GiB."""
_MOST_MANIFEST_BYTES = 2**16


@dataclass(frozen=True)
class Student:
    """A trained student and what its users must know.

    model: on the CPU, evaluating.
    arch: its timm name.
    num_classes, channels, image_size: image_size is (height, width).
    mean, std: normalisation of pixels in [0, 1], a value a channel.
    images: normalised, float32 [N, channels, height, width].
    images_are: what they are, in words.
    class_names: of the classes in their order; None where they are not known.
    crop_fraction: share of the resized image that the centre crop keeps; None where images have one size anyway.
    interpolation: how images are resized, by torchvision's name.
    """

    model: nn.Module
    arch: str
    num_classes: int
    channels: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    images: Tensor
    images_are: str
    class_names: list[str] | None
    crop_fraction: float | None
    interpolation: str

    @property
    def is_own(self) -> bool:
        """Whether vkd brings the network."""
        return model_entrypoint(timm.models.split_model_name_tag(self.arch)[0]).__module__.startswith("vkd.")

    @property
    def resized(self) -> str:
        """How images of other sizes are brought to the network's, as a sentence; empty where there are none."""
        if self.crop_fraction is None:
            return ""
        side = round(self.image_size[0] / self.crop_fraction)
        return (
            f"Images of other sizes: resize the shorter side to {side} ({self.interpolation}), and cut out the centre."
        )


@dataclass(frozen=True)
class Format:
    """How a student is written, and how what was written is opened again.

    write: writes into a folder.
    open: the network in the folder, as a function of normalised images.
    tolerance: how far its logits may be off, as a share of the largest logit.
    packages: whose versions matter.
    """

    write: Callable[[Student, Path], None]
    open: Callable[[Path], Callable[[Tensor], Tensor]]
    tolerance: float
    packages: tuple[str, ...]


def export_student(
    folder: Path, run: Run, *, format: str, output: str | Path, overwrite: bool = False, data_root: str | None = None
) -> Path:
    """Make the folder `output` with the student of a run in `format`, a model card and `export.json`.

    It appears whole and checked or not at all: the file is opened again before, and must give the student's logits.

    Args:
        folder: of the run, which somebody else may have written.
        run: what was read there; it is done.
        format: one of `FORMATS`.
        output: the folder; its parents are made.
        overwrite: replace an earlier export.
        data_root: where the data set is; None for where the config says.

    Returns the folder.

    Raises:
        ConfigError: `output` exists and may not be replaced, or the run's files contradict each other.
        ModelError: the weights are damaged, or the network cannot be exported without changing its logits.
        DataError: the data set is not there, and nothing else says how large its images are.
        OSError: the folder cannot be written.
    """
    output = Path(output).expanduser()
    target = output.absolute()  # not resolved: a link is not followed
    _check_target(output, overwrite)
    config = _config(folder, run, data_root)
    student = _open(folder, run, config)
    chosen = FORMATS[format]
    with _appearing(target) as made:
        difference = _write_checked(student, format, chosen, made)
        versions = {"vkd": vkd.__version__, **{name: metadata.version(name) for name in chosen.packages}}
        exported = Exported(
            format=format,
            files=tuple(sorted(path.name for path in made.iterdir())),
            arch=student.arch,
            is_own=student.is_own,
            num_classes=student.num_classes,
            channels=student.channels,
            image_size=student.image_size,
            mean=student.mean,
            std=student.std,
            resized=student.resized,
            checked=student.images_are,
            difference=difference,
            versions=versions,
        )
        write_text_atomically(made / "README.md", model_card(run, exported, seeds_of(folder, run)))
        manifest = {
            "format": 1,
            "export": format,
            "run": run.fingerprint,
            "files": [*exported.files, "README.md", MANIFEST],
            "checked": student.images_are,
            "largest_relative_difference": difference,
            "versions": versions,
        }
        write_json_atomically(made / MANIFEST, manifest)
    return output


def _config(folder: Path, run: Run, data_root: str | None) -> Config:
    """The run's config, checked as a whole; what it says of the data and the student is followed. Raises ConfigError.

    Where config and result name other things, the result's figures belong to another student.
    """
    values = OmegaConf.to_container(compose_config([]))
    recorded = read_foreign_config(folder)
    names = ["dataset", "student", "teacher", "method", "divergence", "cross_entropy_weight", "recipe", "precision"]
    values.update({name: recorded[name] for name in [*names, "data_root"] if name in recorded})
    if data_root is not None:
        values["data_root"] = data_root
    config = parse(values)
    found = {"student.arch": config.student.arch, "dataset.name": config.dataset.name}
    for name, said in (("student.arch", run.student), ("dataset.name", run.dataset)):
        require(
            found[name] == said,
            f"{folder}: config.yaml has {name}={found[name]}, and result.json {said}",
            "the files of one run",
        )
    side = config.dataset.image_size or 1
    require(
        IMAGES * side**2 <= MOST_PIXELS,
        f"{folder} asks for images of {side:,}x{side:,} pixels",
        f"at most {MOST_PIXELS:,} pixels in {IMAGES} images",
    )
    return config


def _open(folder: Path, run: Run, config: Config) -> Student:
    """The student, with a few normalised images. Raises UserError."""
    arch, dataset = config.student.arch, config.dataset
    file = RunDirectory(folder).weights
    weights = load_weights(file)
    _check_owner(file, run)
    data, why = _load_data(run, config)
    if data is not None:
        channels, image_size = data.channels, data.image_size
        normalization = Normalization(data.mean, data.std, channels)
        pixels = next(iter(data.eval_batches("test", batch_size=IMAGES))).images
        images, images_are = normalization(pixels), f"{len(pixels)} images of test"
        num_classes, names, is_resized = data.num_classes, data.class_names, data.loading == "streaming"
    else:
        logger.info("%s: checked with noise, and the names of the classes are left out", why)
        channels, image_size, num_classes = _shape(run, config, weights)
        normalization = Normalization(dataset.mean, dataset.std, channels)
        random = torch.Generator().manual_seed(0)
        images, images_are = torch.randn(IMAGES, channels, *image_size, generator=random), f"{IMAGES} images of noise"
        names, is_resized = None, dataset.image_size is not None
    with confined("look at who wrote this run before you use it"):
        model = create_model(arch, num_classes=num_classes, in_channels=channels, image_size=image_size, seed=0)
    load_into(model, weights, arch=arch, source=str(file))
    return Student(
        model=model.eval().requires_grad_(False),
        arch=arch,
        num_classes=num_classes,
        channels=channels,
        image_size=tuple(image_size),
        mean=normalization.mean,
        std=normalization.std,
        images=images,
        images_are=images_are,
        class_names=names,
        crop_fraction=dataset.crop_fraction if is_resized else None,
        interpolation=dataset.interpolation,
    )


def _check_owner(file: Path, run: Run) -> None:
    """Raise ConfigError where a file of weights says that it is another run's, ModelError where it says nothing."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            owner = (opened.metadata() or {}).get("fingerprint")
    except safetensors.SafetensorError as error:
        raise ModelError(f"{file} is no safetensors file: {error}", expected="the file that the run wrote") from error
    require(
        owner in (None, run.fingerprint),
        f"{file} holds the student of another run than result.json is of",
        f"the weights of the run {run.fingerprint[:8]}",
    )


def _load_data(run: Run, config: Config) -> tuple[Data | None, str]:
    """The run's data set, else None and why it is not to be had. Nothing is downloaded."""
    try:
        with confined("data_root=FOLDER, where it is"):
            data = load_data(config.dataset, config.data_root, device=torch.device("cpu"), workers=0)
    except (UserError, OSError) as error:
        return None, f"the data set {config.dataset.name} is not here ({str(error).splitlines()[0]})"
    recorded = run.content.get("dataset")
    if isinstance(recorded, dict) and recorded.get("identity") not in (None, data.identity):
        return None, f"the data set {config.dataset.name} that is here is not the one that the student learnt from"
    return data, ""


def _shape(run: Run, config: Config, weights: dict[str, Tensor]) -> tuple[int, tuple[int, int], int]:
    """Channels, (height, width) and number of classes, from everything but the data. Raises UserError."""
    side = config.dataset.image_size or SIDES.get(config.dataset.name)
    if side is None:
        raise DataError(
            f"the images of {config.dataset.name} are not here, and the run does not say how large they are",
            expected="the data set that the student learnt from",
            hint="data_root=FOLDER",
        )
    recorded = run.content.get("dataset")
    classes = number(recorded.get("classes")) if isinstance(recorded, dict) else None
    # A number without weights for it could ask for any amount of memory.
    if classes not in {tensor.shape[0] for tensor in weights.values() if tensor.ndim}:
        raise ConfigError(f"the weights of {run.student} are not those of as many classes as result.json says")
    cfg = get_pretrained_cfg(config.student.arch)
    stem = cfg.first_conv if cfg is not None and isinstance(cfg.first_conv, str) else ""
    first = weights.get(f"{stem}.weight")
    channels = 3 if first is None or first.ndim < 2 else first.shape[1]
    return channels, (side, side), int(classes)


def _write_checked(student: Student, name: str, chosen: Format, folder: Path) -> float:
    """Write a student and read it again; the largest relative difference of its logits. Raises ModelError.

    The images go through in two batches of different size, since the number of images must be free.
    """
    trouble = f"{student.arch} cannot be exported with format={name}"
    hint = " or ".join(f"format={other}" for other in FORMATS if other != name)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of exporters, about themselves
            chosen.write(student, folder)
            opened = chosen.open(folder)
            batches = (student.images[:1], student.images[1:]) if len(student.images) > 1 else (student.images,)
            expected = torch.cat([student.model(images) for images in batches])
            found = torch.cat([opened(images) for images in batches])
    except OSError:
        raise
    except Exception as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"{trouble}: {said}", hint=hint) from error
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= chosen.tolerance:  # nor NaN
        raise ModelError(
            f"{trouble}: opened again, its logits differ from the student's by {difference:.1e} of the largest",
            expected=f"at most {chosen.tolerance:.0e}",
            hint=hint,
        )
    return difference


# The formats


def _write_timm(student: Student, folder: Path) -> None:
    save_weights(student.model, folder / "model.safetensors", {"arch": student.arch})
    own = student.model.pretrained_cfg
    pretrained_cfg = {
        "custom_load": False,
        "input_size": [student.channels, *student.image_size],
        "fixed_input_size": bool(own.get("fixed_input_size", False)),
        "interpolation": student.interpolation,
        "crop_pct": 1.0 if student.crop_fraction is None else student.crop_fraction,
        "crop_mode": "center",
        "mean": student.mean,
        "std": student.std,
        "num_classes": student.num_classes,
        "pool_size": None,
        "first_conv": own.get("first_conv"),
        "classifier": own.get("classifier"),
    }
    config = {
        "architecture": timm.models.split_model_name_tag(student.arch)[0],
        "num_classes": student.num_classes,
        "num_features": student.model.num_features,
        **({} if student.class_names is None else {"label_names": student.class_names}),
        "pretrained_cfg": pretrained_cfg,
    }
    write_json_atomically(folder / "config.json", config)


def _open_timm(folder: Path) -> Callable[[Tensor], Tensor]:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _exported_program(student: Student) -> torch.export.ExportedProgram:
    """The network as a graph that takes any number of images, without a trace of this machine's folders."""
    images = torch.zeros(2, student.channels, *student.image_size)  # an example lies in the file, so it is no one's
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(student.model, (images,), dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _write_torch_export(student: Student, folder: Path) -> None:
    torch.export.save(_exported_program(student), folder / "model.pt2")


def _open_torch_export(folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / "model.pt2").module()


def _write_onnx(student: Student, folder: Path) -> None:
    program = torch.onnx.export(
        _exported_program(student),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of source code, with their paths
    size = sum(tensor.nbytes for tensor in student.model.state_dict().values())
    program.save(folder / "model.onnx", external_data=size > _MOST_IN_ONE_FILE)


def _open_onnx(folder: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMATS = {
    "timm": Format(_write_timm, _open_timm, 0.0, ("torch", "timm", "safetensors")),
    "onnx": Format(_write_onnx, _open_onnx, 1e-4, ("torch", "timm", "onnx", "onnxscript", "onnxruntime")),
    "torch_export": Format(_write_torch_export, _open_torch_export, 1e-4, ("torch", "timm")),
}


# The folder


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise ConfigError where `target` is there and may not be replaced."""
    if not os.path.lexists(target):
        return
    is_export = _is_export(target)
    if not (is_export and overwrite):
        raise ConfigError(
            f"output={target} is there already" + ("" if is_export else ", and is no folder of exported files alone"),
            expected="a folder that is not there yet, or an earlier export with overwrite=true",
            hint="overwrite=true" if is_export else "output=ANOTHER_FOLDER",
        )


def _is_export(folder: Path) -> bool:
    """Whether a folder was made by an export, and holds nothing else."""
    manifest = folder / MANIFEST
    if folder.is_symlink() or not manifest.is_file() or manifest.stat().st_size > _MOST_MANIFEST_BYTES:
        return False
    try:
        content: Any = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    files = content.get("files") if isinstance(content, dict) else None
    is_plain = all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
    return isinstance(files, list) and is_plain and all(path.name in files for path in folder.iterdir())


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill, which becomes `target` at the end: a new one, or in place of an earlier export.

    Where anything fails, what was there is there, and nothing new is left.
    """
    parents = [folder for folder in target.parents if not folder.exists()]
    unique = uuid.uuid4().hex
    made, earlier = (target.with_name(f".{target.name[:100]}.{unique}.{kind}") for kind in ("tmp", "old"))
    try:
        made.mkdir(parents=True)
        yield made
        for path in made.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if target.exists():
            target.rename(earlier)
        try:
            made.rename(target)
        except BaseException:
            if earlier.exists():
                earlier.rename(target)
            raise
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        for folder in parents:
            with suppress(OSError):
                folder.rmdir()
        raise
    if earlier.exists():
        for path in earlier.iterdir():
            path.unlink()
        earlier.rmdir()
