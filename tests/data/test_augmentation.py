"""Batch augmentations against torchvision's, image by image, and the options in the config."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2
from torchvision.transforms.v2 import functional

from vkd.data.augmentation import AUGMENTATIONS, AutoAugment, Crop, Flip, RandomResizedCrop, build_augmentations
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


POLICIES = ["cifar10", "imagenet", "svhn"]


def outcomes(policy, image):
    """The probability of everything that torchvision's AutoAugment can make of one image [C, H, W], by its bytes."""
    reference = v2.AutoAugment(AutoAugmentPolicy(policy))
    nearest = {"interpolation": InterpolationMode.NEAREST, "fill": reference._fill}
    found = Counter()

    def follow(image, operations, probability):
        if not operations:
            found[image.numpy().tobytes()] += probability
            return
        (name, happens, level), *later = operations
        follow(image, later, probability * (1 - happens))
        magnitudes, has_direction = reference._AUGMENTATION_SPACE[name]
        magnitude = 0.0 if level is None else float(magnitudes(10, *image.shape[1:])[level])
        signs = (1, -1) if has_direction else (1,)
        for sign in signs:
            changed = reference._apply_image_or_video_transform(image, name, sign * magnitude, **nearest)
            follow(changed, later, probability * happens / len(signs))

    for pair in reference._policies:
        follow(image, pair, 1 / len(reference._policies))
    return found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_auto_augment_gives_what_torchvisions_gives_for_one_image_as_often(policy, channels):
    count, augment = 10_000, AutoAugment(policy=policy)
    image = (pixels(channels, 20, 24).double() ** 2 / 290 + 10).to(torch.uint8)  # of a skewed histogram
    expected = outcomes(policy, image)
    assert sum(expected.values()) == pytest.approx(1)
    choices = augment.draw(count, torch.Generator().manual_seed(0), (20, 24))
    found = augment.apply(image.expand(count, -1, -1, -1), choices)
    assert found.dtype == torch.uint8
    seen = Counter(one.numpy().tobytes() for one in found)
    assert sum(seen[outcome] for outcome in expected) == count
    for outcome, probability in expected.items():
        spread = (count * probability * (1 - probability)) ** 0.5
        assert abs(seen[outcome] - count * probability) <= 5 * spread + 3


@pytest.mark.parametrize("shape", [(97, 3, 33, 31), (60, 1, 8, 8), (5, 3, 2, 2)])
@pytest.mark.parametrize("policy", POLICIES)
def test_auto_augment_does_the_same_to_an_image_alone_and_among_others(policy, shape):
    augment, images = AutoAugment(policy=policy), pixels(*shape)
    before = images.clone()
    choices = augment.draw(shape[0], torch.Generator().manual_seed(1), shape[2:])
    together = augment.apply(images, choices)
    alone = [augment.apply(image[None], choice[None]) for image, choice in zip(images, choices, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(images, before)
    assert augment.apply(images[:0], choices[:0]).shape == (0, *shape[1:])


def test_auto_augment_in_a_worker_is_torchvisions():
    transform = AutoAugment(policy="svhn").transform(224, InterpolationMode.BICUBIC)
    assert isinstance(transform, v2.AutoAugment)
    assert (transform.policy, transform.interpolation) == (AutoAugmentPolicy.SVHN, InterpolationMode.NEAREST)


def test_views_of_the_usual_cifar_augmentation():
    crop, flip = build_augmentations({"crop": {"padding": 4}, "flip": {}}, "resident")
    assert (crop.views((32, 32)), flip.views((32, 32))) == (81, 2)
    assert AutoAugment(policy="cifar10").views((32, 32)) is None


@settings(max_examples=60, deadline=None)
@given(
    padding=st.integers(0, 3),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    flip_first=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(4, 6), st.integers(4, 6)),
)
def test_two_views_have_the_same_numbers_exactly_if_they_have_the_same_pixels(padding, p, flip_first, shape):
    size, crop, flip = shape[1:], Crop(padding=padding), Flip(p=p)
    places = list(itertools.product(range(2 * padding + 1), repeat=2))
    mirrored = [choice for choice, can_be in ((0, p < 1), (1, p > 0)) if can_be]
    every = torch.tensor([(*place, choice) for place in places for choice in mirrored])
    image = (1 + torch.randperm(int(torch.tensor(shape).prod()))).view(shape).to(torch.uint8)  # no two pixels alike
    steps = [(crop, every[:, :2]), (flip, every[:, 2:])]
    views = image.expand(len(every), -1, -1, -1)
    numbers = []
    for augmentation, choices in reversed(steps) if flip_first else steps:
        views = augmentation.apply(views, choices)
        number = augmentation.number(choices, size)
        assert number.dtype == torch.int64
        assert set(number.tolist()) == set(range(augmentation.views(size)))
        numbers.append(number.tolist())
    pairs = list(zip(*numbers, strict=True))
    pixels_of = [view.numpy().tobytes() for view in views]
    assert len(set(pairs)) == len(set(pixels_of)) == len(set(zip(pairs, pixels_of, strict=True)))


def test_the_numbers_of_views_are_those_that_logits_are_kept_under():
    assert Crop(padding=4).number(torch.tensor([[0, 0], [0, 8], [1, 0], [8, 8]]), (32, 32)).tolist() == [0, 8, 9, 80]
    assert Flip().number(torch.tensor([[1], [0]]), (32, 32)).tolist() == [1, 0]
    assert Flip(p=1.0).number(torch.tensor([[1], [1]]), (32, 32)).tolist() == [0, 0]


def test_views_without_number_are_a_type_error():
    augment = AutoAugment(policy="cifar10")
    with pytest.raises(TypeError, match="AutoAugment"):
        augment.number(augment.draw(3, torch.Generator(), (8, 8)), (8, 8))


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
        ({"auto_augment": {"policy": "cifar"}}, ["dataset.augmentation.auto_augment.policy='cifar'", "try: cifar10"]),
        ({"auto_augment": {"policy": 10}}, ["dataset.augmentation.auto_augment.policy=10", "str"]),
        (["flip"], ["dataset.augmentation"]),
    ],
)
def test_a_wrong_augmentation_is_named_with_the_key_where_it_stands(options, words):
    with pytest.raises(ConfigError) as caught:
        build_augmentations(options, "resident")
    message = str(caught.value)
    assert all(word in message for word in words)
    assert message.startswith("dataset.augmentation")
    with pytest.raises(ConfigError) as caught:
        build_augmentations(options, "resident", key="dataset.view_augmentation")
    assert str(caught.value) == message.replace("dataset.augmentation", "dataset.view_augmentation")


@pytest.mark.parametrize("channels", [2, 4])
def test_auto_augment_refuses_images_of_neither_one_nor_three_channels(channels):
    with pytest.raises(ConfigError, match=rf"dataset\.augmentation\.auto_augment: .* {channels} channels") as caught:
        build_augmentations({"auto_augment": {}}, "resident", channels=channels)
    assert "dataset.augmentation.auto_augment=null" in caught.value.hint
    assert len(build_augmentations({"crop": {}, "flip": {}}, "resident", channels=channels)) == 2


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
