"""The model card of an exported student: what it learnt from, how well it does, how to load it and how to repeat it.

Every figure in it is from `result.json`; every text in that file may be somebody else's, so it is shown as code, quoted
for a shell or left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vkd.records.commands import command_of
from vkd.records.grouping import show
from vkd.records.reading import Run, clean, number, read_run
from vkd.records.statistics import Summary, summarise

LICENCES = {
    "caltech101": ("CC BY 4.0", "Fei-Fei, Fergus and Perona, CVPR Workshop 2004"),
    "cifar10": ("no licence stated", "Krizhevsky 2009"),
    "cifar100": ("no licence stated", "Krizhevsky 2009"),
    "digits": ("CC BY 4.0", "Alpaydin and Kaynak, UCI Machine Learning Repository 1998"),
    "dtd": ("for research", "Cimpoi et al., CVPR 2014"),
    "eurosat": ("MIT licence", "Helber et al., IEEE JSTARS 2019"),
    "fashion_mnist": ("MIT licence", "Xiao, Rasul and Vollgraf, arXiv 1708.07747"),
    "fgvc_aircraft": ("for non-commercial research", "Maji et al., arXiv 1306.5151"),
    "flowers102": ("no licence stated", "Nilsback and Zisserman, ICVGIP 2008"),
    "food101": ("Foodspotting's photos, for scientific fair use", "Bossard et al., ECCV 2014"),
    "imagenet": ("for non-commercial research", "Russakovsky et al., IJCV 2015"),
    "oxford_pets": ("CC BY-SA 4.0", "Parkhi et al., CVPR 2012"),
    "stanford_cars": ("no licence stated", "Krause et al., 3dRR 2013"),
    "stl10": ("no licence stated", "Coates, Ng and Lee, AISTATS 2011"),
    "sun397": ("no licence stated", "Xiao et al., CVPR 2010"),
    "svhn": ("for non-commercial use", "Netzer et al., NIPS Workshop 2011"),
    "tiny_imagenet": ("ImageNet's terms, for non-commercial research", "Le and Yang, CS 231N 2015"),
}
"""Of the known data sets: under which terms their authors offer them, and whom to cite."""
UNKNOWN_LICENCE = "see its authors"


@dataclass(frozen=True)
class Exported:
    """What was exported.

    format: timm, onnx or torch_export.
    files: names of the files beside the card.
    arch: timm name of the network.
    is_own: whether vkd brings the network, so that timm knows it once `vkd.models` is imported.
    num_classes, channels, image_size: of the network; image_size is (height, width).
    mean, std: normalisation of pixels in [0, 1], a value a channel.
    resized: how images of other sizes are brought to that size; empty where all have it.
    checked: what the file was checked with.
    difference: largest difference to the student's logits, as a share of the largest of these.
    versions: of the packages that wrote the file.
    """

    format: str
    files: tuple[str, ...]
    arch: str
    is_own: bool
    num_classes: int
    channels: int
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    resized: str
    checked: str
    difference: float
    versions: Mapping[str, str] = field(default_factory=dict)


def seeds_of(folder: Path, run: Run) -> dict[int, Run]:
    """The finished runs beside `folder` that differ from its `run` in nothing but the seed, by seed; `run` is one."""
    found = {}
    for beside in sorted(path for path in folder.resolve().parent.iterdir() if path.is_dir()):
        other = read_run(beside)
        if other.done and other.group == run.group:
            found[other.seed] = other
    return dict(sorted({**found, run.seed: run}.items()))


def model_card(run: Run, exported: Exported, seeds: Mapping[int, Run]) -> str:
    """The card as Markdown with the YAML head that the Hugging Face hub reads.

    Args:
        run: a finished run, as `vkd.records.reading` checked it.
        exported: the files beside the card.
        seeds: the run and those that differ from it in the seed alone, by seed.
    """
    head = yaml.safe_dump(_head(run, exported), sort_keys=False, allow_unicode=True, width=100)
    parts = [
        f"---\n{head}---",
        f"# {run.student} on {run.dataset}",
        _introduction(run, exported),
        "## Accuracy\n\n" + _accuracy(run, seeds),
        "## Training\n\n" + _listed(_training(run)),
        "## Input and loading\n\n" + _input(exported) + f"\n\n```python\n{_code(exported)}```",
        "## Repeating the run\n\n" + _repeating(run),
        "## Versions\n\n" + _listed(_versions(run, exported)),
    ]
    return "\n\n".join(parts) + "\n"


def _head(run: Run, exported: Exported) -> dict[str, Any]:
    is_timm = exported.format == "timm" and not exported.is_own
    format_tags = {"timm": ["timm"], "onnx": ["onnx"], "torch_export": ["pytorch"]}[exported.format]
    figures = [
        {"type": "accuracy", "name": f"top-1 on {split}, percent", "value": run.metric(f"{split}/top1")}
        for split in ("test", "val")
        if run.metric(f"{split}/top1") is not None
    ]
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"type": run.dataset, "name": run.dataset},
        "metrics": figures,
    }
    taught = [] if run.plain else ["knowledge-distillation"]
    return {
        "library_name": "timm" if is_timm else "vkd",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *taught, *format_tags, "vkd"],
        "dataset_license": _licence(run.dataset)[0],
        "metrics": ["accuracy"],
        "model-index": [{"name": f"{run.student} on {run.dataset}", "results": [result]}],
    }


def _licence(dataset: str) -> tuple[str, str]:
    return LICENCES.get(dataset, (UNKNOWN_LICENCE, ""))


def _introduction(run: Run, exported: Exported) -> str:
    taught = "trained on the labels alone" if run.plain else f"distilled from {run.teacher} with {run.method}"
    files = " and ".join(f"`{name}`" for name in exported.files)
    return (
        f"The network `{run.student}` ({_count(run, 'student', 'parameters')} parameters), {taught} by vkd, in {files}."
        f" It tells {exported.num_classes:,} classes of {run.dataset} apart."
    )


def _accuracy(run: Run, seeds: Mapping[int, Run]) -> str:
    rows = [
        ("", "val", "test"),
        ("---", "---:", "---:"),
        ("images", *(_count(run, "dataset", split) for split in ("val", "test"))),
        (f"this student, seed {run.seed}", *(_percent(run.metric(f"{split}/top1")) for split in ("val", "test"))),
    ]
    note = "Top-1 accuracy after the last epoch, in percent, as the run's `result.json` has it."
    if len(seeds) > 1:
        summaries = [_over(seeds, split) for split in ("val", "test")]
        rows.append((f"mean ± std of seeds {', '.join(map(str, seeds))}", *map(_spread, summaries)))
        note += " std is the sample standard deviation (n - 1) over runs that differ in the seed alone."
    if not run.plain:
        accuracies = (_percent(run.teacher_accuracy(split)) for split in ("val", "test"))
        rows.append((f"teacher, {run.teacher}", *accuracies))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{note}"


def _over(seeds: Mapping[int, Run], split: str) -> Summary | None:
    values = [run.metric(f"{split}/top1") for run in seeds.values()]
    return summarise(value for value in values if value is not None)


def _spread(summary: Summary | None) -> str:
    if summary is None or summary.std is None:
        return "-" if summary is None else f"{_percent(summary.mean)} (n = 1)"
    return f"{summary.mean:.2f} ± {summary.std:.2f} % (n = {summary.n})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _count(run: Run, section: str, name: str) -> str:
    """A whole number of the result; `-` where it has none."""
    content = run.content.get(section)
    value = number(content.get(name)) if isinstance(content, dict) else None
    return "-" if value is None else f"{int(value):,}"


def _training(run: Run) -> list[str]:
    licence, cited = _licence(run.dataset)
    val_fraction, epochs, decay = (
        number(run.parameters.get(name)) for name in ("dataset.val_fraction", "recipe.epochs", "recipe.ema_decay")
    )
    data = f"data: {run.dataset}, {_count(run, 'dataset', 'train')} training images; licence: {licence}"
    lines = [f"{data}; cite {cited}" if cited else data]
    if not run.plain:
        sha256, saw_val, source = (run.teacher_fact(name) for name in ("sha256", "saw_val", "source"))
        teacher = f"teacher: `{run.teacher}`, {clean(str(source))}, sha256 of its weights `{show(clean(str(sha256)))}`"
        if saw_val is not False:
            teacher += "; it may have been trained on the images of val, so its val figure may be inflated"
        lines.append(teacher)
        lines.append(f"method: `{run.method}`" + _settings(run, "method.") + _cross_entropy(run))
        if run.divergence:
            lines.append(f"divergence: `{run.divergence}`" + _settings(run, "divergence."))
    lines.append("recipe:" + _settings(run, "recipe.").removeprefix(";") + f"; precision `{_text(run, 'precision')}`")
    protocol = "protocol: the weights after the last epoch" + (
        "" if epochs is None else f", {int(epochs)} of {int(epochs)}"
    )
    if decay is not None:
        protocol += f", as the moving average (decay {decay:g}) that was evaluated"
    if val_fraction == 0:
        protocol += "; val_fraction = 0, no validation split: nothing was selected"
    elif val_fraction is not None:
        protocol += f"; val_fraction = {val_fraction:g}: val is there to select on, and test to measure alone"
    return [*lines, protocol]


def _settings(run: Run, section: str) -> str:
    """The settings of a section as code, after a separator; what is not set or empty is left out."""
    found = {name.removeprefix(section): value for name, value in run.parameters.items() if name.startswith(section)}
    shown = {name: value for name, value in found.items() if value not in (None, "{}", ()) and name != "name"}
    joined = ", ".join(f"`{name} = {show(value)}`" for name, value in shown.items())
    return f"; {joined}" if joined else ""


def _cross_entropy(run: Run) -> str:
    weight = number(run.parameters.get("cross_entropy_weight"))
    return "" if weight is None else f"; cross-entropy of the labels with weight {weight:g}"


def _text(run: Run, name: str) -> str:
    return clean(str(run.parameters.get(name, "-")), 60)


def _input(exported: Exported) -> str:
    height, width = exported.image_size
    said = [
        f"The input is float32 [batch, {exported.channels}, {height}, {width}], any number of images at a time: pixels",
        f"from 0 to 1, normalised with mean {_numbers(exported.mean)} and std {_numbers(exported.std)}, a value a",
        f"channel. The output is logits [batch, {exported.num_classes}], before a softmax.",
    ]
    if exported.resized:
        said.append(exported.resized)
    if exported.format == "timm" and exported.is_own:
        said.append(f"timm knows `{exported.arch}` once `vkd.models` has been imported, so vkd must be installed.")
    said.append(
        f"The file, opened again, was compared with the student on {exported.checked}: the logits "
        + ("are equal." if exported.difference == 0 else f"differ by {exported.difference:.1e} of the largest at most.")
    )
    return "\n".join(said) + "\n\nIn this folder:"


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.10g}' for value in values)}]"


def _code(exported: Exported) -> str:
    shape = f"8, {exported.channels}, {exported.image_size[0]}, {exported.image_size[1]}"
    mean, std = _numbers(exported.mean), _numbers(exported.std)
    if exported.format == "onnx":
        return (
            "import numpy as np\nimport onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
            f"pixels = np.random.rand({shape}).astype(np.float32)  # your images\n"
            f"mean = np.array({mean}, dtype=np.float32).reshape(-1, 1, 1)\n"
            f"std = np.array({std}, dtype=np.float32).reshape(-1, 1, 1)\n"
            '(logits,) = session.run(["logits"], {"images": (pixels - mean) / std})\n'
        )
    if exported.format == "timm":
        own = f"import vkd.models  # makes {exported.arch} known to timm\n" if exported.is_own else ""
        opened = f'import timm\nimport torch\n{own}\nmodel = timm.create_model("local-dir:.", pretrained=True).eval()\n'
    else:
        opened = 'import torch\n\nmodel = torch.export.load("model.pt2").module()\n'
    return (
        opened + f"pixels = torch.rand({shape})  # your images\n"
        f"mean = torch.tensor({mean}).view(-1, 1, 1)\n"
        f"std = torch.tensor({std}).view(-1, 1, 1)\n"
        "with torch.no_grad():\n"
        "    logits = model((pixels - mean) / std)\n"
    )


def _repeating(run: Run) -> str:
    command = command_of(run)
    if command is None:
        return "The run has not recorded the command that started it."
    return f"```sh\n{command}\n```"


def _versions(run: Run, exported: Exported) -> list[str]:
    names = ("vkd", "git", "torch", "torchvision", "timm", "python")
    trained = ", ".join(f"{name} `{run.environment[name]}`" for name in names if run.environment.get(name))
    written = ", ".join(f"{name} `{version}`" for name, version in exported.versions.items())
    return [f"trained with: {trained or 'not recorded'}", f"exported with: {written}"]


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
