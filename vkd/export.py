"""`python -m vkd.export`: the student of a finished run as a file that other programs load, with a model card."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vkd.command import import_training, parse_words, quietly, run_command
from vkd.errors import ConfigError, nearest
from vkd.records.finished import finished_run
from vkd.records.reading import printable

HELP = """\
vkd.export: the student of a finished run as a file that other programs load, with a model card.

    python -m vkd.export run=RUN_DIRECTORY [key=value ...]

KEYS
  run                       directory of a finished run
  format=timm               timm: model.safetensors and config.json, for timm.create_model("local-dir:FOLDER",
                            pretrained=true); onnx: model.onnx; torch_export: model.pt2, for torch.export.load
  output=null               the folder to make; null: exports/RUN-FORMAT
  overwrite=false           true: put it in place of an earlier export
  data_root=null            where the run's data set is; null: where it was. Nothing is downloaded: without the data
                            the file is checked with noise, and the names of the classes are left out

EXAMPLES
  python -m vkd.export run=runs/quickstart/cifar_resnet20-cifar_resnet8_width4/kd-fkld-s1-0a1b2c3d
  python -m vkd.export run=runs/quickstart/cifar_resnet20-cifar_resnet8_width4/kd-fkld-s1-0a1b2c3d \\
      format=onnx output=student

The network takes normalised images, float32 [batch, channels, height, width], any number at a time, and gives logits
[batch, classes]. The folder appears once the file in it, opened again, gives the logits of the student. README.md in it
is the model card: data and their licence, teacher, method, accuracy as result.json has it, how to load the file, and
the command that repeats the run. format=onnx needs the packages of the extra: pip install 'vkd[onnx]'."""

PACKAGES = {"timm": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "torch_export": ()}
"""The formats, each with the packages that it takes beyond vkd's own."""


@dataclass
class ExportConfig:
    """The keys of this command."""

    run: str | None = None
    format: str = "timm"
    output: str | None = None
    overwrite: bool = False
    data_root: str | None = None


def export(words: Sequence[str]) -> Path:
    """Export what the words ask for; the folder that was made. Raises UserError for wrong input."""
    config = parse_words(ExportConfig, words)
    if not config.run:
        raise ConfigError("name the run to export", expected="run=DIRECTORY", hint="--help")
    if config.format not in PACKAGES:
        near = " or ".join(f"format={name}" for name in nearest(config.format, PACKAGES))
        raise ConfigError(
            f"there is no format {config.format!r}", expected=", ".join(PACKAGES), hint=near or "format=timm"
        )
    missing = [name for name in PACKAGES[config.format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"format={config.format} needs {' and '.join(missing)}, which this Python has not",
            expected="the packages of the extra of that name",
            hint=f"pip install 'vkd[{config.format}]', or {' '.join(['pip install', *missing])}",
        )
    folder = Path(config.run)
    run = finished_run(folder)
    import_training()
    from vkd.exporting import export_student

    output = config.output or Path("exports", f"{folder.resolve().name}-{config.format}")
    return export_student(
        folder, run, format=config.format, output=output, overwrite=config.overwrite, data_root=config.data_root
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 2 for wrong input, 130 when asked to stop."""
    return run_command(argv, HELP, lambda words, _: print(printable(str(export(words)))))


if __name__ == "__main__":
    sys.exit(quietly(main))
