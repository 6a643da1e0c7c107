"""A folded network is the network, only faster."""

import copy

import pytest
import timm
import torch
from torch import nn

import vkd.models  # noqa: F401
from vkd.models.folding import TOLERANCE, fold_batch_norms


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode with BatchNorm weights and statistics as training would leave them: none 0 or 1."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for values, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                ):
                    values.copy_(low + (high - low) * torch.rand(values.shape, generator=random))
    return model.eval()


def images(size: int = 32, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "left", "size"),
    [
        ("cifar_resnet20", 0, 32),
        ("cifar_resnet8x4", 0, 32),
        ("cifar_vgg8", 0, 32),
        ("cifar_shufflenet_v2", 0, 32),
        ("cifar_mobilenetv2_half", 0, 32),
        # Pre-activation blocks: the first BatchNorm of a block stands behind a sum.
        ("cifar_wrn_16_1", 7, 32),
        # timm's BatchNorms that activate too.
        ("mobilenetv3_small_050", 0, 64),
    ],
)
def test_a_folded_network_gives_the_same_logits_on_images_it_has_not_seen(arch, left, size):
    model = settled(timm.create_model(arch, num_classes=10))
    folded, count = fold_batch_norms(model, images(size))
    other = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact, found = copy.deepcopy(model).double()(other.double()), folded(other)
    assert norms(folded) == left
    assert count == norms(model) - left > 0
    assert (found - exact).abs().max() <= TOLERANCE * max(1.0, exact.abs().max())


def test_the_network_itself_is_left_alone():
    model = settled(timm.create_model("cifar_resnet8", num_classes=10)).train()
    before = copy.deepcopy(model.state_dict())
    folded, _ = fold_batch_norms(model, images())
    assert model.training
    assert not folded.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not entry.requires_grad for entry in folded.parameters())
    assert all(entry.requires_grad for entry in model.parameters())


class UsesItsConvolutionTwice(nn.Module):
    """The output of the convolution goes round the BatchNorm too, so folding would change the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.fc((x + self.norm(x)).mean(dim=(2, 3)))


class RunsItsPairTwice(UsesItsConvolutionTwice):
    """One convolution, one BatchNorm, run on two things."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.norm(self.conv(x)) + self.norm(self.conv(x.flip(3)))).mean(dim=(2, 3)))


class NormsFirst(nn.Module):
    """No BatchNorm has a convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(self.norm(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("network", [UsesItsConvolutionTwice, NormsFirst])
def test_where_folding_would_change_the_logits_nothing_is_folded(network):
    model = settled(network())
    folded, count = fold_batch_norms(model, images(8))
    assert count == 0
    assert torch.equal(folded(images(8)), model(images(8)))


def test_a_pair_that_runs_twice_keeps_its_logits():
    model = settled(RunsItsPairTwice())
    folded, _ = fold_batch_norms(model, images(8))
    assert torch.allclose(folded(images(8)), model(images(8)), atol=1e-6)


def test_a_batch_norm_without_statistics_of_its_own_stays():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    folded, count = fold_batch_norms(model, images(8))
    assert count == 0
    assert torch.equal(folded(images(8)), model(images(8)))
