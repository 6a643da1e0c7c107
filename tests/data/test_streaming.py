"""Batches that workers read from files: the same whatever their number, and broken files named."""

import functools
import random

import numpy as np
import pytest
import torch
from loading import all_views, same, train_batches
from PIL import Image
from torchvision import transforms

from vkd.data import load_data
from vkd.errors import ConfigError, DataError
from vkd.randomness import derive_seed

CPU = torch.device("cpu")
AUGMENTATION = {"random_resized_crop": {"scale": [0.3, 1.0]}, "flip": {}}


@pytest.fixture
def load(config, image_folder, tmp_path):
    """A function that loads an image folder of 12 training, 12 val and 12 test images."""

    def make(workers=0, views=1, **fields):
        root = tmp_path / "pictures"
        if not root.is_dir():
            image_folder()
        chosen = {"root": str(root), "image_size": 16, "augmentation": AUGMENTATION, **fields}
        return load_data(config("imagefolder", **chosen), tmp_path, device=CPU, workers=workers, views=views)

    return make


train = functools.partial(train_batches, batch_size=5)


def test_the_number_of_workers_changes_nothing(load):
    alone, two = load(workers=0), load(workers=2)
    for epoch in (1, 2):
        assert same(train(alone, epoch=epoch), train(two, epoch=epoch))
    assert same(list(alone.eval_batches("val", batch_size=4)), list(two.eval_batches("val", batch_size=4)))
    assert same(train(alone), train(two))


def test_every_training_image_comes_once_at_the_wanted_size(load):
    batches = train(load())
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(12))
    for batch in batches:
        assert batch.images.shape[1:] == (3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.targets.tolist() == (batch.indices // 4).tolist()


def test_same_seed_and_epoch_give_the_same_batches_and_others_differ(load):
    data = load()
    assert same(train(data), train(data))
    assert not same(train(data), train(data, epoch=2))
    assert not same(train(data), train(data, seed=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_gives_what_the_whole_epoch_gives_there(load, workers):
    data = load(workers=workers)
    whole = train(data)
    for start in range(len(whole) + 1):
        assert same(train(data, start_step=start), whole[start:])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_are_untouched(load, workers):
    data = load(workers=workers)
    torch.manual_seed(5)
    before, python_before = torch.get_rng_state(), random.getstate()
    train(data)
    list(data.eval_batches("test", batch_size=4))
    assert torch.equal(before, torch.get_rng_state())
    assert python_before == random.getstate()


@pytest.mark.parametrize("workers", [0, 1])
def test_passes_within_passes_and_abandoned_ones_do_not_mix(load, workers):
    data = load(workers=workers)
    expected, evaluated = train(data), list(data.eval_batches("test", batch_size=4))
    found = []
    for batch in data.train_batches(seed=1, epoch=1, batch_size=5, drop_last=False):
        found.append(batch)
        assert same(list(data.eval_batches("test", batch_size=4)), evaluated)
    assert same(found, expected)
    for _ in data.train_batches(seed=1, epoch=9, batch_size=2, drop_last=False):
        break
    assert same(train(data), expected)


@pytest.mark.parametrize(("crop_fraction", "side"), [(0.875, 18), (1.0, 16), (0.5, 32)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(load, tmp_path, crop_fraction, side):
    data = load(crop_fraction=crop_fraction, interpolation="bicubic")
    reference = transforms.Compose(
        [
            transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(16),
            transforms.PILToTensor(),
        ]
    )
    images = torch.cat([batch.images for batch in data.eval_batches("test", batch_size=5)])
    for index, path in enumerate(sorted((tmp_path / "pictures" / "test").glob("*/*.png"))):
        assert torch.equal(images[index], reference(Image.open(path)))


def test_augmentation_is_torchvisions_with_the_seed_of_the_image(load, tmp_path):

    data = load(augmentation={"random_resized_crop": {"scale": [0.3, 0.9], "ratio": [0.5, 2]}, "flip": {"p": 0.4}})
    reference = transforms.v2.Compose(
        [
            transforms.v2.RandomResizedCrop(16, scale=(0.3, 0.9), ratio=(0.5, 2)),
            transforms.v2.RandomHorizontalFlip(0.4),
            transforms.v2.PILToTensor(),
        ]
    )
    paths = sorted((tmp_path / "pictures" / "train").glob("*/*.png"))
    for batch in train(data, seed=3, epoch=4):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            torch.manual_seed(derive_seed(3, "augmentation", 4, index))
            assert torch.equal(image, reference(Image.open(paths[index])))


VIEW_AUGMENTATION = {"random_resized_crop": {"scale": [0.2, 0.9]}, "auto_augment": {"policy": "imagenet"}}


def test_the_views_of_an_image_that_is_read_from_a_file_are_not_counted(load):
    data = load(augmentation={"flip": {}})
    assert data.view_count is None
    assert all(batch.view_rows is None for batch in train(data))


@pytest.fixture
def load_views(load):
    """A function that loads the image folder with augmentations for further views of its training images."""
    return lambda **fields: load(**{"views": 2, "view_augmentation": VIEW_AUGMENTATION, **fields})


def test_the_first_view_is_the_same_however_many_there_are(load, load_views):
    one_view = train(load())
    assert all(batch.views == [] for batch in one_view)
    for views in (1, 3):
        batches = train(load_views(), views=views)
        assert [len(batch.views) for batch in batches] == [views - 1] * len(one_view)
        for batch, alone in zip(batches, one_view, strict=True):
            assert torch.equal(batch.images, alone.images)
            assert torch.equal(batch.indices, alone.indices)
            assert all(view.shape == batch.images.shape and view.dtype == torch.uint8 for view in batch.views)


def test_neither_the_workers_nor_the_start_nor_the_batch_size_change_a_view(load_views):
    alone, two = load_views(workers=0), load_views(workers=2)
    whole = train(alone, views=3)
    for start in range(len(whole) + 1):
        assert same(train(two, views=3, start_step=start), whole[start:])
    assert torch.equal(all_views(whole), all_views(train(alone, views=3, batch_size=4)))
    assert torch.equal(all_views(whole)[:, :2], all_views(train(two, views=2)))
    for changed in ({"seed": 2}, {"epoch": 2}):
        assert not torch.equal(all_views(whole)[:, 1], all_views(train(alone, views=2, **changed))[:, 1])


def test_views_are_torchvisions_each_with_its_own_seed(load_views, tmp_path):
    reference = transforms.v2.Compose(
        [
            transforms.v2.RandomResizedCrop(16, scale=(0.2, 0.9)),
            transforms.v2.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET),
            transforms.v2.PILToTensor(),
        ]
    )
    found = all_views(train(load_views(), seed=3, epoch=4, views=3))
    paths = sorted((tmp_path / "pictures" / "train").glob("*/*.png"))
    for index, path in enumerate(paths):
        for view in (1, 2):
            torch.manual_seed(derive_seed(3, "view augmentation", view, 4, index))
            assert torch.equal(found[index, view], reference(Image.open(path)))
    assert not torch.equal(found[:, 1], found[:, 2])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"flip": {}, "random_resized_crop": {}}, "must come first in dataset.view_augmentation"),
        ({"random_resized_crop": {"scale": [2, 3]}}, "dataset.view_augmentation.random_resized_crop.scale=[2.0, 3.0]"),
        ({"mixup": {}}, "dataset.view_augmentation.mixup: "),
    ],
)
def test_a_wrong_view_augmentation_is_named_where_several_views_are_wanted_alone(load, wrong, words):
    assert load(view_augmentation=wrong).train_size == 12
    with pytest.raises(ConfigError) as caught:
        load(view_augmentation=wrong, views=2)
    assert words in str(caught.value)


def test_a_padded_crop_follows_the_resizing_of_evaluation(load):
    (images,) = {batch.images.shape[1:] for batch in train(load(augmentation={"crop": {"padding": 3}}))}
    assert images == (3, 16, 16)
    plain = load(augmentation={}, val_fraction=0.0)
    for batch in train(plain):
        evaluated = torch.cat([other.images for other in plain.eval_batches("train", batch_size=12)])
        assert torch.equal(batch.images, evaluated[batch.indices])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_every_mode_become_rgb(load, tmp_path, mode):
    data = load()
    name = "0.tif" if mode == "CMYK" else "0.png"
    image = Image.new(mode, (20, 20)) if mode == "I;16" else Image.new("RGB", (20, 20), (200, 10, 90)).convert(mode)
    (tmp_path / "pictures" / "test" / "ant" / "0.png").unlink()
    image.save(tmp_path / "pictures" / "test" / "ant" / name)
    data = load()
    assert next(data.eval_batches("test", batch_size=4)).images.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["text", "cut", "empty", "gone"])
def test_a_broken_image_is_named_without_a_workers_traceback(load, tmp_path, workers, damage, capfd):
    data = load(workers=workers)
    path = tmp_path / "pictures" / "test" / "bee" / "2.png"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"text": b"no image", "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(DataError) as caught:
        list(data.eval_batches("test", batch_size=4))
    assert str(path) in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    path.write_bytes(whole)
    assert sum(len(batch.targets) for batch in data.eval_batches("test", batch_size=4)) == 12


def test_own_val_is_used_or_val_is_carved_or_there_is_none(load, config, image_folder, tmp_path):
    assert load().sizes == {"train": 12, "val": 12, "test": 12}
    assert load(val_fraction=0.0).sizes == {"train": 12, "test": 12}
    root = image_folder(("train", "val"), name="without")
    carved = load(root=str(root), val_fraction=0.25)
    assert carved.sizes == {"train": 9, "val": 3, "test": 12}
    targets = torch.cat([batch.targets for batch in carved.eval_batches("val", batch_size=2)])
    assert np.array_equal(targets, [0, 1, 2])


def test_the_description_of_a_folder(load):
    data = load()
    assert (data.loading, data.channels, data.image_size) == ("streaming", 3, (16, 16))
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.mean == [0.5] * 3


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"image_size": None}, "dataset.image_size is null"),
        ({"image_size": 0}, "dataset.image_size=0"),
        ({"crop_fraction": 0.0}, "dataset.crop_fraction"),
        ({"crop_fraction": 1.5}, "dataset.crop_fraction"),
        ({"interpolation": "bilinaer"}, "bilinear"),
        ({"augmentation": {"flip": {}, "random_resized_crop": {}}}, "must come first"),
        ({"augmentation": {"mixup": {}}}, "'mixup'"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_an_impossible_config_names_its_key(load, fields, key):
    with pytest.raises(ConfigError) as caught:
        load(**fields)
    assert key in str(caught.value)
