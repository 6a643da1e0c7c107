"""Intermediate features of any network: which stages, in which shapes, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vkd.errors import ModelError
from vkd.models import Intermediates, create_model


def network(arch: str, size: int = 32, classes: int = 5) -> nn.Module:
    return create_model(arch, num_classes=classes, image_size=(size, size), seed=0)


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("arch", "size", "maps", "embedding"),
    [
        ("cifar_resnet8", 32, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
        ("resnet10t", 64, [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)], 512),
        ("mobilenetv3_small_050", 64, [(8, 16, 16), (16, 8, 8), (24, 4, 4), (288, 2, 2)], 1024),
        ("vit_tiny_patch16_224", 64, [(192, 4, 4)] * 4, 192),
    ],
)
def test_the_stages_are_those_behind_the_stem(arch, size, maps, embedding):
    model = network(arch, size)
    found = Intermediates(model, (3, size, size), arch=arch)
    assert list(found.shapes.maps) == maps
    assert found.shapes.embedding == embedding
    _, features, vector = found(images(size))
    assert [tuple(entry.shape[1:]) for entry in features] == maps
    assert vector.shape == (2, embedding)


@pytest.mark.parametrize("arch", ["cifar_resnet8", "resnet10t", "mobilenetv3_small_050"])
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_are_those_of_the_network_alone(arch, training):
    alone, tapped = network(arch), network(arch)
    found = Intermediates(tapped, (3, 32, 32), arch=arch)
    torch.manual_seed(3)
    expected = alone.train(training)(images())
    torch.manual_seed(3)
    tapped.train(training)
    logits, _, _ = found(images())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    logits.square().sum().backward()
    for one, other in zip(alone.parameters(), tapped.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_the_embedding_is_what_the_classifier_multiplies():
    model = network("resnet10t").eval()
    logits, _, embedding = Intermediates(model, (3, 32, 32), arch="resnet10t")(images())
    torch.testing.assert_close(embedding @ model.fc.weight.T + model.fc.bias, logits)


def test_the_maps_are_what_the_stages_give():
    model = network("cifar_resnet8").eval()
    seen = []
    for name in model.stage_names:
        getattr(model, name).register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    _, features, _ = Intermediates(model, (3, 32, 32), arch="cifar_resnet8")(images())
    for one, other in zip(features, seen[-3:], strict=True):
        assert torch.equal(one, other)


def test_looking_at_a_network_leaves_its_state_its_modes_and_every_generator_alone():
    model = network("resnet10t").train()
    model.layer1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Intermediates(model, (3, 32, 32), arch="resnet10t")
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_without_intermediates_is_refused_by_name():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

    with pytest.raises(ModelError, match="'plain' cannot give its intermediate features") as caught:
        Intermediates(Plain(), (3, 4, 4), arch="plain")
    assert "method=kd" in str(caught.value)


def test_a_network_whose_logits_do_not_come_from_its_features_is_refused():
    model = network("cifar_resnet8")
    model.forward = lambda batch: torch.ones(len(batch), 5)
    with pytest.raises(ModelError, match="logits differ"):
        Intermediates(model, (3, 32, 32), arch="cifar_resnet8")


def test_a_classifier_that_starts_at_zero_does_not_hide_that_the_features_are_others():
    model = network("cifar_resnet8")
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    Intermediates(model, (3, 32, 32), arch="cifar_resnet8")
    forward = model.forward_intermediates

    def doubled(batch, indices=None):
        last, maps = forward(batch, indices=indices)
        return 2 * last, maps

    model.forward_intermediates = doubled
    with pytest.raises(ModelError, match="logits differ"):
        Intermediates(model, (3, 32, 32), arch="cifar_resnet8")


def test_compiling_compiles_what_the_features_come_from(monkeypatch):
    compiled = []

    def compile(run):
        compiled.append(run)
        return lambda *arguments, **options: run(*arguments, **options)

    monkeypatch.setattr(torch, "compile", compile)
    model = network("cifar_resnet8").eval()
    found = Intermediates(model, (3, 32, 32), arch="cifar_resnet8")
    expected = found(images())[0]
    found.compile()
    assert compiled == [model.forward_intermediates]
    assert torch.equal(found(images())[0], expected)


@pytest.mark.parametrize("arch", ["convnext_atto", "deit_tiny_distilled_patch16_224"])
def test_other_families_give_four_stages(arch):
    shapes = Intermediates(network(arch, 64), (3, 64, 64), arch=arch).shapes
    assert len(shapes.maps) == 4
    assert all(len(shape) == 3 for shape in shapes.maps)
