"""Batches of resident images: order, augmentation, resuming, and that nothing else is disturbed."""

import itertools

import numpy as np
import pytest
import torch
import yaml
from loading import all_views, same
from loading import train_batches as train
from torchvision.transforms.v2 import functional

import vkd.data.resident
from vkd.config import DatasetConfig
from vkd.data import load_data
from vkd.data.augmentation import build_augmentations
from vkd.data.resident import ResidentData
from vkd.errors import ConfigError
from vkd.randomness import generator

CPU = torch.device("cpu")
AUGMENTATION = {"crop": {"padding": 2}, "flip": {}}


@pytest.fixture
def load(config, write_packed, tmp_path):
    """A function that loads a packed set of `count` training images, of which `val_fraction` are held."""

    def make(count=41, val_fraction=0.0, augmentation=AUGMENTATION, views=1, channels=3, **fields):
        write_packed(split="train", count=count, channels=channels)
        write_packed(split="test", count=11, channels=channels)
        chosen = config("mine", val_fraction=val_fraction, augmentation=augmentation, **fields)
        return load_data(chosen, tmp_path, device=CPU, views=views)

    return make


def by_index(batches):
    indices = torch.cat([batch.indices for batch in batches])
    return torch.cat([batch.images for batch in batches])[indices.argsort()]


def test_every_training_image_comes_exactly_once_with_its_label(load):
    data = load(count=43, augmentation={})
    batches = train(data)
    assert [len(batch.targets) for batch in batches] == [8, 8, 8, 8, 8, 3]
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == list(range(43))
    assert indices.tolist() != list(range(43))
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert torch.equal(batch.images, data.images("train")[batch.indices])
        assert torch.equal(batch.targets, data.targets("train")[batch.indices])


def test_pixels_and_labels_are_those_of_the_file(load, tmp_path):
    data = load()
    with np.load(tmp_path / "mine" / "train.npz") as stored:
        assert np.array_equal(data.images("train").permute(0, 2, 3, 1).numpy(), stored["images"])
        assert np.array_equal(data.targets("train").numpy(), stored["labels"])


def test_same_seed_and_epoch_give_the_same_batches_and_others_differ(load):
    data = load()
    first = train(data)
    assert same(first, train(load()))
    assert not same(first, train(data, epoch=2))
    assert not same(first, train(data, seed=2))
    assert not torch.equal(by_index(first), by_index(train(data, epoch=2)))


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
def test_a_start_in_the_middle_gives_what_the_whole_epoch_gives_there(load, monkeypatch, chunk_bytes):
    data = load(count=100)
    whole = train(data)
    monkeypatch.setitem(vkd.data.resident.CHUNK_BYTES, "cpu", chunk_bytes)
    for start in range(len(whole) + 1):
        assert same(train(data, start_step=start), whole[start:])
    with pytest.raises(ValueError, match="start_step"):
        train(data, start_step=len(whole) + 1)


def test_an_images_augmentation_does_not_depend_on_the_batch_size(load):
    data = load(count=40)
    assert torch.equal(by_index(train(data, batch_size=8)), by_index(train(data, batch_size=5)))


def test_augmented_images_are_torchvisions_for_the_drawn_choices(load):
    data = load()
    random = generator(7, "augmentation", 3)
    places, mirrored = (augmentation.draw(41, random, (6, 5)) for augmentation in data.augmentations)
    found = torch.cat([batch.images for batch in train(data, seed=7, epoch=3)])
    indices = torch.cat([batch.indices for batch in train(data, seed=7, epoch=3)])
    for image, index in zip(found, indices, strict=True):
        expected = functional.pad(data.images("train")[index], [2] * 4)
        expected = functional.crop(expected, int(places[index, 0]), int(places[index, 1]), 6, 5)
        assert torch.equal(image, functional.horizontal_flip(expected) if mirrored[index] else expected)


def test_equal_view_rows_are_equal_pixels_and_every_view_of_every_image_has_one(load):
    data = load(count=12, augmentation={"crop": {"padding": 1}, "flip": {}})
    assert data.view_count == 18
    pixels_of = {}
    for epoch in range(1, 400):
        for batch in train(data, epoch=epoch, batch_size=6):
            assert batch.view_rows.dtype == torch.int64
            assert torch.equal(batch.view_rows // 18, batch.indices)
            for row, image in zip(batch.view_rows.tolist(), batch.images, strict=True):
                assert pixels_of.setdefault(row, image.numpy().tobytes()) == image.numpy().tobytes()
    assert sorted(pixels_of) == list(range(12 * 18))
    assert len(set(pixels_of.values())) == 12 * 18


@pytest.mark.parametrize("order", [["crop", "flip"], ["flip", "crop"]])
def test_a_view_row_says_how_the_image_was_cut_and_mirrored(load, order):
    data = load(count=40, augmentation={name: {"crop": {"padding": 2}, "flip": {}}[name] for name in order})
    views = {"crop": 25, "flip": 2}
    for batch in train(data, batch_size=10):
        for row, image in zip(batch.view_rows.tolist(), batch.images.numpy(), strict=True):
            numbers = {}
            for name in reversed(order):
                row, numbers[name] = divmod(row, views[name])
            expected = data.images("train")[row].numpy()
            for name in order:
                if name == "crop":
                    top, left = divmod(numbers["crop"], 5)
                    expected = np.pad(expected, ((0, 0), (2, 2), (2, 2)))[:, top : top + 6, left : left + 5]
                elif numbers["flip"]:
                    expected = expected[:, :, ::-1]
            assert np.array_equal(image, expected)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
def test_view_rows_do_not_depend_on_the_start_the_batch_size_or_further_views(load_views, monkeypatch, chunk_bytes):
    data = load_views(count=100)
    whole = torch.cat([batch.view_rows for batch in train(data)])
    assert [len(batch.view_rows) for batch in train(data)] == [len(batch.targets) for batch in train(data)]
    monkeypatch.setitem(vkd.data.resident.CHUNK_BYTES, "cpu", chunk_bytes)
    for start in range(12):
        assert torch.equal(torch.cat([batch.view_rows for batch in train(data, start_step=start)]), whole[8 * start :])
    assert torch.equal(torch.cat([batch.view_rows for batch in train(data, batch_size=25)]), whole)
    assert torch.equal(torch.cat([batch.view_rows for batch in train(data, views=3)]), whole)


@pytest.mark.parametrize(
    ("augmentation", "view_count"),
    [
        ({}, 1),
        ({"flip": {"p": 1.0}}, 1),
        ({"flip": {}, "crop": {"padding": 4}}, 162),
        ({"auto_augment": {}}, None),
        ({"crop": {}, "auto_augment": {}, "flip": {}}, None),
    ],
)
def test_view_rows_are_there_where_the_views_of_an_image_can_be_counted(load, augmentation, view_count):
    data = load(augmentation=augmentation)
    assert data.view_count == view_count
    for batch in train(data):
        assert (batch.view_rows is None) == (view_count is None)
        if view_count == 1:
            assert torch.equal(batch.view_rows, batch.indices)
    assert all(batch.view_rows is None for batch in data.eval_batches("test", batch_size=4))


@pytest.fixture
def load_views(load):
    """A function that loads a packed set with augmentations for further views of its training images."""
    strong = {"flip": {}, "crop": {"padding": 1}, "auto_augment": {"policy": "cifar10"}}
    return lambda **fields: load(**{"views": 2, "view_augmentation": strong, **fields})


def test_the_first_view_is_the_same_however_many_there_are(load, load_views):
    one_view = train(load())
    assert all(batch.views == [] for batch in one_view)
    for views in (1, 2, 4):
        batches = train(load_views(), views=views)
        assert [len(batch.views) for batch in batches] == [views - 1] * len(one_view)
        for batch, alone in zip(batches, one_view, strict=True):
            assert torch.equal(batch.images, alone.images)
            assert torch.equal(batch.indices, alone.indices)
            assert all(view.shape == batch.images.shape and view.dtype == torch.uint8 for view in batch.views)


def test_views_are_the_same_for_one_seed_epoch_and_number_and_else_differ(load_views):
    found = all_views(train(load_views(count=64), views=4))
    assert torch.equal(found, all_views(train(load_views(count=64), views=4)))
    assert torch.equal(found[:, :2], all_views(train(load_views(count=64), views=2)))
    for changed in ({"seed": 2}, {"epoch": 2}):
        assert not torch.equal(found[:, 1], all_views(train(load_views(count=64), views=2, **changed))[:, 1])
    for one, other in itertools.combinations(range(4), 2):
        assert not torch.equal(found[:, one], found[:, other])


def test_views_of_one_image_are_drawn_independently_of_each_other(load_views):
    data = load_views(count=4000, augmentation={"flip": {}}, view_augmentation={"flip": {}})
    found = all_views(train(data, batch_size=1000, views=3))
    mirrored = (found != data.images("train")[:, None]).flatten(2).any(2)  # [N, views]
    joint = torch.bincount((mirrored * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    assert ((joint - 500).abs() < 5 * (4000 * 1 / 8 * 7 / 8) ** 0.5).all()


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
def test_views_do_not_depend_on_the_start_or_the_batch_size(load_views, monkeypatch, chunk_bytes):
    data = load_views(count=100)
    whole = train(data, views=3)
    monkeypatch.setitem(vkd.data.resident.CHUNK_BYTES, "cpu", chunk_bytes)
    for start in range(len(whole) + 1):
        assert same(train(data, views=3, start_step=start), whole[start:])
    assert torch.equal(all_views(whole), all_views(train(data, views=3, batch_size=25)))


def test_views_are_torchvisions_for_the_drawn_choices(load_views):
    data = load_views(count=40, view_augmentation={"flip": {}, "crop": {"padding": 1}})
    found = all_views(train(data, seed=7, epoch=3, views=3))
    for view in (1, 2):
        random = generator(7, "view augmentation", view, 3)
        mirrored, places = (augmentation.draw(40, random, (6, 5)) for augmentation in data.view_augmentations)
        for index, image in enumerate(data.images("train")):
            expected = functional.horizontal_flip(image) if mirrored[index] else image
            expected = functional.crop(functional.pad(expected, [1] * 4), *places[index].tolist(), 6, 5)
            assert torch.equal(found[index, view], expected)


def test_views_leave_the_stored_images_and_the_global_random_state_as_they_were(load_views):
    data = load_views()
    stored, state = data.images("train").clone(), torch.get_rng_state()
    train(data, views=3)
    assert torch.equal(stored, data.images("train"))
    assert torch.equal(state, torch.get_rng_state())


def test_several_views_are_asked_of_data_that_were_loaded_for_several(load, load_views):
    for data, views in ((load(), 2), (load(), 0), (load_views(), 0)):
        with pytest.raises(ValueError, match=f"views={views}"):
            data.train_batches(seed=0, epoch=1, batch_size=8, drop_last=False, views=views)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"random_resized_crop": {}}, "dataset.view_augmentation.random_resized_crop: "),
        ({"crop": {"padding": -1}}, "dataset.view_augmentation.crop.padding=-1"),
        ({"mixup": {}}, "dataset.view_augmentation.mixup: "),
        ({"auto_augment": {}}, "dataset.view_augmentation.auto_augment: "),
    ],
)
def test_a_wrong_view_augmentation_is_named_where_several_views_are_wanted_alone(load, wrong, words):
    assert load(view_augmentation=wrong, channels=2).train_size == 41
    with pytest.raises(ConfigError) as caught:
        load(view_augmentation=wrong, channels=2, views=2)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "steps", "images"),
    [(40, 8, False, 5, 40), (41, 8, False, 5, 40), (42, 8, False, 6, 42), (42, 8, True, 5, 40), (9, 1, False, 9, 9)],
)
def test_steps_of_an_epoch_and_the_last_batch_of_one_image(load, count, batch_size, drop_last, steps, images):
    data = load(count=count)
    batches = train(data, batch_size=batch_size, drop_last=drop_last)
    assert data.steps_per_epoch(batch_size, drop_last) == len(batches) == steps
    assert sum(len(batch.targets) for batch in batches) == images


@pytest.mark.parametrize(("batch_size", "drop_last"), [(0, False), (-3, True), (50, True)])
def test_a_batch_size_that_gives_no_step_is_refused(load, batch_size, drop_last):
    with pytest.raises(ConfigError, match=r"recipe\.batch_size"):
        load().train_batches(seed=0, epoch=1, batch_size=batch_size, drop_last=drop_last)


def test_evaluation_keeps_the_order_and_every_image(load):
    data = load(val_fraction=0.2)
    assert data.sizes["train"] + data.sizes["val"] == 41
    for split in ("train", "val", "test"):
        batches = list(data.eval_batches(split, batch_size=4))
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(data.sizes[split]))
        assert torch.equal(torch.cat([batch.images for batch in batches]), data.images(split))
        assert torch.equal(torch.cat([batch.targets for batch in batches]), data.targets(split))


def test_train_and_val_share_no_image(load):
    data = load(val_fraction=0.3)
    stored = {image.numpy().tobytes() for image in data.images("train")}
    assert not stored & {image.numpy().tobytes() for image in data.images("val")}


def test_a_split_that_is_absent_is_a_value_error(load):
    data = load()
    assert data.splits_present == {"train", "test"}
    with pytest.raises(ValueError, match="no split 'val'"):
        data.eval_batches("val", batch_size=4)


def test_global_random_states_are_untouched(load):
    data = load()
    before = torch.get_rng_state()
    train(data)
    list(data.eval_batches("test", batch_size=4))
    assert torch.equal(before, torch.get_rng_state())


def test_two_passes_at_once_do_not_mix(load):
    data = load()
    expected = train(data)
    pairs = list(zip(*(data.train_batches(seed=1, epoch=1, batch_size=8, drop_last=False) for _ in "ab"), strict=True))
    assert same([one for one, _ in pairs], expected)
    assert same([other for _, other in pairs], expected)


def test_training_leaves_the_stored_images_as_they_were(load):
    data = load()
    before = data.images("train").clone()
    train(data)
    assert torch.equal(before, data.images("train"))


def test_the_description_of_a_data_set(load):
    data = load(mean=[0.1, 0.2, 0.3])
    assert (data.name, data.loading, data.channels, data.image_size) == ("mine", "resident", 3, (6, 5))
    assert (data.num_classes, data.train_size) == (4, 41)
    assert data.mean == [0.1, 0.2, 0.3]
    assert data.std == [0.25, 0.25, 0.25]
    assert len(data.identity) == 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": [0.1, 0.2]}, "dataset.mean has 2 values"),
        ({"image_size": 32}, "dataset.image_size=32"),
        ({"augmentation": {"random_resized_crop": {}}}, "random_resized_crop"),
    ],
)
def test_a_config_that_does_not_fit_the_images_names_its_key(load, fields, words):
    with pytest.raises(ConfigError) as caught:
        load(**fields)
    assert words in str(caught.value)


def test_a_config_file_gives_every_field_and_its_command(request):
    files = sorted((request.config.rootpath / "conf" / "dataset").glob("*.yaml"))
    assert {file.stem for file in files} >= {"digits", "fashion_mnist", "cifar10", "cifar100", "imagefolder"}
    for file in files:
        assert set(yaml.safe_load(file.read_text())["dataset"]) == set(DatasetConfig.__dataclass_fields__), file
        assert f"\n#   python -m vkd.train dataset={file.stem}" in file.read_text()


def test_every_config_file_augments_further_views_in_a_way_that_fits_its_images(request):
    for file in sorted((request.config.rootpath / "conf" / "dataset").glob("*.yaml")):
        fields = yaml.safe_load(file.read_text())["dataset"]
        loading = "resident" if fields["image_size"] is None else "streaming"
        assert build_augmentations(fields["view_augmentation"], loading, channels=len(fields["mean"])), file


def test_digits_are_normalised_by_the_figures_of_their_training_images(tmp_path, request):
    fields = yaml.safe_load((request.config.rootpath / "conf" / "dataset" / "digits.yaml").read_text())["dataset"]
    data = load_data(DatasetConfig(**{**fields, "val_fraction": 0.0}), tmp_path, device=CPU)
    assert isinstance(data, ResidentData)
    pixels = data.images("train").double() / 255
    assert data.mean == [round(float(pixels.mean()), 4)]
    assert data.std == [round(float(pixels.std(correction=0)), 4)]
