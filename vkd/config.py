"""The typed schema of every key, the checks that span keys, and the fingerprint.

Hydra composes YAML; `parse` turns the result into a `Config`, in which every value has its type and every combination
is possible, or raises one `ConfigError`. The parameters of a divergence, a method or an augmentation are typed by its
own signature, so that a new one needs no change here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from vkd.errors import ConfigError, list_names, nearest, require

PRECISIONS = ("fp32", "bf16", "fp16")
TEACHER_CACHES = ("none", "views")
CACHE_DTYPES = ("float16", "float32")
TEACHERS_STUDY = "teachers"
"""The study that trained teachers are runs of."""

OPEN_KEYS = (
    "divergence",
    "dataset.augmentation",
    "dataset.view_augmentation",
    *(f"{recipe}.{name}_options" for recipe in ("recipe", "teacher.recipe") for name in ("optimizer", "scheduler")),
)
"""Keys below which others decide what may stand: a divergence's, an augmentation's or an optimizer's own signature."""


def config_directory() -> Path:
    """The absolute path of `conf/`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@dataclass
class DatasetConfig:
    """Where the pixels come from and how they are cut, split and augmented (`conf/dataset/`).

    name: the source, one of `vkd.data.sources`, or any name whose packed files lie in the data root.
    root: folder of an image folder data set; null where the data root is enough.
    mean, std: normalisation per channel, for pixels in [0, 1].
    val_fraction: share of train that is carved off, per class, for selection; 0 means no selection.
    train_fraction: share of the rest of train that is learnt from, per class, for studies with few images; by a teacher
        that vkd trains too.
    split_seed: seed of these splits; the same for every run, whatever its own seed.
    augmentation: name of each augmentation of the training images, in order, with its options.
    view_augmentation: augmentation of the further views of a training image, where a method asks for several.
    image_size: side in pixels to which images of a folder are cut; null for packed data, which keep theirs.
    crop_fraction: share of the resized image's side that the centre crop of evaluation keeps (image folders).
    interpolation: how images of a folder are resized.
    """

    name: str = MISSING
    root: str | None = None
    mean: list[float] = MISSING
    std: list[float] = MISSING
    val_fraction: float = 0.1
    train_fraction: float = 1.0
    split_seed: int = 0
    augmentation: dict[str, Any] = field(default_factory=dict)
    view_augmentation: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"


@dataclass
class RecipeConfig:
    """How a network is trained (`conf/recipe/`).

    epochs, batch_size: length of training; images a step.
    drop_last: leave out the last, smaller batch of an epoch.
    optimizer: any name of `timm.optim` (`momentum` is SGD with momentum, `sgd` adds Nesterov's).
    learning_rate, momentum, weight_decay: its usual settings.
    optimizer_options: further keyword arguments of that optimizer.
    decay_norm_and_bias: apply weight decay to biases and normalisation weights too, as the CIFAR literature does.
    scheduler: any name of `timm.scheduler`, stepped once an epoch, or `none`.
    milestones: epochs after which `multistep` multiplies the rate by decay_rate (150: epoch 151 is the first slower).
    decay_rate: that factor.
    warmup_epochs: epochs over which the rate rises to learning_rate.
    warmup_learning_rate: rate of the first of them; null: learning_rate / warmup_epochs.
    min_learning_rate: floor of the schedule.
    scheduler_options: further keyword arguments of `timm.scheduler.create_scheduler_v2`.
    clip_grad_norm: largest gradient norm; null for no clipping.
    ema_decay: decay of an exponential moving average of the weights, then what is evaluated and saved; null: none.
    label_smoothing: of the cross-entropy with the labels.
    evaluate_every: epochs between evaluations; the last epoch is always evaluated.
    """

    epochs: int = MISSING
    batch_size: int = MISSING
    drop_last: bool = False
    optimizer: str = MISSING
    learning_rate: float = MISSING
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    decay_norm_and_bias: bool = True
    scheduler: str = "none"
    milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    warmup_learning_rate: float | None = None
    min_learning_rate: float = 0.0
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    label_smoothing: float = 0.0
    evaluate_every: int = 1


@dataclass
class TeacherConfig:
    """The network that teaches.

    arch: any timm name.
    checkpoint: file with its weights (safetensors or torch); null for none.
    pretrained: take timm's pretrained weights.
    seed, recipe: how vkd trains it where neither is given.
    mean, std: its own input normalisation; null: that of its pretrained weights, else the data set's.
    image_size: side in pixels that its view is resized to; null: that of its pretrained weights, else the data's.
    allow_chance_accuracy: go on with a teacher that is no better than chance.
    fold: fold its BatchNorms into its convolutions, where that leaves its outputs alone.
    compile: compile its forward pass; null: where that was measured to pay (`vkd.training.switches`).
    cache: `views` keeps its logits for every view that crop and flip can make of an image, on disk, for all runs to
        come; `none` asks it anew each time.
    cache_dtype: float16, half the space, or float32, the logits to the last bit.
    """

    arch: str = MISSING
    checkpoint: str | None = None
    pretrained: bool = False
    seed: int = 0
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    allow_chance_accuracy: bool = False
    fold: bool = True
    compile: bool | None = None
    cache: str = "none"
    cache_dtype: str = "float16"

    @property
    def is_given(self) -> bool:
        """Whether its weights come from a file or from timm; otherwise vkd trains it."""
        return self.pretrained or self.checkpoint is not None


@dataclass
class StudentConfig:
    """The network that learns. arch: any timm name."""

    arch: str = MISSING


@dataclass
class TrackerConfig:
    """Who is told about a run beside its own directory (`conf/tracker/`).

    name: `none`, `offline` (W&B's offline files, nobody is contacted) or `wandb` (online when a key is configured).
    project, entity, tags: W&B's.
    log_student: log the weights of the finished student as a W&B artifact, named like the run directory.
    """

    name: str = "offline"
    project: str = "vkd"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    log_student: bool = False


@dataclass
class Config:
    """Everything that decides a run, and where it leaves its files.

    study: folder of the run under runs_root; null: the data set's name.
    seed: decides the student's weights, the order and augmentation of the data, dropout and the method's draws.
    device: `auto`, or a torch device such as `cpu` or `cuda:1`.
    precision: fp32, bf16 or fp16 (autocast; fp16 scales its gradients).
    teacher: null for plain training.
    method: name of each method with its parameters; empty for plain training.
    divergence: its name, temperature and own parameters; empty where no method uses one.
    cross_entropy_weight: weight of the cross-entropy with the labels; null: the one that the literature has beside the
        method, the largest of them in a sum; plain training always has 1.
    workers: processes that decode images of a folder.
    evaluation_batch_size: images a batch when measuring.
    compile, channels_last, fused_optimizer, graphs, keep_freed_memory: switches of speed that leave the results alone
        but for rounding: compile the student's forward pass, lay images out channels last, take the optimizer's fused
        implementation, capture the step in a CUDA graph, keep what the C library frees for the next step; null: where
        that was measured to pay (`vkd.training.switches`).
    students_at_once: how many students the fused launcher trains side by side at most; null: as many as memory holds.
    keep_checkpoint: leave the checkpoint in the directory of a finished run.
    checkpoint_minutes: time between checkpoints within an epoch, at whose end there is one anyway; null: none within.
    snapshot_every: epochs between copies of the student that are kept for `vkd.analyze`, the first one before training;
        null: the student after the last epoch alone.
    deterministic: take algorithms that give the same bits each time, slower ones too, as far as torch has them; where
        it has none, the run says so.
    sync_batch_norm: of a run on several processes: BatchNorm in training takes its statistics over the whole batch, as
        one process would; false: over each process's share.
    """

    study: str | None = None
    seed: int = 1
    device: str = "auto"
    precision: str = "fp32"
    runs_root: str = "runs"
    results_root: str = "results"
    data_root: str = "data"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    teacher: TeacherConfig | None = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    method: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] = field(default_factory=dict)
    cross_entropy_weight: float | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    workers: int = 2
    evaluation_batch_size: int = 250
    compile: bool | None = None
    channels_last: bool | None = None
    fused_optimizer: bool | None = None
    graphs: bool | None = None
    keep_freed_memory: bool | None = None
    students_at_once: int | None = None
    keep_checkpoint: bool = True
    checkpoint_minutes: float | None = 10.0
    snapshot_every: int | None = None
    deterministic: bool = False
    sync_batch_norm: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the student learns from the labels alone."""
        return not self.method

    def as_dict(self) -> dict[str, Any]:
        """The whole config as plain nested dicts, lists and numbers; what plain training leaves out is null."""
        values = dataclasses.asdict(self)
        values["divergence"] = values["divergence"] or None
        if self.is_plain:
            values["teacher"] = None
        return values


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[float]: "a list of numbers such as [0.5,0.5,0.5]",
    list[int]: "a list of whole numbers such as [150,180,210]",
    list[str]: "a list of texts",
    dict[str, Any]: "a mapping such as {key: value}",
}


def _type_words(annotation: Any) -> str:
    if annotation in _TYPE_WORDS:
        return _TYPE_WORDS[annotation]
    if dataclasses.is_dataclass(annotation):
        return "a group of keys: " + ", ".join(entry.name for entry in dataclasses.fields(annotation))
    members = typing.get_args(annotation)
    if type(None) in members:
        return " or ".join(_type_words(member) for member in members if member is not type(None)) + ", or null"
    return str(annotation)


def _annotation(schema: type, path: list[str]) -> Any:
    """The type of the key at `path` below a dataclass, or None where the path leaves it."""
    kind: Any = schema
    for part in path:
        if not dataclasses.is_dataclass(kind):
            return None
        kind = typing.get_type_hints(kind).get(part.split("[")[0])
        kind = next((member for member in typing.get_args(kind) if dataclasses.is_dataclass(member)), kind)
    return kind


def as_typed(schema: type, values: Any, *, where: str = "") -> Any:
    """An instance of the dataclass `schema` filled with `values`, each converted to its declared type.

    Args:
        schema: a dataclass that OmegaConf understands.
        values: a mapping or DictConfig.
        where: the config path of `values`, for the message ("divergence").

    Raises ConfigError for an unknown key, a value of the wrong type, a missing value or an interpolation that fails.
    """
    prefix = f"{where}." if where else ""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        return OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        path = (error.full_key or str(error.key)).split(".")
        parent = _annotation(schema, path[:-1])
        names = [entry.name for entry in dataclasses.fields(parent)] if dataclasses.is_dataclass(parent) else []
        near = nearest(path[-1], names)
        raise ConfigError(
            f"there is no key {prefix}{'.'.join(path)}",
            expected=list_names(names, most=40) if names else "no further keys",
            hint=" or ".join(prefix + ".".join([*path[:-1], name]) for name in near),
        ) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{prefix}{error.full_key} has no value", hint=f"{prefix}{error.full_key}=...") from error
    except ValidationError as error:
        key = error.full_key or _first_refused(schema, values)
        value = OmegaConf.select(OmegaConf.create(values), key)
        kind = _annotation(schema, key.split("."))
        raise ConfigError(
            f"{prefix}{key} = {_show(value)} is not what this key takes", expected=_type_words(kind) if kind else ""
        ) from error
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"{prefix}{getattr(error, 'full_key', None) or 'config'}: {problem}") from error


def _first_refused(schema: type, values: Mapping[str, Any]) -> str:
    """The first key whose value is no group of keys where the schema has one; OmegaConf does not name it."""
    for key, value in values.items():
        try:
            OmegaConf.merge(OmegaConf.structured(schema), {key: value})
        except ValidationError:
            return str(key)
    return ""


def explain_key(key: str, groups: typing.Iterable[str] = ()) -> ConfigError:
    """The error for a key of the whole config that does not exist, or not with what else was chosen.

    Args:
        key: its path, such as `recipe.epoch`.
        groups: config groups, which are names that a word may begin with too.
    """
    if "@" in key:
        return ConfigError(f"there is no group {key}", hint="recipe@teacher.recipe=..., for the teacher's recipe")
    path = key.split(".")
    for depth, part in enumerate(path):
        names = {*_names_below(path[:depth]), *(groups if depth == 0 else ())}
        if part not in names:
            near = [".".join([*path[:depth], name, *path[depth + 1 :]]) for name in nearest(part, names)]
            return ConfigError(
                f"there is no key {key}",
                expected=list_names(names, most=40),
                hint=" or ".join(f"{name}=..." for name in near),
            )
    if path[0] == "method" and len(path) > 1:
        return ConfigError(f"{key} belongs to a method that was not chosen", hint=f"method={path[1]} {key}=...")
    if key in groups:
        return ConfigError(f"{key} is not chosen unless it is added with a plus", hint=f"+{key}=...")
    return ConfigError(f"{key} cannot be set like this")


def _names_below(path: list[str]) -> list[str]:
    """The keys of the whole config right below `path`; none where it leads nowhere."""
    from vkd.methods import METHODS

    if path[:1] == ["method"]:
        return list(METHODS) if len(path) == 1 else list(parameters_of(METHODS[path[1]])) if len(path) == 2 else []
    kind = _annotation(Config, path)
    return [entry.name for entry in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def explain_value(key: str, value: str) -> ConfigError:
    """The error for a value of the whole config, as it was typed, that has the wrong type."""
    kind = _annotation(Config, key.split("."))
    names = [entry.name for entry in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    return ConfigError(
        f"{key} = {value or _show(value)} is not what this key takes",
        expected=_type_words(kind) if kind else "",
        hint=f"{key}.arch={value}" if "arch" in names else "",
    )


def _show(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)


def parameters_of(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of the keyword-only parameters of a function or of a class's `__init__`.

    The default is `dataclasses.MISSING` where there is none.
    """
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target)
    return {
        name: (hints.get(name, Any), dataclasses.MISSING if entry.default is entry.empty else entry.default)
        for name, entry in inspect.signature(target).parameters.items()
        if entry.kind is entry.KEYWORD_ONLY
    }


def typed_parameters(
    function: Callable[..., Any], values: Mapping[str, Any] | None, *, where: str, leave_out: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`values` checked against the keyword-only parameters of `function` and converted to their types.

    Args:
        function: what will be called with them, less the parameters named in `leave_out`.
        values: what the config says; None is no values.
        where: the config path of `values`, for the message.

    Raises ConfigError for an unknown, missing or wrongly typed parameter, or for a number that is not finite.
    """
    fields = []
    for name, (kind, default) in parameters_of(function).items():
        if name in leave_out:
            continue
        if default is dataclasses.MISSING:
            fields.append((name, kind, field(default=MISSING)))
        elif isinstance(default, (list, dict)):
            fields.append((name, kind, field(default_factory=lambda default=default: default)))
        else:
            fields.append((name, kind, field(default=default)))
    schema = dataclasses.make_dataclass("Parameters", fields)
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{where} = {_show(values)} is not what this key takes", expected=_type_words(schema))
    typed = dataclasses.asdict(as_typed(schema, values or {}, where=where))
    for name, value in typed.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}.{name} = {value} is not a finite number")
    return typed


def _choose(key: str, value: str, choices: typing.Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        near = nearest(value, choices)
        raise ConfigError(
            f"{key}={value} is not a choice",
            expected=list_names(choices, most=40),
            hint=" or ".join(f"{key}={name}" for name in near),
        )


def _check_recipe(recipe: RecipeConfig, where: str) -> None:
    for name in ("epochs", "batch_size", "evaluate_every"):
        value = getattr(recipe, name)
        require(value >= 1, f"{where}.{name} = {value} is too small", "a whole number from 1")
    require(
        recipe.batch_size >= 2, f"{where}.batch_size = 1: batch normalisation cannot train on one image", "2 or more"
    )
    for name, value in dataclasses.asdict(recipe).items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{where}.{name} = {value} is not a finite number", "a finite number")
    require(recipe.learning_rate > 0, f"{where}.learning_rate = {recipe.learning_rate}", "a number above 0")
    for name in ("weight_decay", "warmup_epochs", "warmup_learning_rate", "min_learning_rate", "momentum"):
        value = getattr(recipe, name) or 0.0
        require(value >= 0, f"{where}.{name} = {value} is negative", "0 or more")
    require(0 <= recipe.label_smoothing < 1, f"{where}.label_smoothing = {recipe.label_smoothing}", "from 0 to below 1")
    if recipe.clip_grad_norm is not None:
        require(recipe.clip_grad_norm > 0, f"{where}.clip_grad_norm = {recipe.clip_grad_norm}", "above 0, or null")
    if recipe.ema_decay is not None:
        require(0 < recipe.ema_decay < 1, f"{where}.ema_decay = {recipe.ema_decay}", "between 0 and 1, or null")
    require(
        recipe.milestones == sorted(set(recipe.milestones)) and all(value >= 1 for value in recipe.milestones),
        f"{where}.milestones = {recipe.milestones}",
        "rising epochs from 1",
    )
    require(
        recipe.scheduler != "multistep" or bool(recipe.milestones),
        f"{where}.scheduler=multistep needs milestones",
        "the epochs after which the rate drops",
        f"{where}.milestones=[{max(1, recipe.epochs // 2)}]",
    )
    from vkd.training.optimization import optimizer_names, scheduler_names

    _choose(f"{where}.optimizer", recipe.optimizer, optimizer_names())
    _choose(f"{where}.scheduler", recipe.scheduler, scheduler_names())


def _typed_method(method: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    from vkd.methods import METHODS

    # In one order, since that of a sum decides its last digits and says nothing else.
    typed = {name: typed_parameters(METHODS[name], method[name], where=f"method.{name}") for name in sorted(method)}
    for name, parameters in typed.items():
        for key, value in parameters.items():
            # A negative weight would drive the student away from the teacher, and say so nowhere.
            positive = not key.endswith(("weight", "epochs")) or value >= 0
            require(positive, f"method.{name}.{key} = {value} is negative", "0 or more")
    return typed


def _typed_divergence(divergence: Mapping[str, Any]) -> dict[str, Any]:
    from vkd.divergences import DIVERGENCES, make_divergence

    values = dict(divergence)
    name = values.pop("name", None)
    require(name is not None, "divergence.name has no value", list_names(DIVERGENCES), "divergence=fkld")
    temperature = as_typed(
        dataclasses.make_dataclass("Temperature", [("temperature", float, field(default=1.0))]),
        {"temperature": values.pop("temperature", 1.0)},
        where="divergence",
    ).temperature
    require(
        math.isfinite(temperature) and temperature > 0, f"divergence.temperature = {temperature}", "a number above 0"
    )
    common = ("temperature", "mask", "reduction")
    parameters = {other: [*parameters_of(DIVERGENCES[other])] for other in DIVERGENCES}
    for key in values:
        others = [other for other in DIVERGENCES if key in parameters[other] and key not in common]
        if others and key not in parameters[name]:
            raise ConfigError(
                f"divergence={name} takes no {key}",
                expected=f"{key} with divergence={' or '.join(others)} alone",
                hint=f"divergence={others[0]} divergence.{key}=..., and another command for {name}",
            )
        if not others:
            names = {"name", "temperature", *parameters[name]} - {"mask", "reduction"}
            anywhere = {entry for other in DIVERGENCES for entry in parameters[other]} - {"mask", "reduction"}
            raise ConfigError(
                f"there is no key divergence.{key}",
                expected=f"{list_names(names)} with divergence={name}",
                hint=" or ".join(f"divergence.{near}=..." for near in nearest(key, anywhere)),
            )
    own = typed_parameters(DIVERGENCES[name], values, where="divergence", leave_out=common)
    make_divergence(name, temperature=temperature, **own)
    return {"name": name, "temperature": temperature, **own}


def parse(composed: DictConfig | Mapping[str, Any]) -> Config:
    """Turn a composed config into a `Config`, or say in one message what is wrong with it.

    Numbers get their declared type (`alpha=1` is 1.0). With no method, the divergence and the teacher's part of the
    loss are dropped and cross-entropy has weight 1. Whether networks exist and files are there is checked by whoever
    opens them, before any work.

    Raises ConfigError.
    """
    from vkd.methods import METHODS

    if isinstance(composed, DictConfig):
        composed = OmegaConf.to_container(composed)  # interpolations are resolved where their errors are explained
    given = {key: value for key, value in composed.items() if value is not None or key != "divergence"}
    config = as_typed(Config, given)
    _choose("precision", config.precision, PRECISIONS)
    from vkd.tracking import TRACKERS

    _choose("tracker.name", config.tracker.name, TRACKERS)
    config.method = _typed_method(config.method)
    uses_divergence = any(METHODS[name].uses_divergence for name in config.method)
    if uses_divergence or config.divergence:
        # A wrong one is a mistake even where no method uses it.
        config.divergence = _typed_divergence(config.divergence)
    if not uses_divergence:
        config.divergence = {}
    elif not any(METHODS[name].uses_divergence and METHODS[name].uses_temperature for name in config.method):
        # Methods with temperatures of their own: the divergence's decides nothing, so it must not tell runs apart.
        config.divergence["temperature"] = 1.0
    view_augmentation = config.dataset.view_augmentation.values()
    for name in config.method:
        require(
            METHODS[name].views == 1 or any(options not in (None, False) for options in view_augmentation),
            f"method={name} learns from {METHODS[name].views} views of each image, "
            "and dataset.view_augmentation, which makes the further ones, is empty",
            "augmentations with their options",
            "dataset.view_augmentation.auto_augment.policy=cifar10",
        )
    if config.is_plain:
        config.teacher = None
        config.cross_entropy_weight = 1.0
    else:
        if config.cross_entropy_weight is None:
            config.cross_entropy_weight = max(METHODS[name].cross_entropy_weight for name in config.method)
        require(config.teacher is not None, "teacher is null", "a teacher, or method=none", "teacher.arch=...")
    require(
        math.isfinite(config.cross_entropy_weight) and config.cross_entropy_weight >= 0,
        f"cross_entropy_weight = {config.cross_entropy_weight}",
        "a finite number from 0",
    )
    require(config.seed >= 0, f"seed = {config.seed} is negative", "a whole number from 0")
    require(config.workers >= 0, f"workers = {config.workers} is negative", "a whole number from 0")
    require(config.evaluation_batch_size >= 1, "evaluation_batch_size is too small", "a whole number from 1")
    require(
        config.students_at_once is None or config.students_at_once >= 1,
        f"students_at_once = {config.students_at_once}",
        "a whole number from 1, or null for as many as memory holds",
    )
    require(
        config.checkpoint_minutes is None or 0 <= config.checkpoint_minutes < math.inf,
        f"checkpoint_minutes = {config.checkpoint_minutes}",
        "minutes, 0 for a checkpoint after every step, or null for one an epoch",
    )
    require(
        config.snapshot_every is None or config.snapshot_every >= 1,
        f"snapshot_every = {config.snapshot_every}",
        "epochs, a whole number from 1, or null for the student after the last epoch alone",
    )
    _check_recipe(config.recipe, "recipe")
    recipes = {"recipe": config.recipe}
    if not config.is_plain and not config.teacher.is_given:
        recipes["teacher.recipe"] = config.teacher.recipe
    for where, recipe in recipes.items():
        require(
            config.dataset.val_fraction > 0 or recipe.scheduler != "plateau",
            f"{where}.scheduler=plateau watches the validation accuracy, and dataset.val_fraction=0 leaves none",
            "another scheduler, or a validation split",
            f"{where}.scheduler=cosine",
        )
    if not config.is_plain:
        _check_recipe(config.teacher.recipe, "teacher.recipe")
        _check_cache(config)
        require(
            not (config.teacher.pretrained and config.teacher.checkpoint),
            "teacher.pretrained=true and teacher.checkpoint name two sets of weights",
            "one of them",
        )
        require(
            (config.teacher.mean is None) == (config.teacher.std is None),
            "teacher.mean and teacher.std belong together",
            "both or neither",
        )
        require(
            config.teacher.mean is None or config.teacher.is_given,
            "teacher.mean and teacher.std belong to weights that are given, and vkd trains this teacher",
            "teacher.checkpoint or teacher.pretrained beside them; a trained teacher has the data set's normalisation",
            "dataset.mean=... dataset.std=..., for both networks",
        )
        require(
            config.teacher.image_size is None or config.teacher.is_given,
            "teacher.image_size belongs to weights that are given, and vkd trains this teacher at the data set's size",
            "teacher.checkpoint or teacher.pretrained beside it",
        )
        require(
            config.teacher.image_size is None or config.teacher.image_size >= 1,
            f"teacher.image_size = {config.teacher.image_size} is no size",
            "a side in pixels, or null",
        )
    for name in ("runs_root", "results_root", "data_root"):
        require(bool(getattr(config, name)), f"{name} is empty", "a folder", f"{name}={getattr(Config, name)}")
    require(
        config.study != TEACHERS_STUDY,
        f"study={TEACHERS_STUDY} is the folder of the teachers that vkd trains",
        "another name for a study of students",
    )
    if config.study is not None:
        _check_folder_name("study", config.study)
    _check_folder_name("dataset.name", config.dataset.name)
    from vkd.models import check_arch

    check_arch(config.student.arch)
    if not config.is_plain:
        check_arch(config.teacher.arch)
    return config


def _check_cache(config: Config) -> None:
    """Refuse a cache of the teacher's logits where logits of the views of crop and flip are not all that is asked."""
    from vkd.methods import METHODS

    _choose("teacher.cache", config.teacher.cache, TEACHER_CACHES)
    _choose("teacher.cache_dtype", config.teacher.cache_dtype, CACHE_DTYPES)
    if config.teacher.cache == "none":
        return
    for name in config.method:
        method = METHODS[name]
        wanted = "the teacher's features" if method.needs_features else "several views of each image at once"
        require(
            not method.needs_features and method.views == 1,
            f"teacher.cache=views holds the teacher's logits on one view of an image, and method={name} wants {wanted}",
            "a method that compares logits of one view, such as kd or dkd",
            "teacher.cache=none",
        )


def _check_folder_name(key: str, name: str) -> None:
    """Refuse a name that would leave its parent folder or hide itself."""
    good = bool(name) and not name.startswith((".", "-")) and all(part.isalnum() or part in "._-+" for part in name)
    require(good, f"{key} = {_show(name)} cannot name a folder", "letters, digits, '.', '_', '-' and '+'")


def _canonical(value: Any) -> Any:
    """Plain JSON in which equal configs are equal texts: every number is a float, every mapping sorted."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(entry) for key, entry in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_canonical(entry) for entry in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return value


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256, in hex, of everything that decides a run's numbers. 1 and 1.0 are equal, key order does not matter."""
    return hashlib.sha256(json.dumps(_canonical(identity), sort_keys=True).encode()).hexdigest()


_OUTSIDE = (
    "device", "runs_root", "results_root", "data_root", "tracker", "workers", "evaluation_batch_size", "compile",
    "channels_last", "fused_optimizer", "graphs", "keep_freed_memory", "students_at_once", "keep_checkpoint",
    "checkpoint_minutes", "snapshot_every", "deterministic",
)  # fmt: skip
"""Keys that decide no run's numbers, but for rounding."""


def request_key(config: Config) -> str:
    """A hash of what a config asks for, before any data or weights are looked at: equal requests are one run.

    Unlike the fingerprint it takes a teacher's file by its name, and the study too.
    """
    asked = {key: value for key, value in dataclasses.asdict(config).items() if key not in _OUTSIDE}
    if config.teacher is not None:
        for name in ("fold", "compile", "cache", "cache_dtype"):
            del asked["teacher"][name]
    for name in ("augmentation", "view_augmentation"):
        asked["dataset"][name] = list(asked["dataset"][name].items())
    return fingerprint(asked)


def run_identity(
    config: Config, *, data: str, teacher: Mapping[str, Any] | None, world_size: int = 1
) -> dict[str, Any]:
    """What decides a run's numbers: the content of the data, not its path; the teacher's weights, not their file.

    Args:
        data: the data set's content hash.
        teacher: what identifies the teacher's weights; None for plain training.
        world_size: number of processes.
    """
    from vkd.methods import METHODS

    dataset = dataclasses.asdict(config.dataset)
    del dataset["root"]
    if dataset["train_fraction"] == 1:
        del dataset["train_fraction"]  # it decides nothing
    # A mapping's order is not part of a fingerprint; that of augmentations decides the pixels.
    for name in ("augmentation", "view_augmentation"):
        dataset[name] = list(dataset[name].items())
    if all(METHODS[name].views == 1 for name in config.method):
        del dataset["view_augmentation"]  # it decides nothing
    return {
        "dataset": {**dataset, "content": data},
        "teacher": teacher,
        "student": dataclasses.asdict(config.student),
        "method": config.method,
        "divergence": config.divergence,
        "cross_entropy_weight": config.cross_entropy_weight,
        "recipe": dataclasses.asdict(config.recipe),
        "precision": config.precision,
        "seed": config.seed,
        "world_size": world_size,
        **({} if world_size == 1 else {"sync_batch_norm": config.sync_batch_norm}),
    }
