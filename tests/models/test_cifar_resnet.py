"""The CIFAR ResNets against the literature's table, and against timm's interface."""

from __future__ import annotations

import inspect
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vkd.errors import ModelError
from vkd.models import cifar_resnet, count_macs, count_parameters
from vkd.models.staged_network import StagedNetwork

PARAMETERS = {
    "cifar_resnet8": 83_892,
    "cifar_resnet14": 181_108,
    "cifar_resnet20": 278_324,
    "cifar_resnet32": 472_756,
    "cifar_resnet44": 667_188,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_resnet8x4": 1_233_540,
    "cifar_resnet32x4": 7_433_860,
}
ARCHS = [*PARAMETERS, "cifar_resnet8_width4"]


def make(arch: str, **arguments) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(arch, **arguments)


def randomize_batch_norm(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


@pytest.mark.parametrize(("arch", "count"), PARAMETERS.items())
def test_a_network_has_as_many_parameters_as_the_literature_says(arch, count):
    with torch.device("meta"):
        assert count_parameters(timm.create_model(arch, num_classes=100)) == count


def test_timm_lists_exactly_the_networks_of_the_table_the_narrow_one_and_the_one_of_bottlenecks():
    assert set(timm.list_models("cifar_resnet*")) == {*ARCHS, "cifar_resnet50"}


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("cifar_resnet8", 12.5),
        ("cifar_resnet14", 26.7),
        ("cifar_resnet20", 40.8),
        ("cifar_resnet32", 69.1),
        ("cifar_resnet44", 97.4),
        ("cifar_resnet56", 125.8),
        ("cifar_resnet110", 253.2),
        ("cifar_resnet8x4", 177.1),
        ("cifar_resnet32x4", 1083.0),
    ],
)
def test_a_network_multiplies_as_often_as_the_literature_says(arch, millions):
    macs = []

    def count(module, _, output):
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        macs.append(positions * module.weight.numel())

    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=100).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, 32, 32))
        counted = sum(macs)
        assert count_macs(model, torch.empty(1, 3, 32, 32)) == counted
    assert round(counted / 1e6, 1) == millions


def test_parameter_names_are_those_of_published_checkpoints():
    names = set(make("cifar_resnet8").state_dict())
    norms = ["bn1", *(f"layer{stage}.0.bn{norm}" for stage in (1, 2, 3) for norm in (1, 2))]
    norms += [f"layer{stage}.0.downsample.1" for stage in (2, 3)]
    expected = {f"{norm}.{part}" for norm in norms for part in ("weight", "bias", "running_mean", "running_var")}
    expected |= {f"{norm}.num_batches_tracked" for norm in norms}
    expected |= {f"layer{stage}.0.conv{conv}.weight" for stage in (1, 2, 3) for conv in (1, 2)}
    expected |= {f"layer{stage}.0.downsample.0.weight" for stage in (2, 3)}
    assert names == expected | {"conv1.weight", "fc.weight", "fc.bias"}


def test_the_first_stage_projects_only_where_the_stem_has_another_width():
    assert make("cifar_resnet8").layer1[0].downsample is None
    assert make("cifar_resnet8x4").layer1[0].downsample[0].weight.shape == (64, 32, 1, 1)


def test_the_width4_network_has_four_channels_in_every_layer():
    state = make("cifar_resnet8_width4", num_classes=10).state_dict()
    assert {tensor.shape[0] for name, tensor in state.items() if tensor.ndim == 4} == {4}
    assert state["fc.weight"].shape == (10, 4)


def test_logits_equal_a_forward_pass_written_out_from_the_state_dict():
    model = make("cifar_resnet20", num_classes=7).double().eval()
    randomize_batch_norm(model)
    state = model.state_dict()

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = F.relu(norm(conv(images, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            shortcut = x if stride == 1 else norm(conv(x, f"{name}.downsample.0", 2), f"{name}.downsample.1")
            y = F.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
            x = F.relu(shortcut + norm(conv(y, f"{name}.conv2"), f"{name}.bn2"))
    expected = F.linear(F.avg_pool2d(x, 8).flatten(1), state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_convolutions_start_kaiming_normal_over_fan_out_and_batch_norm_starts_as_the_identity():
    model = make("cifar_resnet32x4")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            assert abs(module.weight.mean().item()) < 5 * (2 / fan_out / module.weight.numel()) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    bound = model.fc.in_features**-0.5
    assert 0.9 * bound < model.fc.weight.abs().max().item() <= bound


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (28, 28, 1), (33, 47, 3), (64, 64, 4), (1, 1, 3)])
def test_images_of_any_size_and_channel_count_are_taken(height, width, channels):
    model = make("cifar_resnet8_width4", num_classes=5, in_chans=channels).eval()
    assert model(torch.zeros(2, channels, height, width)).shape == (2, 5)
    assert model.in_chans == channels


def test_intermediates_are_the_stem_and_the_stages_and_end_in_what_the_head_takes():
    model = make("cifar_resnet8x4").eval()
    images = torch.randn(2, 3, 16, 24)
    last, features = model.forward_intermediates(images)
    assert [tuple(feature.shape) for feature in features] == [
        (2, 32, 16, 24),
        (2, 64, 16, 24),
        (2, 128, 8, 12),
        (2, 256, 4, 6),
    ]
    assert [info["num_chs"] for info in model.feature_info] == [feature.shape[1] for feature in features]
    assert [info["reduction"] for info in model.feature_info] == [24 // feature.shape[3] for feature in features]
    assert torch.equal(last, features[-1])
    torch.testing.assert_close(model.forward_head(last), model(images))
    torch.testing.assert_close(model.forward_features(images), last)


def test_intermediates_can_be_chosen_by_index_and_the_rest_not_be_run():
    model = make("cifar_resnet8").eval()
    images = torch.randn(2, 3, 8, 8)
    every = model.forward_intermediates(images, intermediates_only=True)
    chosen = model.forward_intermediates(images, indices=[0, -2], intermediates_only=True)
    assert [torch.equal(one, other) for one, other in zip(chosen, (every[0], every[2]), strict=True)] == [True, True]
    model.layer3 = None
    last, features = model.forward_intermediates(images, indices=[1, 2], stop_early=True)
    assert torch.equal(last, every[2])
    assert len(features) == 2
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_features_only_gives_the_intermediates_through_timm():
    images = torch.randn(2, 3, 8, 8)
    full = make("cifar_resnet14").eval()
    every = full.forward_intermediates(images, intermediates_only=True)
    for indices, picked in ((None, every), ((1, 2), every[1:3])):
        arguments = {} if indices is None else {"out_indices": indices}
        extractor = make("cifar_resnet14", features_only=True, **arguments).eval()
        extractor.model.load_state_dict(full.state_dict(), strict=False)
        features = extractor(images)
        assert [torch.equal(one, other) for one, other in zip(features, picked, strict=True)] == [True] * len(picked)
        assert extractor.feature_info.channels() == [feature.shape[1] for feature in features]


def test_pruning_keeps_what_the_chosen_features_need_and_drops_the_rest():
    images = torch.randn(1, 3, 8, 8)
    model = make("cifar_resnet8").eval()
    kept = model.forward_intermediates(images, indices=[2], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([2]) == [2]
    assert not any(name.startswith(("layer3", "fc")) for name in model.state_dict())
    assert torch.equal(model(images), kept)
    assert model.num_features == kept.shape[1]


def test_a_network_with_a_final_norm_gives_its_last_feature_before_or_behind_it():
    class PreActivation(StagedNetwork):
        stage_names, norm_name = ("layer1",), "bn1"

        def __init__(self):
            super().__init__()
            self.layer1 = nn.Sequential(nn.Conv2d(1, 2, 1))
            self.bn1 = nn.Softplus()
            self.feature_info = [{"num_chs": n, "reduction": 1, "module": name} for n, name in ((1, ""), (2, "layer1"))]
            self.num_features = 2
            self._make_head(3, "avg")

        def forward_stem(self, x):
            return x

    model, images = PreActivation(), torch.randn(2, 1, 4, 4)
    last, (_, raw) = model.forward_intermediates(images)
    normed = model.forward_intermediates(images, norm=True, intermediates_only=True)[1]
    assert torch.equal(raw, model.layer1(images))
    assert torch.equal(normed, F.softplus(raw))
    assert torch.equal(last, normed)
    assert torch.equal(model.forward_features(images), normed)
    model.prune_intermediate_layers([1], prune_norm=True)
    assert torch.equal(model.forward_features(images), raw)


def test_the_classifier_can_be_replaced_or_taken_away():
    model = make("cifar_resnet8", num_classes=10).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.fc
    assert model.get_classifier(name_only=True) == "fc"
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    assert not model.fc.training
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(6, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(images).shape == (2, 6)


def test_no_classes_and_no_pooling_give_the_last_feature_map():
    assert make("cifar_resnet8", num_classes=0)(torch.zeros(2, 3, 8, 8)).shape == (2, 64)
    assert make("cifar_resnet8", num_classes=0, global_pool="")(torch.zeros(2, 3, 8, 8)).shape == (2, 64, 2, 2)


def test_dropout_ahead_of_the_classifier_acts_in_training_alone():
    model = make("cifar_resnet8", drop_rate=0.5)
    features = torch.ones(1, 64, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    assert set(pooled.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(1, 64))


def test_checkpointing_changes_neither_logits_nor_gradients():
    images = torch.randn(2, 3, 8, 8)
    results = []
    for enable in (False, True):
        model = make("cifar_resnet14")
        model.set_grad_checkpointing(enable)
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_every_parameter_belongs_to_the_stem_a_block_or_the_head():
    from timm.models import group_parameters

    model = make("cifar_resnet14")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert {name.split(".")[0] for name, group in groups.items() if group == 0} == {"conv1", "bn1"}
    assert groups["layer1.0.conv1.weight"] < groups["layer1.1.bn2.bias"] < groups["layer3.1.conv2.weight"]
    assert {name for name, group in groups.items() if group == max(groups.values())} == {"fc.weight", "fc.bias"}
    assert len(set(groups.values())) == 1 + 6 + 1
    assert len(set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values())) == 1 + 3 + 1


@pytest.mark.parametrize("arch", ARCHS)
def test_pretrained_is_refused_rather_than_answered_with_random_weights(arch):
    with pytest.raises(ModelError, match="no published pretrained weights") as caught:
        timm.create_model(arch, pretrained=True)
    assert arch in str(caught.value)
    assert "teacher.checkpoint=" in str(caught.value)


def test_pretrained_with_a_named_file_loads_that_file(tmp_path):
    model = make("cifar_resnet8")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    loaded = timm.create_model("cifar_resnet8", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.layer2[0].conv1.weight, model.layer2[0].conv1.weight)


def test_entry_points_and_networks_can_be_inspected_pickled_and_named():
    for arch in ARCHS:
        entry = getattr(cifar_resnet, arch)
        assert pickle.loads(pickle.dumps(entry)) is entry
        assert inspect.getdoc(entry).startswith("ResNet-")
        cfg = timm.get_pretrained_cfg(arch)
        assert (cfg.architecture, cfg.input_size, cfg.num_classes) == (arch, (3, 32, 32), 100)
        assert (cfg.mean, cfg.std) == ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))
    model = make("cifar_resnet8").eval()
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))


def test_a_depth_between_two_networks_is_an_error():
    with pytest.raises(ValueError, match="6n"):
        cifar_resnet.CifarResNet(depth=18)
