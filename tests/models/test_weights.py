"""Weights in files: what is read, what is refused, and that a network is never half loaded."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from vkd.errors import ModelError
from vkd.models import create_model, load_into, load_weights, save_weights, weights_sha256


@pytest.fixture
def model() -> nn.Module:
    return create_model("cifar_resnet8", num_classes=10, seed=1)


@pytest.fixture
def weights(model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "expected:" in str(caught.value)
    assert "try:" in str(caught.value)
    return str(caught.value)


def misfit(model: nn.Module, weights: dict[str, Tensor], arch: str = "cifar_resnet8") -> str:
    """The message of the refusal, after checking that the network is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_into(model, weights, arch=arch, source="teacher.pth")
    assert same(before, model.state_dict())
    assert "'teacher.pth'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "wrapper",
    ["", "model", "state_dict", "net", "model_state_dict", "state_dict_ema", "student", "teacher", "state_dict/model"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone."])
def test_a_state_dict_is_found_in_any_wrapper_and_under_any_shared_prefix(tmp_path, weights, wrapper, prefix):
    content = {prefix + name: tensor for name, tensor in weights.items()}
    for name in reversed(wrapper.split("/") if wrapper else []):
        content = {"epoch": 240, name: content, "best_acc": torch.tensor(71.0), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "net.pth")
    assert same(load_weights(tmp_path / "net.pth"), weights)


def test_a_prefix_that_not_every_name_has_is_kept(tmp_path):
    torch.save({"model.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "net.pth")
    assert set(load_weights(tmp_path / "net.pth")) == {"model.a", "b"}


def test_averaged_weights_are_preferred_as_timm_does(tmp_path, model, weights):
    averaged = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"state_dict": weights, "state_dict_ema": averaged}, tmp_path / "net.pth")
    assert same(load_weights(tmp_path / "net.pth"), averaged)
    timm.models.load_checkpoint(model, str(tmp_path / "net.pth"))
    assert same(dict(model.state_dict()), averaged)


def test_a_file_with_a_student_and_a_teacher_is_refused(tmp_path, weights):
    torch.save({"student": weights, "teacher": weights}, tmp_path / "both.pth")
    assert "a student and of a teacher" in refusal(tmp_path / "both.pth")


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numpy_scalars_and_namespaces_beside_the_weights_are_read(tmp_path, weights, core):
    content = {
        "model": weights,
        "opt": argparse.Namespace(lr=0.1, steps=[1, 2]),
        "best_acc": np.float64(72.5),
        "epoch": np.int64(3),
        "mean": np.float32(1.5),
        "nesterov": np.bool_(True),
    }
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    own = type(np.float64(0)).__reduce__(np.float64(0))[0].__module__.removesuffix(".multiarray")
    data = (tmp_path / "net.pth").read_bytes()
    assert f"{own}.multiarray".encode() in data
    for opcode, length in ((b"c", None), (b"X", 4), (b"\x8c", 1)):
        old, new = f"{own}.multiarray".encode(), f"{core}.multiarray".encode()
        if length is None:
            data = data.replace(opcode + old + b"\n", opcode + new + b"\n")
        else:
            data = data.replace(
                opcode + len(old).to_bytes(length, "little") + old, opcode + len(new).to_bytes(length, "little") + new
            )
    assert f"{core}.multiarray".encode() in data
    (tmp_path / "net.pth").write_bytes(data)
    assert same(load_weights(tmp_path / "net.pth"), weights)


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_wants_to_run_code_is_refused_and_runs_nothing(tmp_path, weights, zipped):
    content = {"model": weights, "extra": Attack(tmp_path / "executed")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()
    assert "refused" in message
    assert "system" in message


def test_a_plain_pickle_that_wants_to_run_code_runs_nothing(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Attack(tmp_path / "executed"), protocol=2))
    refusal(tmp_path / "evil.pkl")
    assert not (tmp_path / "executed").exists()


def test_a_whole_pickled_network_is_refused_with_the_way_to_save_its_weights(tmp_path, model):
    torch.save(model, tmp_path / "whole.pth")
    message = refusal(tmp_path / "whole.pth")
    assert "CifarResNet" in message
    assert "state_dict()" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_called_damaged(tmp_path, weights, suffix, share):
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        safetensors.torch.save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "damaged" in refusal(path)


def test_a_truncated_legacy_file_is_called_damaged(tmp_path, weights):
    torch.save(weights, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "net.pth").read_bytes()
    for length in (20, 300, len(content) // 2):
        (tmp_path / "net.pth").write_bytes(content[:length])
        assert "damaged" in refusal(tmp_path / "net.pth")


def test_text_in_place_of_a_checkpoint_is_called_damaged(tmp_path):
    (tmp_path / "net.pth").write_text("<html>404 Not Found</html>")
    assert "neither" in refusal(tmp_path / "net.pth")


def test_missing_files_and_directories_are_named(tmp_path, weights):
    assert "no checkpoint" in refusal(tmp_path / "missing.pth")
    save_weights(weights, tmp_path / "run" / "student.safetensors", {})
    assert "student.safetensors" in refusal(tmp_path / "run")


@pytest.mark.parametrize("content", [{}, {"model": {"epoch": 3}}, [1, 2], {"a": "text"}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "net.pth")
    assert "holds no weights" in refusal(tmp_path / "net.pth")


def test_the_format_is_told_by_content_and_not_by_suffix(tmp_path, weights):
    safetensors.torch.save_file(weights, tmp_path / "net.pth")
    torch.save(weights, tmp_path / "net.safetensors")
    assert same(load_weights(tmp_path / "net.pth"), weights)
    assert same(load_weights(str(tmp_path / "net.safetensors")), weights)


def test_weights_are_loaded_as_they_are(weights):
    other = create_model("cifar_resnet8", num_classes=10, seed=2)
    load_into(other, weights, arch="cifar_resnet8", source="x")
    assert same(dict(other.state_dict()), weights)


def test_counters_that_old_checkpoints_lack_or_converters_reshape_are_no_obstacle(tmp_path, model, weights):
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    load_into(create_model("cifar_resnet8", num_classes=10), old, arch="cifar_resnet8", source="x")
    converted = {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(converted, tmp_path / "net.safetensors")
    load_into(model, load_weights(tmp_path / "net.safetensors"), arch="cifar_resnet8", source="x")


def test_other_classes_are_named_on_both_sides(weights):
    message = misfit(create_model("cifar_resnet8", num_classes=100), weights)
    assert "has 10 classes, 100 were asked for" in message


def test_other_classes_are_named_for_timm_networks_whose_head_has_another_name():
    weights = create_model("test_vit", num_classes=1000, image_size=(32, 32)).state_dict()
    message = misfit(create_model("test_vit", num_classes=100, image_size=(32, 32)), weights, "test_vit")
    assert "has 1000 classes, 100 were asked for" in message


def test_other_input_channels_are_named_on_both_sides(weights):
    message = misfit(create_model("cifar_resnet8", num_classes=10, in_channels=1), weights)
    assert "has 3 input channels, 1 were asked for" in message


def test_other_classes_and_channels_together_are_both_named(weights):
    message = misfit(create_model("cifar_resnet8", num_classes=100, in_channels=1), weights)
    assert "3 input channels, 1 were asked for and 10 classes, 100 were asked for" in message


def test_the_network_that_the_file_fits_is_named():
    weights = create_model("cifar_resnet14", num_classes=12, in_channels=1).state_dict()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    message = misfit(create_model("cifar_resnet8", num_classes=100, seed=0), weights)
    assert "arch=cifar_resnet14" in message
    assert torch.equal(torch.get_rng_state(), state)
    assert "arch=cifar_resnet8x4" in misfit(
        create_model("cifar_resnet8", num_classes=100, seed=0),
        create_model("cifar_resnet8x4", num_classes=100, seed=0).state_dict(),
    )


def test_missing_and_unexpected_names_are_listed_up_to_five(model, weights):
    del weights["layer2.0.conv1.weight"]
    weights |= {f"extra{index}": torch.zeros(1) for index in range(7)}
    message = misfit(model, weights)
    assert "missing: layer2.0.conv1.weight" in message
    assert "extra4, ... (7 in all)" in message
    assert "extra5" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model, weights, value):
    weights["layer3.0.bn2.running_var"][3] = value
    assert "layer3.0.bn2.running_var" in misfit(model, weights)


def test_the_same_weights_have_the_same_hash_in_every_format_and_order(tmp_path, model, weights):
    torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "net.pth")
    save_weights(model, tmp_path / "net.safetensors", {"arch": "cifar_resnet8"})
    digest = weights_sha256(model.state_dict())
    assert digest == weights_sha256(load_weights(tmp_path / "net.pth"))
    assert digest == weights_sha256(load_weights(tmp_path / "net.safetensors"))
    assert digest == weights_sha256(dict(reversed(weights.items())))


def test_the_hash_sees_every_bit_name_shape_and_type():
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    variants = [
        base,
        {"a": torch.tensor([0.0, 0, 0, 1e-45]), "b": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(8, dtype=torch.bfloat16), "b": torch.ones(2)},
        {"c": torch.zeros(4), "b": torch.ones(2)},
        {"a": torch.zeros(4)},
    ]
    assert len({weights_sha256(variant) for variant in variants}) == len(variants)
    assert weights_sha256({"a": torch.arange(6.0).view(2, 3).t()}) == weights_sha256(
        {"a": torch.arange(6.0).view(2, 3).t().contiguous()}
    )


def test_a_saved_student_loads_into_plain_timm_with_its_metadata(tmp_path, model):
    path = tmp_path / "new" / "student.safetensors"
    save_weights(torch.compile(model), path, {"arch": "cifar_resnet8", "test/top1": "71.2"})
    loaded = timm.create_model("cifar_resnet8", num_classes=10, checkpoint_path=str(path))
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"arch": "cifar_resnet8", "test/top1": "71.2", "format": "pt"}


def test_shared_and_strided_tensors_are_saved_under_each_name(tmp_path):
    table = torch.arange(6.0).view(2, 3)
    save_weights({"a": table, "b": table, "c": table.t(), "d": table[0].expand(4, 3)}, tmp_path / "w.safetensors", {})
    loaded = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(loaded["a"], loaded["b"])
    assert torch.equal(loaded["c"], table.t())
    assert loaded["d"].shape == (4, 3)


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, model, weights):
    path = tmp_path / "student.safetensors"
    save_weights(model, path, {})

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_weights({name: tensor + 1 for name, tensor in weights.items()}, path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]
    assert same(load_weights(path), weights)
