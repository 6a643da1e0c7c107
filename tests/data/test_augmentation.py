"""Batch augmentations against torchvision's, image by image, and the options in the config."""

import pytest
import torch
from torchvision.transforms.v2 import functional

from vkd.data.augmentation import AUGMENTATIONS, Crop, Flip, RandomResizedCrop, build_augmentations
from vkd.errors import ConfigError


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", [0, 1, 4, 9])
@pytest.mark.parametrize("shape", [(16, 3, 32, 32), (7, 1, 8, 5), (1, 4, 3, 6)])
def test_crop_is_torchvisions_pad_and_crop_at_the_same_places(padding, shape):
    crop, images = Crop(padding=padding), pixels(*shape)
    choices = crop.draw(shape[0], torch.Generator().manual_seed(1), shape[2:])
    expected = [
        functional.crop(functional.pad(image, [padding] * 4), int(top), int(left), *shape[2:])
        for image, (top, left) in zip(images, choices, strict=True)
    ]
    found = crop.apply(images, choices)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack(expected))


def test_crop_takes_a_view_of_a_larger_tensor():
    images = pixels(8, 6, 12, 12)[::2, 1:4, 2:10, 3:11]
    choices = Crop(padding=2).draw(4, torch.Generator().manual_seed(1), (8, 8))
    assert torch.equal(Crop(padding=2).apply(images, choices), Crop(padding=2).apply(images.contiguous(), choices))


def test_crop_offsets_are_uniform_over_both_axes():
    choices = Crop(padding=2).draw(50_000, torch.Generator().manual_seed(0), (8, 8))
    counts = torch.bincount(choices[:, 0] * 5 + choices[:, 1], minlength=25)
    assert len(counts) == 25 == Crop(padding=2).views((8, 8))
    assert ((counts - 2000).abs() < 5 * 2000**0.5).all()


def test_flip_is_torchvisions_mirror_of_the_chosen_images():
    images, flip = pixels(50, 3, 6, 7), Flip()
    choices = flip.draw(50, torch.Generator().manual_seed(0), (6, 7))
    assert 0 < choices.sum() < 50
    for image, before, choice in zip(flip.apply(images, choices), images, choices, strict=True):
        assert torch.equal(image, functional.horizontal_flip(before) if choice else before)


@pytest.mark.parametrize(("p", "views"), [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_flip_happens_with_its_probability(p, views):
    share = Flip(p=p).draw(10_000, torch.Generator().manual_seed(0), (2, 2)).double().mean()
    assert abs(float(share) - p) < 0.025
    assert Flip(p=p).views((2, 2)) == views


def test_views_of_the_usual_cifar_augmentation():
    crop, flip = build_augmentations({"crop": {"padding": 4}, "flip": {}}, "resident")
    assert (crop.views((32, 32)), flip.views((32, 32))) == (81, 2)


def test_order_options_and_switches_of_the_config():
    flip, crop = build_augmentations({"flip": True, "crop": {"padding": 3}}, "resident")
    assert isinstance(flip, Flip)
    assert isinstance(crop, Crop)
    assert crop.padding == 3
    assert build_augmentations({"flip": None, "crop": False}, "resident") == []
    (cut,) = build_augmentations({"random_resized_crop": {"scale": [0.5, 1]}}, "streaming")
    assert isinstance(cut, RandomResizedCrop)
    assert cut.scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crops": {}}, ["'crops'", "crop"]),
        ({"crop": {"paddin": 4}}, ["'paddin'", "dataset.augmentation.crop.padding"]),
        ({"crop": {"padding": 4.5}}, ["dataset.augmentation.crop.padding=4.5", "int"]),
        ({"crop": {"padding": True}}, ["padding=True", "int"]),
        ({"crop": {"padding": "four"}}, ["padding='four'"]),
        ({"crop": {"padding": -1}}, ["padding=-1"]),
        ({"crop": 4}, ["dataset.augmentation.crop=4"]),
        ({"flip": {"p": 1.5}}, ["dataset.augmentation.flip.p=1.5"]),
        ({"flip": {"p": float("nan")}}, ["dataset.augmentation.flip.p"]),
        ({"random_resized_crop": {}}, ["'random_resized_crop'", "dataset.augmentation.random_resized_crop=null"]),
        (["flip"], ["dataset.augmentation"]),
    ],
)
def test_a_wrong_augmentation_is_named(options, words):
    with pytest.raises(ConfigError) as caught:
        build_augmentations(options, "resident")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "options", [{"scale": [0.08]}, {"scale": 0.5}, {"scale": [0.9, 0.1]}, {"scale": "ab"}, {"ratio": [0, 1]}]
)
def test_a_wrong_option_of_random_resized_crop_is_named(options):
    with pytest.raises(ConfigError, match=f"random_resized_crop.{next(iter(options))}="):
        build_augmentations({"random_resized_crop": options}, "streaming")


def test_every_registered_augmentation_serves_some_loading():
    for name in AUGMENTATIONS:
        built = [loading for loading in ("resident", "streaming") if _builds(name, loading)]
        assert built, name


def _builds(name, loading):
    try:
        return len(build_augmentations({name: {}}, loading)) == 1
    except ConfigError:
        return False
