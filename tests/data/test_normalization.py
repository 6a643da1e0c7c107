"""Normalisation against torchvision's ToTensor and Normalize."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

from vkd.data import Normalization
from vkd.errors import ConfigError

MEAN, STD = [0.5070, 0.4865, 0.4409], [0.2673, 0.2564, 0.2761]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_torchvision_for_every_pixel_value(memory_format):
    values = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=2)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(values)
    images = torch.from_numpy(values).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    found = Normalization(MEAN, STD, 3, memory_format=memory_format)(images)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, reference.expand(2, -1, -1, -1), atol=1e-6, rtol=0)


def test_stays_float32_in_a_half_precision_model_and_under_autocast():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    exact = Normalization([0.3], [0.2], 1)(images)
    model = nn.Sequential(Normalization([0.3], [0.2], 1), nn.Identity()).half().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(images), exact)
    assert model(images).dtype == torch.float32
    assert not model.state_dict()


def test_a_single_value_serves_all_channels():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(Normalization(0.5, [0.25], 3)(images), Normalization([0.5] * 3, [0.25] * 3, 3)(images))


@pytest.mark.parametrize(
    ("mean", "std", "channels", "key"),
    [
        ([0.5, 0.5], [0.5], 3, "dataset.mean"),
        (MEAN, STD, 1, "dataset.mean"),
        ([0.5], [0.5, 0.5], 3, "dataset.std"),
        ([0.5], [0.0], 1, "dataset.std"),
        ([0.5], [-0.1], 1, "dataset.std"),
        ([float("nan")], [0.5], 1, "dataset.mean"),
        (["a"], [0.5], 1, "dataset.mean"),
        ("???", [0.5], 1, "dataset.mean"),
        ([], [0.5], 1, "dataset.mean"),
    ],
)
def test_impossible_constants_name_their_key(mean, std, channels, key):
    with pytest.raises(ConfigError) as caught:
        Normalization(mean, std, channels)
    assert key in str(caught.value)


def test_a_teachers_constants_are_named_as_the_teachers():
    with pytest.raises(ConfigError, match=r"teacher\.mean"):
        Normalization(MEAN, STD, 1, key="teacher")


def test_pixels_that_are_already_floats_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        Normalization(MEAN, STD, 3)(torch.zeros(1, 3, 2, 2))
