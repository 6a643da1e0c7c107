"""Weights in files: read safely, checked before they touch a network, written whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import pickle
import re
import stat
import zipfile
import zlib
from codecs import encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import list_models
from torch import Tensor, nn

from vkd.errors import ModelError
from vkd.records.atomic import write_bytes_atomically
from vkd.records.reading import clean

_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "weights",
    "params",
    "student",
    "teacher",
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "student.", "teacher.")
_SLACK_BYTES = 64 << 20
"""What the parts of a torch file may hold together beyond the file's own length; torch compresses no tensor."""
_BEST_FORMAT = ".safetensors, or a torch file that holds a state dict"


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name, on the CPU.

    The state dict is found inside the usual wrappers ("model", "state_dict", ...; averaged weights first, as timm
    does), and prefixes that every name shares ("module.", "model.", ...) are taken off. Nothing in the file is run.

    Raises:
        ModelError: there is no such file, it is damaged, it wants to run code, or it holds no weights or several.
    """
    path = Path(path).expanduser()
    try:
        is_odd = not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()  # opening a pipe would wait for ever
        head = b"" if is_odd else _head(path)
    except FileNotFoundError as error:
        raise ModelError(
            f"there is no checkpoint {str(path)!r}",
            expected=f"the path of a {_BEST_FORMAT}, seen from {str(Path.cwd())!r}",
            hint="check the path, or train the network first",
        ) from error
    except IsADirectoryError as error:
        found = sorted(str(file) for file in path.glob("*.safetensors"))
        raise ModelError(
            f"checkpoint {str(path)!r} is a directory",
            expected=f"the path of a {_BEST_FORMAT}",
            hint=" or ".join(found[:3]) or "the path of the file inside it",
        ) from error
    except OSError as error:
        raise ModelError(f"checkpoint {str(path)!r} cannot be read: {error.strerror}") from error
    if is_odd:
        raise _damaged(path, "it is no plain file")
    if head[8:9] == b"{":
        content: Any = _read_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):
        content = _read_torch(path)
    else:
        raise _damaged(path, "it is empty" if not head else "it is neither a safetensors nor a torch file")
    weights = strip_shared_prefixes(_find_state_dict(content, path))
    odd = [name for name, tensor in weights.items() if not _is_plain(tensor)]
    if odd:
        raise ModelError(
            f"checkpoint {str(path)!r} holds tensors that are no weights: {_some(odd)}",
            expected="dense tensors of real numbers, with their numbers in the file",
            hint="save model.state_dict() of the network in float32, before it is quantized or made sparse",
        )
    if not weights:
        raise ModelError(
            f"checkpoint {str(path)!r} holds no weights",
            expected="a state dict: tensors by parameter name, alone or under 'model', 'state_dict' or the like",
            hint="torch.save(model.state_dict(), path)",
        )
    return {name: _scalar_counter(name, tensor) for name, tensor in weights.items()}


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, arch: str, source: str) -> None:
    """Loads `weights` into `model`: every weight of the model from the file and none left over, or nothing at all.

    Only BatchNorm's `num_batches_tracked` may be missing, since old checkpoints do not have it.

    Args:
        model: the network; unchanged where an error is raised.
        weights: tensors by parameter name, as `load_weights` returns them.
        arch: the network's name, for the messages.
        source: where the weights come from, for the messages.

    Raises:
        ModelError: a name is missing or unknown, a shape differs (other classes or input channels are named as such,
            and the network that would fit, where it is a cifar_* one), or a weight is NaN or infinite.
    """
    state = model.state_dict()
    missing = [name for name in state if name not in weights and not _is_counter(name)]
    unexpected = sorted((name for name in weights if name not in state), key=lambda name: (_is_counter(name), name))
    reshaped = [name for name in state if name in weights and weights[name].shape != state[name].shape]
    if not missing and not unexpected and reshaped:
        _check_ends(model, weights, state, reshaped, arch, source)
    if missing or unexpected or reshaped:
        shapes = [f"{name} {list(weights[name].shape)} for {list(state[name].shape)}" for name in reshaped]
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
        faults = "".join(f"\n  {kind}: {_some(names)}" for kind, names in parts if names)
        fitting = _fitting_archs(weights)
        raise ModelError(
            f"checkpoint {source!r} does not fit {arch!r}{faults}",
            expected=f"the weights of {arch}, {len(state)} tensors",
            hint=" or ".join(f"arch={name}" for name in fitting) or "another arch or checkpoint",
        )
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ModelError(
            f"checkpoint {source!r} has NaN or infinite weights: {_some(broken)}",
            expected="finite weights",
            hint="an earlier checkpoint of that training: it has diverged in this one, or the file is damaged",
        )
    model.load_state_dict(dict(weights))


def save_weights(
    model_or_state_dict: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Writes weights as a safetensors file that `timm.create_model(arch, num_classes=..., checkpoint_path=path)` loads.

    The file appears whole, in place of an older one, or not at all. Wrappers of torch.compile and data parallelism are
    taken off the names; tensors that share memory are written once for each name.

    Args:
        model_or_state_dict: the network, or its tensors by name.
        path: the file; its folder is made where there is none.
        metadata: text to store beside the tensors.
    """
    module = isinstance(model_or_state_dict, nn.Module)
    tensors = model_or_state_dict.state_dict() if module else model_or_state_dict
    tensors = strip_shared_prefixes(tensors, ("module.", "_orig_mod."))
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = safetensors.torch.save(copies, {"format": "pt", **metadata})
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, content)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and values: the same for the same weights in any order and file format."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def strip_shared_prefixes(weights: Mapping[str, Tensor], prefixes: Iterable[str] = _PREFIXES) -> dict[str, Tensor]:
    """`weights` without those `prefixes` that every name starts with, however many are stacked."""
    prefixes = tuple(prefixes)
    if not weights:
        return {}
    first, last = min(weights), max(weights)  # what these two begin with, all between them do
    end = 0
    while found := next((one for one in prefixes if first.startswith(one, end) and last.startswith(one, end)), None):
        end += len(found)
    return {name[end:]: tensor for name, tensor in weights.items()}


def _head(path: Path) -> bytes:
    """The bytes that tell one format from another."""
    with path.open("rb") as file:
        return file.read(9)


def _is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is dense, real and on the CPU, and of a size that its numbers in the file account for."""
    is_dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_complex())
    # A few bytes, repeated by a stride of 0, can be a tensor of any size.
    if not is_dense or tensor.device.type != "cpu":
        return False
    return tensor.nbytes <= max(tensor.untyped_storage().nbytes(), _SLACK_BYTES)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _scalar_counter(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, where BatchNorm's counter of batches is [] even if a converter stored it as [1]."""
    return tensor.reshape(()) if _is_counter(name) and tensor.numel() == 1 else tensor


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except Exception as error:  # types of numbers that torch has not are no SafetensorError
        reason = str(error) if isinstance(error, SafetensorError) else f"{type(error).__name__}: {error}"
        raise _damaged(path, reason) from error


def _read_torch(path: Path) -> Any:
    """The content of a torch file, unpickled by torch's restricted reader: tensors, plain containers and numbers."""
    check_unpacked_size(path)
    scalar_types = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    make_scalar = np.float64(0).__reduce__()[0]
    names = [(make_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        allowed = torch.serialization.safe_globals([argparse.Namespace, np.dtype, encode, *scalar_types, *names])
        with path.open("rb") as file, allowed:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"(?:GLOBAL|function) ([\w.]+)", str(error)) if _is_refusal(error) else None
        if refused is None:
            raise _damaged(path, next(iter(str(error).splitlines()), type(error).__name__)) from error
        raise ModelError(
            f"checkpoint {str(path)!r} holds more than weights: reading it would run {refused[1]!r}, which is refused",
            expected="a state dict of tensors, beside plain numbers and text",
            hint="where you trust the file, save model.state_dict() again: safetensors.torch.save_file or torch.save",
        ) from error


def check_unpacked_size(path: Path) -> None:
    """Raise ModelError for a torch file that would take memory out of proportion to its length.

    Parts that were compressed, or are there several times, take it, and so does a `bytearray`: a pickle can ask for one
    of any length, and no state dict needs one.
    """
    name = b"\nbytearray\n"  # as torch's reader of pickles wants it
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # as torch tells its two formats apart
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    has_bytearray = content.find(name) >= 0
            else:
                with zipfile.ZipFile(file) as archive:
                    members = archive.infolist()
                    size, held = path.stat().st_size, sum(member.file_size for member in members)
                    if held > size + _SLACK_BYTES:
                        raise _damaged(path, f"it would unpack to {held:,} bytes from {size:,}")
                    pickles = (archive.read(member) for member in members if member.filename.endswith("data.pkl"))
                    has_bytearray = any(name in content for content in pickles)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if has_bytearray:
        raise ModelError(
            f"checkpoint {str(path)!r} holds more than weights: reading it would make a bytearray, which is refused",
            expected="a state dict of tensors, beside plain numbers and text",
            hint="where you trust the file, save model.state_dict() again: safetensors.torch.save_file or torch.save",
        )


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, pickle.UnpicklingError) and "truncated" not in str(error)


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        f"checkpoint {str(path)!r} is damaged or no checkpoint: {clean(why)}",
        expected=f"a {_BEST_FORMAT}",
        hint="copy or download the file again, and compare its size with the original's",
    )


def _find_state_dict(
    content: Any, path: Path, depth: int = 4, known: dict[int, dict[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """The tensors by name in `content`, or in what it wraps.

    Args:
        content: what a file holds.
        path: of the file, for the message.
        depth: how many wrappers may lie round them.
        known: what was found by the id of what it was found in: a wrapper may lie in several others, even in itself.
    """
    known = {} if known is None else known
    if not isinstance(content, Mapping):
        return {}
    if id(content) in known:
        return known[id(content)]
    known[id(content)] = {}
    found: dict[str, dict[str, Tensor]] = {}
    if depth:
        wrapped = {name: content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)}
        found = {name: inner for name in wrapped if (inner := _find_state_dict(wrapped[name], path, depth - 1, known))}
    if set(found) == {"student", "teacher"}:
        raise ModelError(
            f"checkpoint {str(path)!r} holds the weights of a student and of a teacher",
            expected="the weights of one network",
            hint="torch.save(torch.load(path)['student'], 'student.pth')",
        )
    tensors = {
        name: value.detach() for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)
    }
    known[id(content)] = next(iter(found.values()), tensors)
    return known[id(content)]


def _check_ends(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    reshaped: list[str],
    arch: str,
    source: str,
) -> None:
    """Raises the ModelError for a checkpoint that differs from `model` in classes or input channels alone."""
    cfg = getattr(model, "pretrained_cfg", {})
    heads = [name for end in _names(cfg.get("classifier")) for name in (f"{end}.weight", f"{end}.bias")]
    stems = [f"{name}.weight" for name in _names(cfg.get("first_conv"))]
    faults = []
    for name in reshaped:
        has, wanted = list(weights[name].shape), list(state[name].shape)
        if name in heads and has[1:] == wanted[1:]:
            faults.append(f"{has[0]} classes, {wanted[0]} were asked for")
        elif name in stems and has[:1] + has[2:] == wanted[:1] + wanted[2:]:
            faults.append(f"{has[1]} input channels, {wanted[1]} were asked for")
        else:
            return
    raise ModelError(
        f"checkpoint {source!r} has {' and '.join(dict.fromkeys(faults))}",
        expected=f"weights of {arch} that were trained on this data set: no layer is ever silently made anew",
        hint="another checkpoint, or the data set that this one was trained on",
    )


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(clean(name) for name in names[:most]) + (
        f", ... ({len(names)} in all)" if len(names) > most else ""
    )


def _fitting_archs(weights: Mapping[str, Tensor]) -> list[str]:
    """The cifar_* networks whose weights have the names and shapes of `weights`."""
    shapes = _shapes(weights)
    fitting = []
    for arch in list_models("cifar_*"):
        cfg = timm.models.get_pretrained_cfg(arch)
        head, stem = shapes.get(f"{cfg.classifier}.weight"), shapes.get(f"{cfg.first_conv}.weight")
        if head is None or stem is None or len(stem) < 2:
            continue
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            candidate = timm.create_model(arch, num_classes=head[0], in_chans=stem[1])
        if _shapes(candidate.state_dict()) == shapes:
            fitting.append(arch)
    return fitting


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items() if not _is_counter(name)}
