"""The CIFAR networks beside the ResNets: against published state dicts, a second forward pass and timm's interface."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from vkd.errors import ModelError
from vkd.models import count_macs, count_parameters, create_model, load_into, load_weights
from vkd.models.cifar_wrn import CifarWideResNet

PARAMETERS = {
    "cifar_wrn_16_1": 180_916,
    "cifar_wrn_16_2": 703_284,
    "cifar_wrn_40_1": 569_780,
    "cifar_wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg11": 9_277_284,
    "cifar_vgg13": 9_462_180,
    "cifar_vgg16": 14_774_436,
    "cifar_vgg19": 20_086_692,
    "cifar_mobilenetv2_half": 812_836,
    "cifar_shufflenet_v1": 949_258,
    "cifar_shufflenet_v2": 1_355_528,
    "cifar_resnet50": 23_705_252,
}
ARCHS = list(PARAMETERS)
SMALL = ["cifar_wrn_16_1", "cifar_vgg8", "cifar_mobilenetv2_half", "cifar_shufflenet_v1", "cifar_shufflenet_v2"]
FAMILIES = [*SMALL, "cifar_resnet50"]
WITH_HEAD = ["cifar_mobilenetv2_half", "cifar_shufflenet_v2"]

# Channels and size after the stem and each stage, for images of 32x32.
INTERMEDIATES = {
    "cifar_wrn_16_1": [(16, 32), (16, 32), (32, 16), (64, 8)],
    "cifar_wrn_16_2": [(16, 32), (32, 32), (64, 16), (128, 8)],
    "cifar_wrn_40_1": [(16, 32), (16, 32), (32, 16), (64, 8)],
    "cifar_wrn_40_2": [(16, 32), (32, 32), (64, 16), (128, 8)],
    **{f"cifar_vgg{n}": [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)] for n in (8, 11, 13, 16, 19)},
    "cifar_mobilenetv2_half": [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)],
    "cifar_shufflenet_v1": [(24, 32), (240, 16), (480, 8), (960, 4)],
    "cifar_shufflenet_v2": [(24, 32), (116, 16), (232, 8), (464, 4)],
    "cifar_resnet50": [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)],
}
EMBEDDING = {
    "cifar_wrn_16_1": 64,
    "cifar_wrn_16_2": 128,
    "cifar_wrn_40_1": 64,
    "cifar_wrn_40_2": 128,
    **{f"cifar_vgg{n}": 512 for n in (8, 11, 13, 16, 19)},
    "cifar_mobilenetv2_half": 1280,
    "cifar_shufflenet_v1": 960,
    "cifar_shufflenet_v2": 1024,
    "cifar_resnet50": 2048,
}


def make(arch: str, **arguments) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(arch, **arguments)


def on_meta(arch: str, **arguments) -> nn.Module:
    """The network without numbers: shapes alone, at once."""
    with torch.device("meta"):
        return timm.create_model(arch, **arguments).eval()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


def randomize_batch_norm(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def published_state(arch: str) -> dict[str, Tensor]:
    """Numbers under the names and shapes of the state dict that the literature's network has at 100 classes.

    The file holds shapes by name, and for a BatchNorm its channels alone.
    """
    stored = json.loads(Path(__file__).with_name("published_parameters.json").read_text())[arch]
    state, generator = {}, torch.Generator().manual_seed(3)
    for name, shape in stored.items():
        if isinstance(shape, list):
            state[name] = torch.rand(shape, generator=generator)
        else:
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.{part}"] = torch.rand(shape, generator=generator) + 0.5
            state[f"{name}.num_batches_tracked"] = torch.tensor(187_500)
    return state


# What the literature says


@pytest.mark.parametrize(("arch", "count"), PARAMETERS.items())
def test_a_network_has_as_many_parameters_as_the_literature_says(arch, count):
    model = on_meta(arch, num_classes=100)
    assert count_parameters(model) == count
    assert f"{count:,}" in timm.models.model_entrypoint(arch).__doc__


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("cifar_vgg8", 96.2),
        ("cifar_vgg13", 284.9),
        ("cifar_wrn_16_2", 101.1),
        ("cifar_wrn_40_1", 83.3),
        ("cifar_wrn_40_2", 327.6),
        ("cifar_mobilenetv2_half", 6.5),
        ("cifar_shufflenet_v1", 38.7),
        ("cifar_shufflenet_v2", 44.5),
        ("cifar_resnet50", 1298),
    ],
)
def test_a_network_multiplies_as_often_as_the_literature_says(arch, millions):
    macs = []

    def count(module, _, output):
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        macs.append(positions * module.weight.numel())

    model = on_meta(arch, num_classes=100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 32, 32, device="meta"))
    counted = sum(macs)
    assert count_macs(model, torch.empty(1, 3, 32, 32, device="meta")) == counted
    assert round(counted / 1e6, 0 if isinstance(millions, int) else 1) == millions


@pytest.mark.parametrize("arch", ARCHS)
def test_published_state_dicts_load_strictly(arch):
    model, state = on_meta(arch, num_classes=100), published_state(arch)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    model.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("arch", SMALL)
def test_a_published_checkpoint_file_is_read_and_loaded_as_it_is(tmp_path, arch):
    state = published_state(arch)
    content = {"epoch": 240, "model": state, "best_acc": torch.tensor(74.6), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "ckpt_epoch_240.pth")
    model = create_model(arch, num_classes=100)
    load_into(model, load_weights(tmp_path / "ckpt_epoch_240.pth"), arch=arch, source="ckpt_epoch_240.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# The forward pass a second time, from the state dict alone


class Written:
    """Forward passes written out with `torch.nn.functional`, in eval mode; each gives (intermediates, logits)."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            self.state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding, groups=groups)

    def conv_norm(self, x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        return self.norm(self.conv(x, conv, stride, groups), norm)

    def classify(self, x: Tensor, name: str) -> Tensor:
        return x.mean(dim=(2, 3)) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def cifar_wrn_16_1(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self.conv(x, "conv1")
        features = [x]
        for stage in (1, 2, 3):
            for block in (0, 1):
                name = f"block{stage}.layer.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                activated = F.relu(self.norm(x, f"{name}.bn1"))
                changes = self.state[f"{name}.conv1.weight"].shape[0] != x.shape[1]
                shortcut = self.conv(activated, f"{name}.convShortcut", stride) if changes else x
                y = F.relu(self.conv_norm(activated, f"{name}.conv1", f"{name}.bn2", stride))
                x = shortcut + self.conv(y, f"{name}.conv2")
            features.append(x)
        return features, self.classify(F.relu(self.norm(x, "bn1")), "fc")

    cifar_wrn_16_2 = cifar_wrn_16_1

    def cifar_vgg11(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features, height = [], x.shape[2]
        for block, depth in enumerate((1, 1, 2, 2, 2)):
            if block in (1, 2, 3) or (block == 4 and height == 64):
                x = F.max_pool2d(x, 2, 2)
            for layer in range(depth):
                x = F.relu(self.conv_norm(x, f"block{block}.{3 * layer}", f"block{block}.{3 * layer + 1}"))
            features.append(x)
        return features, self.classify(x, "classifier")

    def cifar_mobilenetv2_half(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = F.relu(self.conv_norm(x, "conv1.0", "conv1.1", stride=2))
        features = [x]
        for group, (count, stride) in enumerate([(1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)]):
            for block in range(count):
                name, before = f"blocks.{group}.{block}.conv", x
                x = F.relu(self.conv_norm(x, f"{name}.0", f"{name}.1"))
                channels = x.shape[1]
                x = F.relu(self.conv_norm(x, f"{name}.3", f"{name}.4", stride if block == 0 else 1, groups=channels))
                x = self.conv_norm(x, f"{name}.6", f"{name}.7")
                if x.shape == before.shape:
                    x = x + before
            if group in (1, 2, 4, 6):
                features.append(x)
        return features, self.classify(F.relu(self.conv_norm(x, "conv2.0", "conv2.1")), "classifier.0")

    @staticmethod
    def shuffled(x: Tensor, groups: int) -> Tensor:
        size = x.shape[1] // groups
        return torch.stack([x[:, group * size + place] for place in range(size) for group in range(groups)], dim=1)

    def cifar_shufflenet_v1(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = F.relu(self.conv_norm(x, "conv1", "bn1"))
        features = [x]
        for stage, count in ((1, 4), (2, 8), (3, 4)):
            for unit in range(count):
                name = f"layer{stage}.{unit}"
                first_groups = 1 if stage == 1 and unit == 0 else 3
                y = F.relu(self.conv_norm(x, f"{name}.conv1", f"{name}.bn1", groups=first_groups))
                y = self.shuffled(y, first_groups)
                y = F.relu(self.conv_norm(y, f"{name}.conv2", f"{name}.bn2", 2 if unit == 0 else 1, groups=y.shape[1]))
                y = self.conv_norm(y, f"{name}.conv3", f"{name}.bn3", groups=3)
                # Nine pixels a mean, the zeros beyond the border among them.
                x = F.relu(torch.cat([y, F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)], 1) if unit == 0 else y + x)
            features.append(x)
        return features, self.classify(x, "linear")

    def cifar_shufflenet_v2(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = F.relu(self.conv_norm(x, "conv1", "bn1"))
        features = [x]
        for stage, count in ((1, 3), (2, 7), (3, 3)):
            name = f"layer{stage}.0"
            left = self.conv_norm(x, f"{name}.conv1", f"{name}.bn1", 2, groups=x.shape[1])
            left = F.relu(self.conv_norm(left, f"{name}.conv2", f"{name}.bn2"))
            right = F.relu(self.conv_norm(x, f"{name}.conv3", f"{name}.bn3"))
            right = self.conv_norm(right, f"{name}.conv4", f"{name}.bn4", 2, groups=right.shape[1])
            right = F.relu(self.conv_norm(right, f"{name}.conv5", f"{name}.bn5"))
            x = self.shuffled(torch.cat([left, right], 1), 2)
            for unit in range(1, count + 1):
                name, half = f"layer{stage}.{unit}", x.shape[1] // 2
                y = F.relu(self.conv_norm(x[:, half:], f"{name}.conv1", f"{name}.bn1"))
                y = self.conv_norm(y, f"{name}.conv2", f"{name}.bn2", groups=half)
                y = F.relu(self.conv_norm(y, f"{name}.conv3", f"{name}.bn3"))
                x = self.shuffled(torch.cat([x[:, :half], y], 1), 2)
            features.append(x)
        return features, self.classify(F.relu(self.conv_norm(x, "conv2", "bn2")), "linear")

    def cifar_resnet50(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = F.relu(self.conv_norm(x, "conv1", "bn1"))
        features = [x]
        for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)):
            for block in range(count):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                shortcut = x
                if block == 0:
                    shortcut = self.conv_norm(x, f"{name}.shortcut.0", f"{name}.shortcut.1", stride)
                y = F.relu(self.conv_norm(x, f"{name}.conv1", f"{name}.bn1"))
                y = F.relu(self.conv_norm(y, f"{name}.conv2", f"{name}.bn2", stride))
                x = F.relu(shortcut + self.conv_norm(y, f"{name}.conv3", f"{name}.bn3"))
            features.append(x)
        return features, self.classify(x, "linear")


@pytest.mark.parametrize(
    ("arch", "height"),
    [
        ("cifar_wrn_16_1", 32),
        ("cifar_wrn_16_2", 15),
        ("cifar_vgg11", 32),
        ("cifar_vgg11", 64),
        ("cifar_vgg11", 65),
        ("cifar_mobilenetv2_half", 32),
        ("cifar_mobilenetv2_half", 23),
        ("cifar_shufflenet_v1", 32),
        ("cifar_shufflenet_v2", 27),
        ("cifar_resnet50", 8),
    ],
)
def test_logits_and_intermediates_equal_a_forward_pass_written_out_from_the_state_dict(arch, height):
    model = make(arch, num_classes=7).double().eval()
    randomize_batch_norm(model)
    images = normal(2, 3, height, 16, dtype=torch.float64)
    with torch.no_grad():
        expected_features, expected_logits = getattr(Written(model.state_dict()), arch)(images)
        last, features = model.forward_intermediates(images)
        found = [*features, model(images), model.forward_head(last), model.forward_head(model.forward_features(images))]
    for one, other in zip(found, [*expected_features, *[expected_logits] * 3], strict=True):
        assert one.isfinite().all()
        assert other.std() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * other.abs().max().item())


# Initialisation


@pytest.mark.parametrize("arch", ["cifar_wrn_16_2", "cifar_vgg8", "cifar_mobilenetv2_half", "cifar_resnet50"])
def test_convolutions_start_normal_with_the_variance_of_their_outgoing_weights(arch):
    """The variance is 2 / (k * k * out channels) in the literature, for depthwise convolutions too."""
    model, checked = make(arch), 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            variance = 2 / (module.out_channels * module.kernel_size[0] ** 2)
            scaled = module.weight.detach().flatten() / variance**0.5
            checked += 1
            assert abs(scaled.mean().item()) < 5 / len(scaled) ** 0.5
            assert abs(scaled.square().mean().item() - 1) < 5 * (2 / len(scaled)) ** 0.5
            if len(scaled) > 5_000:
                assert scaled.abs().max() > 3.1, "a uniform or truncated distribution"
            assert module.bias is None or torch.equal(module.bias, torch.zeros_like(module.bias))
    assert checked >= 5


@pytest.mark.parametrize("arch", ["cifar_shufflenet_v1", "cifar_shufflenet_v2"])
def test_the_shuffle_nets_start_as_torch_starts_every_layer(arch):
    for module in make(arch).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            largest = module.weight.abs().max().item()
            assert largest <= bound * 1.0001
            assert largest > 0.85 * bound


@pytest.mark.parametrize("arch", SMALL)
def test_batch_norm_starts_as_the_identity(arch):
    for module in make(arch).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


def check_classifier(layer: nn.Linear, *, std: float | None, zero_bias: bool) -> None:
    """Normal with `std`, else uniform as torch draws it; the bias zero or uniform."""
    if std is None:
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max().item() <= bound * 1.0001
    else:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert layer.weight.abs().max().item() > 3 * std
    assert layer.bias.eq(0).all().item() == zero_bias


@pytest.mark.parametrize(
    ("arch", "std", "zero_bias"),
    [
        ("cifar_wrn_16_1", None, True),
        ("cifar_vgg8", 0.01, True),
        ("cifar_mobilenetv2_half", 0.01, True),
        ("cifar_shufflenet_v1", None, False),
        ("cifar_shufflenet_v2", None, False),
    ],
)
def test_a_classifier_starts_as_the_literature_starts_it_also_when_it_is_replaced(arch, std, zero_bias):
    model = make(arch)
    check_classifier(model.get_classifier(), std=std, zero_bias=zero_bias)
    first = model.get_classifier().weight
    model.reset_classifier(100)
    assert not torch.equal(model.get_classifier().weight, first)
    check_classifier(model.get_classifier(), std=std, zero_bias=zero_bias)


# timm's interface


@pytest.mark.parametrize("arch", ARCHS)
def test_intermediates_are_the_stem_and_the_stages(arch):
    model = on_meta(arch)
    last, features = model.forward_intermediates(torch.empty(2, 3, 32, 32, device="meta"))
    assert [tuple(feature.shape) for feature in features] == [(2, n, size, size) for n, size in INTERMEDIATES[arch]]
    assert [info["num_chs"] for info in model.feature_info] == [channels for channels, _ in INTERMEDIATES[arch]]
    assert [32 // info["reduction"] for info in model.feature_info] == [size for _, size in INTERMEDIATES[arch]]
    assert all(model.get_submodule(info["module"]) is not None for info in model.feature_info)
    assert last.shape[1] == model.num_features == model.head_hidden_size == EMBEDDING[arch]
    assert model.forward_head(last, pre_logits=True).shape == (2, EMBEDDING[arch])


@pytest.mark.parametrize(("channels", "sizes"), [(1, [(8, 8), (28, 28)]), (4, [(33, 47), (64, 64)])])
@pytest.mark.parametrize("arch", FAMILIES)
def test_other_image_sizes_and_channel_counts_are_taken(arch, channels, sizes):
    model = on_meta(arch, num_classes=5, in_chans=channels)
    assert model.in_chans == channels
    for size in sizes:
        assert model(torch.empty(2, channels, *size, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if arch != "cifar_vgg8"])
def test_an_image_of_one_pixel_is_enough_where_strides_round_up(arch):
    assert on_meta(arch)(torch.empty(1, 3, 1, 1, device="meta")).shape == (1, 100)


def test_images_that_the_pooling_leaves_nothing_of_are_refused_with_networks_that_take_them():
    with pytest.raises(ModelError, match="does not take images of 7x7 pixels") as caught:
        create_model("cifar_vgg8", num_classes=10, image_size=(7, 7))
    assert "cifar_resnet*" in str(caught.value)


@pytest.mark.parametrize("arch", SMALL)
def test_no_later_layer_writes_into_a_feature(arch):
    model, images = make(arch), normal(2, 3, 8, 8)
    whole = model.forward_intermediates(images, intermediates_only=True)
    for index, feature in enumerate(whole):
        early = model.forward_intermediates(images, indices=[index], stop_early=True, intermediates_only=True)
        assert same(early, [feature])


@pytest.mark.parametrize("arch", SMALL)
def test_nothing_behind_the_last_feature_is_run_when_stopping_early(arch):
    model, images = make(arch).eval(), normal(1, 3, 16, 16)
    every = model.forward_intermediates(images, intermediates_only=True)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.forward_intermediates(images)
    order = list(ran)
    ran.clear()
    last, features = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert same(features, every[:2])
    assert torch.equal(last, every[1])
    assert ran == order[: len(ran)]
    assert len(ran) < len(order) - 2
    stage = ran[-1]
    following = order[len(ran)]
    assert stage.split(".")[0] != following.split(".")[0] or arch == "cifar_mobilenetv2_half"
    assert arch != "cifar_mobilenetv2_half" or (stage, following) == ("blocks.1.1.conv.6", "blocks.2.0.conv.0")


def test_the_last_feature_of_a_wide_resnet_can_be_had_behind_its_final_norm():
    model, images = make("cifar_wrn_16_1").eval(), normal(2, 3, 16, 16)
    randomize_batch_norm(model)
    last, features = model.forward_intermediates(images)
    normed = model.forward_intermediates(images, norm=True, intermediates_only=True)
    assert same(features[:-1], normed[:-1])
    assert features[-1].min() < 0
    torch.testing.assert_close(normed[-1], F.relu(model.bn1(features[-1])))
    assert torch.equal(last, normed[-1])


@pytest.mark.parametrize("arch", WITH_HEAD)
def test_a_convolution_behind_the_stages_is_in_no_feature_and_in_what_the_head_takes(arch):
    model, images = make(arch).eval(), normal(2, 3, 16, 16)
    last, features = model.forward_intermediates(images)
    assert same(features, model.forward_intermediates(images, norm=True, intermediates_only=True))
    assert torch.equal(last, model.forward_features(images))
    assert last.shape[1] == EMBEDDING[arch] != features[-1].shape[1]
    assert torch.equal(last, model.forward_intermediates(images, stop_early=True)[0])


@pytest.mark.parametrize("arch", SMALL)
def test_features_only_gives_the_intermediates_through_timm(arch):
    images = normal(2, 3, 16, 16)
    full = make(arch).eval()
    every = full.forward_intermediates(images, intermediates_only=True)
    for indices, picked in ((None, every), ((1, 2), every[1:3])):
        arguments = {} if indices is None else {"out_indices": indices}
        extractor = make(arch, features_only=True, **arguments).eval()
        missing = extractor.model.load_state_dict(full.state_dict(), strict=False).missing_keys
        assert missing == []
        assert not any(name.startswith(full.get_classifier(name_only=True)) for name in extractor.model.state_dict())
        assert same(extractor(images), picked)
        assert extractor.feature_info.channels() == [feature.shape[1] for feature in picked]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("arch", SMALL)
def test_pruning_keeps_what_the_chosen_feature_needs_and_drops_the_rest(arch, index):
    images = normal(2, 3, 16, 16)
    model = make(arch).eval()
    kept = model.forward_intermediates(images, indices=[index], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([index]) == [index]
    assert torch.equal(model.forward_features(images), kept)
    assert model.num_features == model.head_hidden_size == kept.shape[1]
    images.requires_grad_()
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.reset_classifier(5, "avg")
    expected = F.linear(kept.mean(dim=(2, 3)), model.get_classifier().weight, model.get_classifier().bias)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("arch", SMALL)
def test_pruning_nothing_changes_nothing_and_the_layers_behind_the_stages_go_only_on_demand(arch):
    images = normal(2, 3, 16, 16)
    model = make(arch).eval()
    logits, features = model(images), model.forward_intermediates(images, intermediates_only=True)
    final = len(features) - 1
    assert model.prune_intermediate_layers([final], prune_norm=False, prune_head=False) == [final]
    assert torch.equal(model(images), logits)
    behind = model.forward_features(images)
    model.prune_intermediate_layers([final], prune_norm=False)
    assert torch.equal(model(images), behind)
    model.prune_intermediate_layers([final], prune_norm=True)
    assert torch.equal(model(images), features[-1])
    assert model.num_features == features[-1].shape[1]


@pytest.mark.parametrize("arch", WITH_HEAD)
def test_a_classifier_goes_with_the_convolution_that_it_needs(arch):
    model = make(arch).eval()
    model.prune_intermediate_layers([len(model.feature_info) - 1], prune_norm=True, prune_head=False)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.num_features == model.feature_info[-1]["num_chs"]


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("cifar_wrn_16_1", "fc"),
        ("cifar_vgg8", "classifier"),
        ("cifar_mobilenetv2_half", "classifier.0"),
        ("cifar_shufflenet_v1", "linear"),
        ("cifar_shufflenet_v2", "linear"),
    ],
)
def test_the_classifier_can_be_replaced_or_taken_away(arch, name):
    model = make(arch, num_classes=10).double().eval()
    images = normal(2, 3, 16, 16, dtype=torch.float64)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert model.get_classifier(name_only=True) == name
    assert model.get_classifier() is dict(model.named_modules())[name]
    expected = F.linear(pooled, model.state_dict()[f"{name}.weight"], model.state_dict()[f"{name}.bias"])
    torch.testing.assert_close(model(images), expected)
    names = list(model.state_dict())
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    assert model.num_classes == 4
    assert list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(6, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(images).shape == (2, 6)


@pytest.mark.parametrize("arch", FAMILIES)
def test_no_classes_and_no_pooling_give_the_last_feature_map(arch):
    images = torch.empty(2, 3, 32, 32, device="meta")
    assert on_meta(arch, num_classes=0)(images).shape == (2, EMBEDDING[arch])
    size = INTERMEDIATES[arch][-1][1]
    assert on_meta(arch, num_classes=0, global_pool="")(images).shape == (2, EMBEDDING[arch], size, size)


@pytest.mark.parametrize("arch", SMALL)
def test_dropout_ahead_of_the_classifier_acts_in_training_alone(arch):
    model = make(arch, drop_rate=0.5)
    features = torch.ones(1, EMBEDDING[arch], 2, 2)
    assert set(model.forward_head(features, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(1, EMBEDDING[arch]))


@pytest.mark.parametrize("arch", SMALL)
def test_checkpointing_computes_every_block_twice_and_changes_neither_logits_nor_gradients(arch):
    images, results, calls = normal(2, 3, 16, 16), [], []
    for enable in (False, True):
        model = make(arch).double()
        model.set_grad_checkpointing(enable)
        count = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        for name in count:
            model.get_submodule(name).register_forward_hook(
                lambda *_, name=name, count=count: count.update({name: count[name] + 1})
            )
        logits = model(images.double())
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
        calls.append(count)
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-9, atol=1e-9)
    assert set(calls[0].values()) == {1}
    # What a block ends in is not needed for its gradients: its first convolution says whether it was computed again.
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    first: dict[int, str] = {}
    for name in calls[1]:
        first.setdefault(groups[f"{name}.weight"], name)
    outside = {name for name in calls[1] if groups[f"{name}.weight"] == 0 or name.startswith("conv2")}
    assert {calls[1][name] for name in outside} == {1}
    assert {calls[1][name] for name in set(first.values()) - outside} == {2}


@pytest.mark.parametrize("arch", FAMILIES)
def test_parameters_are_grouped_in_the_order_in_which_they_are_used(arch):
    model, used = on_meta(arch), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: used.append(name))
    model(torch.empty(1, 3, 32, 32, device="meta"))
    stages = len(model.feature_info) - 1
    behind = arch in WITH_HEAD or "wrn" in arch
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        order = [groups[f"{name}.weight"] for name in used]
        assert order == sorted(order)
        classifier = model.get_classifier(name_only=True)
        assert {name for name, group in groups.items() if group == order[-1]} == {
            f"{classifier}.weight",
            f"{classifier}.bias",
        }
        count = len(set(order))
        assert count == 1 + stages + behind + 1 if coarse else count > 1 + stages + behind + 1
    assert groups[f"{used[0]}.weight"] == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_pretrained_is_refused_rather_than_answered_with_random_weights(arch):
    with pytest.raises(ModelError, match="no published pretrained weights") as caught:
        timm.create_model(arch, pretrained=True)
    assert arch in str(caught.value)
    assert "teacher.checkpoint=" in str(caught.value)


@pytest.mark.parametrize("arch", SMALL)
def test_pretrained_with_a_named_file_adapts_the_ends_that_differ_and_loads_the_rest(tmp_path, arch):
    torch.save(published_state(arch), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1).eval()
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 7)
    first, head = model.pretrained_cfg["first_conv"], model.get_classifier(name_only=True)
    assert model.pretrained_cfg["classifier"] == head
    state = published_state(arch)
    for name, tensor in model.state_dict().items():
        if name == f"{first}.weight":
            torch.testing.assert_close(tensor, state[name].sum(dim=1, keepdim=True))
        elif not name.startswith(head):
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("arch", ARCHS)
def test_every_network_tells_timm_its_ends_and_what_images_it_was_made_for(arch):
    model, cfg = on_meta(arch, in_chans=2), timm.get_pretrained_cfg(arch)
    assert cfg.classifier == model.get_classifier(name_only=True)
    assert model.get_submodule(cfg.first_conv).in_channels == 2
    assert (cfg.architecture, cfg.input_size, cfg.num_classes) == (arch, (3, 32, 32), 100)
    assert (cfg.mean, cfg.std) == ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))


# Checkpoints that do not fit


@pytest.mark.parametrize("arch", ["cifar_wrn_16_2", "cifar_vgg11", *FAMILIES[2:]])
def test_the_network_that_a_checkpoint_fits_is_named(arch):
    weights = on_meta(arch, num_classes=12, in_chans=1).state_dict()
    with pytest.raises(ModelError) as caught:
        load_into(make("cifar_resnet8"), weights, arch="cifar_resnet8", source="teacher.pth")
    assert f"try: arch={arch}" in str(caught.value).splitlines()[-1].strip()
    assert " or " not in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize("arch", SMALL)
def test_other_classes_and_channels_are_named_on_both_sides(arch):
    weights = on_meta(arch, num_classes=12, in_chans=1).state_dict()
    with pytest.raises(ModelError) as caught:
        load_into(on_meta(arch, num_classes=100), weights, arch=arch, source="teacher.pth")
    assert "has 1 input channels, 3 were asked for" in str(caught.value)
    assert "12 classes, 100 were asked for" in str(caught.value)


# Training


@pytest.mark.parametrize("arch", FAMILIES)
def test_one_step_reaches_every_parameter_and_lowers_the_loss(arch):
    model, images, targets = make(arch, num_classes=10), normal(6, 3, 16, 16), torch.arange(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = F.cross_entropy(model(images), targets)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    optimizer.step()
    assert F.cross_entropy(model(images), targets) < before


@pytest.mark.parametrize("arch", SMALL)
def test_networks_and_entry_points_survive_pickling_and_copying(arch):
    entry = timm.models.model_entrypoint(arch)
    assert pickle.loads(pickle.dumps(entry)) is entry
    model, images = make(arch).eval(), normal(1, 3, 16, 16)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize("depth", [4, 18, 38])
def test_a_depth_between_two_wide_resnets_is_an_error(depth):
    with pytest.raises(ValueError, match="6n"):
        CifarWideResNet(depth=depth, width=1)
