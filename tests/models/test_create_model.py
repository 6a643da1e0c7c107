"""Networks by name: what is built, what is refused and what the refusal says."""

from __future__ import annotations

import random

import pytest
import timm
import timm.models._builder
import torch
from torch import nn

from vkd.errors import ModelError
from vkd.models import count_macs, count_parameters, create_model, input_normalization


def refusal(arch: str, **arguments) -> str:
    with pytest.raises(ModelError) as caught:
        create_model(arch, **{"num_classes": 10, **arguments})
    return str(caught.value)


@pytest.fixture
def hub_with_random_weights(monkeypatch):
    """The hub, which answers every request with seeded weights of timm's resnet10t."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        weights = timm.create_model("resnet10t").state_dict()
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(weights))
    return weights


@pytest.mark.parametrize(
    ("arch", "channels", "size"),
    [
        ("cifar_resnet8", 1, (8, 8)),
        ("resnet10t.c3_in1k", 3, (32, 32)),
        ("mobilenetv3_small_050", 1, (28, 28)),
        ("test_vit", 3, (32, 32)),
    ],
)
def test_a_network_is_built_for_the_images_and_classes_and_is_ready_to_train(arch, channels, size):
    model = create_model(arch, num_classes=7, in_channels=channels, image_size=size)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(torch.zeros(2, channels, *size)).shape == (2, 7)


def test_a_network_of_fixed_input_size_is_built_for_the_images():
    assert create_model("test_vit", num_classes=5, image_size=(64, 32)).patch_embed.img_size == (64, 32)


def test_batch_norm_has_seen_nothing_after_the_check():
    model = create_model("cifar_resnet8", num_classes=10, image_size=(32, 32))
    assert int(model.bn1.num_batches_tracked) == 0
    assert torch.equal(model.bn1.running_mean, torch.zeros(16))
    assert torch.equal(model.bn1.running_var, torch.ones(16))


def test_a_seed_fixes_the_weights_and_leaves_the_global_generators_alone():
    torch.manual_seed(11)
    states = torch.get_rng_state(), random.getstate()
    first = create_model("cifar_resnet8", num_classes=10, image_size=(32, 32), seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(12)
    second, other = (create_model("cifar_resnet8", num_classes=10, seed=seed) for seed in (5, 6))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_without_a_seed_only_the_weights_draw_from_the_global_generator():
    torch.manual_seed(4)
    timm.create_model("cifar_resnet8", num_classes=10)
    expected = torch.rand(1)
    torch.manual_seed(4)
    create_model("cifar_resnet8", num_classes=10, image_size=(32, 32))
    assert torch.equal(torch.rand(1), expected)


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    assert "cifar_resnet20" in refusal("cifar_resnet21")
    assert "cifar_resnet56" in refusal("resnet56")
    assert "convnext_tiny" in refusal("convnxt_tiny")
    assert "timm.list_models()" in refusal("")


def test_a_wrong_pretrained_tag_is_answered_with_the_right_ones():
    message = refusal("resnet18.a1_in2k")
    assert "a1_in2k" in message
    assert "resnet18.a1_in1k" in message
    assert "has none" in refusal("cifar_resnet20.cifar100")


@pytest.mark.parametrize("arch", ["hf-hub:timm/resnet18", "local-dir:/tmp/x", "timm/resnet18", "./net.pth", "C:\\net"])
def test_hubs_and_paths_are_refused_and_the_checkpoint_key_named(arch):
    message = refusal(arch)
    assert arch in message or repr(arch) in message
    assert "teacher.checkpoint=" in message


def test_an_image_that_is_too_small_is_refused_with_network_size_and_channels():
    message = refusal("test_vit", image_size=(8, 8), in_channels=1)
    for part in ("test_vit", "8x8", "1 channel", "try:"):
        assert part in message
    assert "inception_v3" in refusal("inception_v3", image_size=(32, 32))


def test_a_network_that_gives_no_logits_is_refused():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 1)

        def forward(self, x):
            return self.conv(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *_, **__: Pyramid())
        message = refusal("resnet18", image_size=(4, 4))
    assert "[2, 10, 4, 4]" in message
    assert "[2, 10]" in message


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"in_channels": 0}, {"image_size": (0, 8)}])
def test_impossible_sizes_are_refused(arguments):
    assert "expected" in refusal("cifar_resnet8", **arguments)


def test_pretrained_without_published_weights_is_refused():
    assert "no published pretrained weights for 'cifar_resnet20'" in refusal("cifar_resnet20", pretrained=True)
    assert "teacher.checkpoint=" in refusal("cifar_resnet20", pretrained=True)


def test_pretrained_weights_of_other_classes_are_refused_before_any_download(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("it went on to build the network"))
    message = refusal("resnet18", pretrained=True, num_classes=100)
    for part in ("resnet18", "1000 classes", "100 classes", "never a silently random head"):
        assert part in message
    assert "no classifier" in refusal("vit_base_patch16_siglip_224", pretrained=True)


def test_a_new_head_on_pretrained_weights_has_to_be_allowed(hub_with_random_weights):
    model = create_model("resnet10t", num_classes=10, pretrained=True, allow_new_head=True, image_size=(32, 32))
    assert model.fc.weight.shape[0] == 10
    assert torch.equal(model.layer1[0].conv1.weight, hub_with_random_weights["layer1.0.conv1.weight"])


@pytest.mark.parametrize("failure", [ConnectionError("no route to host"), FileNotFoundError("not in the cache")])
def test_a_hub_that_cannot_be_reached_is_named_with_the_other_way(monkeypatch, failure):
    def unreachable(*_, **__):
        raise failure

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    message = refusal("resnet10t", num_classes=1000, pretrained=True)
    assert "'resnet10t'" in message
    assert "hub could not be reached" in message
    assert "teacher.checkpoint=" in message


def test_published_weights_that_do_not_load_are_named_with_the_other_way(monkeypatch):
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: {"a": torch.zeros(1)})
    message = refusal("resnet10t", num_classes=1000, pretrained=True)
    assert "weights of 'resnet10t' cannot be loaded" in message
    assert "teacher.checkpoint=" in message


def test_huggingface_offline_with_an_empty_cache_is_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "hub could not be reached" in refusal("resnet10t", num_classes=1000, pretrained=True)


def test_normalization_is_known_for_pretrained_weights_alone(hub_with_random_weights):
    pretrained = create_model("resnet10t", num_classes=1000, pretrained=True, image_size=(32, 32))
    assert input_normalization(pretrained) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = create_model("resnet10t", num_classes=1000, pretrained=True, in_channels=1, image_size=(32, 32))
    assert input_normalization(grey)[0] == (pytest.approx(0.449),)
    assert input_normalization(create_model("resnet10t", num_classes=1000, image_size=(32, 32))) is None
    assert input_normalization(create_model("cifar_resnet8", num_classes=10)) is None


def test_only_trainable_parameters_are_counted():
    model = create_model("cifar_resnet20", num_classes=100)
    assert count_parameters(model) == 278_324
    model.fc.requires_grad_(False)
    assert count_parameters(model) == 278_324 - 6_500


def test_multiply_accumulates_of_attention_are_counted_on_every_device_and_a_failure_is_none():
    model = create_model("test_vit", num_classes=10, image_size=(32, 32)).eval()
    macs = count_macs(model, torch.zeros(1, 3, 32, 32))
    blocks = model.blocks
    for block in blocks:
        block.attn.fused_attn = False
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == macs
    tokens, width = model.pos_embed.shape[1], model.embed_dim
    linear = sum(
        tokens * layer.weight.numel()
        for block in blocks
        for layer in block.modules()
        if hasattr(layer, "bias") and isinstance(layer, nn.Linear)
    )
    attention = len(blocks) * 2 * tokens * tokens * width
    patches = tokens - model.num_prefix_tokens
    embedding, head = patches * model.patch_embed.proj.weight.numel(), model.head.weight.numel()
    assert macs == linear + attention + embedding + head
    assert count_macs(nn.Linear(3, 4), torch.zeros(1, 5)) is None
