"""Readers on small copies of the real formats, and every fault that a file can have."""

import gzip
import hashlib
import pickle
import socket
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torchvision.datasets

from vkd.data import SOURCES, ImageArrays, load_data, load_source
from vkd.data.sources import content_identity
from vkd.errors import ConfigError, DataError

CPU = torch.device("cpu")


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


# digits


def test_digits_are_scikit_learns_scans_in_a_fixed_stratified_split(config, tmp_path):
    from sklearn.datasets import load_digits

    source = load_source(config("digits"), tmp_path)
    assert source.train.images.shape == (1297, 8, 8, 1)
    assert source.test.images.shape == (500, 8, 8, 1)
    assert np.abs(np.bincount(source.test.labels) - 50).max() <= 2
    together = np.concatenate([source.train.images, source.test.images])[..., 0]
    expected = np.rint(load_digits().images / 16 * 255).astype(np.uint8)
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in expected)
    assert source.test.labels[:8].tolist() == load_source(config("digits"), tmp_path).test.labels[:8].tolist()
    assert content_identity(source) == "9443cad4248a9a52b07f0d5abf00b3bd31ff1f543362e22d2813ded13da4045c"
    assert list(tmp_path.iterdir()) == []


# CIFAR and Fashion-MNIST


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A function that writes a small CIFAR in the published format, with its md5 sums in torchvision's lists."""

    def write(kind, label_key, names_key, count=20, classes=4):
        reader = getattr(torchvision.datasets, kind)
        random = np.random.RandomState(0)
        folder = tmp_path / "made" / reader.base_folder
        folder.mkdir(parents=True)
        written, sums = {}, {}
        for file, _ in [*reader.train_list, *reader.test_list]:
            data = random.randint(0, 256, (count, 3072), dtype=np.uint8)
            labels = [index % classes for index in range(count)]
            (folder / file).write_bytes(pickle.dumps({"data": data, label_key: labels}))
            written[file], sums[file] = data, md5(folder / file)
        meta = folder / reader.meta["filename"]
        meta.write_bytes(pickle.dumps({names_key: [f"name {index}" for index in range(classes)]}))
        monkeypatch.setattr(reader, "train_list", [[file, sums[file]] for file, _ in reader.train_list])
        monkeypatch.setattr(reader, "test_list", [[file, sums[file]] for file, _ in reader.test_list])
        monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(meta)})
        return reader, folder, written

    return write


@pytest.mark.parametrize(
    ("name", "kind", "label_key", "names_key", "files"),
    [
        ("cifar10", "CIFAR10", "labels", "label_names", 5),
        ("cifar100", "CIFAR100", "fine_labels", "fine_label_names", 1),
    ],
)
def test_cifar_is_read_from_its_original_files(
    name, kind, label_key, names_key, files, cifar, config, tmp_path, no_network
):
    reader, folder, written = cifar(kind, label_key, names_key)
    folder.rename(tmp_path / reader.base_folder)
    source = load_source(config(name), tmp_path)
    first = written[reader.train_list[0][0]]
    assert source.train.images.shape == (20 * files, 32, 32, 3)
    assert source.test.images.shape == (20, 32, 32, 3)
    assert source.train.images.dtype == np.uint8
    assert source.train.labels.dtype == np.int64
    red, green, blue = first[7].reshape(3, 32, 32)
    assert np.array_equal(source.train.images[7], np.dstack([red, green, blue]))
    assert source.train.labels[:6].tolist() == [0, 1, 2, 3, 0, 1]
    assert source.class_names == ["name 0", "name 1", "name 2", "name 3"]


def test_an_archive_placed_by_hand_is_unpacked_without_a_network(cifar, config, tmp_path, monkeypatch, no_network):
    reader, folder, _ = cifar("CIFAR100", "fine_labels", "fine_label_names")
    archive = tmp_path / "root" / reader.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, reader.base_folder)
    monkeypatch.setattr(reader, "tgz_md5", md5(archive))
    assert len(load_source(config("cifar100"), tmp_path / "root").train.labels) == 20
    assert sorted(path.name for path in archive.parent.iterdir()) == [reader.base_folder, reader.filename]


def test_a_damaged_original_file_is_never_unpickled(cifar, config, tmp_path, no_network):
    reader, folder, _ = cifar("CIFAR100", "fine_labels", "fine_label_names")
    folder.rename(tmp_path / reader.base_folder)
    (tmp_path / reader.base_folder / "train").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(DataError, match="cifar-100-python/train"):
        load_source(config("cifar100"), tmp_path)
    assert not (tmp_path / "touched").exists()


def write_idx(folder, files):
    folder.mkdir(parents=True)
    for file, array in files.items():
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / file).write_bytes(header + array.tobytes())


IDX = {
    "train-images-idx3-ubyte": np.random.RandomState(0).randint(0, 256, (30, 28, 28), dtype=np.uint8),
    "train-labels-idx1-ubyte": np.arange(30, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte": np.random.RandomState(1).randint(0, 256, (10, 28, 28), dtype=np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
}


def test_fashion_mnist_is_read_from_its_original_files(config, tmp_path, no_network):
    write_idx(tmp_path / "FashionMNIST" / "raw", IDX)
    source = load_source(config("fashion_mnist"), tmp_path)
    assert np.array_equal(source.train.images[..., 0], IDX["train-images-idx3-ubyte"])
    assert np.array_equal(source.test.labels, np.arange(10))
    assert source.class_names[9] == "Ankle boot"


def test_fashion_mnist_is_made_from_archives_placed_by_hand(config, tmp_path, no_network):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw, IDX)
    for file in IDX:
        archive = raw / f"{file}.gz"
        archive.write_bytes(gzip.compress((raw / file).read_bytes()))
        (raw / file).unlink()
    whole = archive.read_bytes()
    for damaged in (whole[:-20], whole[:10] + b"\xff" * 20 + whole[30:], b"not packed"):
        archive.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            load_source(config("fashion_mnist"), tmp_path)
        assert f"{archive} is damaged" in str(caught.value)
    assert len(list(raw.iterdir())) == 4
    archive.write_bytes(whole)
    assert load_source(config("fashion_mnist"), tmp_path).train.images.shape == (30, 28, 28, 1)


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: whole[:7], lambda whole: whole[:5000], lambda whole: b"\xff" * 400]
)
def test_a_damaged_idx_file_is_reported(damage, config, tmp_path, no_network):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw, IDX)
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match="FashionMNIST/raw/train-images-idx3-ubyte"):
        load_source(config("fashion_mnist"), tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", ["cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz", "www.cs.toronto.edu"]),
        ("cifar100", ["cifar-100-python/train", "cifar-100-python.tar.gz", "www.cs.toronto.edu"]),
        ("fashion_mnist", ["FashionMNIST/raw/train-images-idx3-ubyte", "fashion-mnist.s3-website"]),
    ],
)
def test_without_data_and_network_the_message_says_what_to_place_where(name, words, config, tmp_path, no_network):
    root = tmp_path / "not" / "yet"
    with pytest.raises(DataError) as caught:
        load_source(config(name), root)
    message = str(caught.value)
    for word in [*words, str(root), f"{name}/train.npz", "could not be reached", "name resolution", "dataset=digits"]:
        assert word in message
    assert not root.exists()
    assert socket.getdefaulttimeout() is None


# Packed files


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_packed_files_of_any_name_are_read(config, write_packed, tmp_path):
    write_packed(split="train", count=20)
    write_packed(split="test", count=8, savez=np.savez_compressed)
    source = load_source(config("mine"), tmp_path)
    with np.load(tmp_path / "mine" / "train.npz") as stored:
        assert np.array_equal(source.train.images, stored["images"])
        assert np.array_equal(source.train.labels, stored["labels"])
    assert source.val is None
    assert source.class_names == ["class 0", "class 1", "class 2", "class 3"]
    assert source.test.images.shape == (8, 6, 5, 3)
    write_packed(split="val", count=4)
    assert len(load_source(config("mine"), tmp_path).val.labels) == 4


def test_packed_files_come_before_the_registered_data_set(config, write_packed, tmp_path, no_network):
    write_packed("cifar100", "train")
    write_packed("cifar100", "test")
    assert len(load_source(config("cifar100"), tmp_path).train.labels) == 20


def faults():
    images, labels = np.zeros((20, 6, 5, 3), np.uint8), np.arange(20) % 4
    return {
        "no labels": ({"labels": None}, ["no labels"]),
        "float images": ({"images": images.astype(np.float32)}, ["images is float32", "uint8 [N, H, W, C]"]),
        "flat images": ({"images": images.reshape(20, -1)}, ["images is uint8 [20, 90]"]),
        "no pixels": ({"images": images[:, :0]}, ["no pixels"]),
        "short labels": ({"labels": labels[:-1]}, ["20 images, but 19 labels"]),
        "int32 labels": ({"labels": labels.astype(np.int32)}, ["labels is int32"]),
        "large label": ({"labels": labels + 1}, ["label 4", "0 to 3"]),
        "negative label": ({"labels": labels - 1}, ["label -1"]),
        "empty class": ({"labels": labels // 2}, ["no image of class 'class 2'", "2 such"]),
        "numbered names": ({"class_names": np.arange(4)}, ["class_names is int64"]),
        "twin names": ({"class_names": np.array(["a", "b", "b", "c"])}, ["two classes of one name"]),
        "one class": ({"labels": labels * 0, "class_names": np.array(["a"])}, ["one class"]),
        "other names": ({"class_names": np.array(["a", "b", "c", "d"])}, ["class_names", "test.npz"]),
        "other shape": ({"images": np.zeros((20, 7, 5, 3), np.uint8)}, ["[7, 5, 3]"]),
        "nothing": ({"images": images[:0], "labels": labels[:0]}, ["no images"]),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_faulty_packed_file_is_named_with_its_fault(fault, config, write_packed, tmp_path):
    arrays, words = faults()[fault]
    names = {key: value for key, value in arrays.items() if key == "class_names" and fault != "other names"}
    write_packed(split="test", **names)
    path = write_packed(split="train", **arrays)
    with pytest.raises(DataError) as caught:
        load_source(config("mine"), tmp_path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_no_damage_to_a_packed_file_goes_unnoticed_or_shows_a_traceback(savez, config, write_packed, tmp_path):
    write_packed(split="test")
    path = write_packed(split="train", savez=savez)
    whole, identity = path.read_bytes(), content_identity(load_source(config("mine"), tmp_path))
    random = np.random.RandomState(0)
    damaged = [whole[:length] for length in (0, 1, 30, len(whole) // 2, len(whole) - 1)]
    for _ in range(150):
        changed = bytearray(whole)
        changed[random.randint(len(whole))] ^= 1 << random.randint(8)
        damaged.append(bytes(changed))
    messages = []
    for content in damaged:
        path.write_bytes(content)
        try:
            source = load_source(config("mine"), tmp_path)
        except DataError as error:
            messages.append(str(error))
        else:
            assert content_identity(source) == identity  # a bit of the archive that means nothing
    assert len(messages) > 100
    assert all(str(tmp_path / "mine") in message for message in messages)


def test_a_pickled_array_is_refused_and_not_executed(config, write_packed, tmp_path):
    write_packed(split="test")
    path = write_packed(split="train", labels=np.array([Touch(tmp_path / "touched")] * 20, dtype=object))
    with pytest.raises(DataError) as caught:
        load_source(config("mine"), tmp_path)
    assert f"{path}: labels is an array of Python objects" in str(caught.value)
    assert not (tmp_path / "touched").exists()


def test_a_zip_bomb_is_refused_unread(config, write_packed, tmp_path):
    write_packed(split="test")
    images = np.zeros((20, 2000, 2000, 1), np.uint8)
    path = write_packed(split="train", images=images, savez=np.savez_compressed)
    assert path.stat().st_size < 200_000
    with pytest.raises(DataError, match="would unpack to 80,000,"):
        load_source(config("mine"), tmp_path)


@pytest.mark.parametrize("shape", ["(99999999999, 32, 32, 3)", "(-1, 32, 32, 3)", "(2, 2)", "(9,)" * 3])
def test_a_header_that_claims_more_than_is_there_is_refused(shape, config, write_packed, tmp_path):
    write_packed(split="test")
    path = write_packed(split="train")
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100))
    with pytest.raises(DataError) as caught:
        load_source(config("mine"), tmp_path)
    assert f"{path} is damaged" in str(caught.value)


def test_half_a_pair_of_packed_files_is_not_passed_over(config, write_packed, tmp_path):
    write_packed("digits", "train")
    with pytest.raises(DataError, match=r"test\.npz is not"):
        load_source(config("digits"), tmp_path)


def test_an_unknown_name_is_answered_with_near_ones_and_the_place_for_packed_files(config, write_packed, tmp_path):
    write_packed("cifar50", "train")
    with pytest.raises(DataError) as caught:
        load_source(config("cifar1000"), tmp_path)
    for word in ["'cifar1000'", "dataset.name=cifar100", "cifar50", str(tmp_path / "cifar1000" / "train.npz")]:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "/etc", "a\\b"])
def test_a_name_that_leaves_the_data_root_is_refused(name, config, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.name"):
        load_source(config(name), tmp_path)


# Image folders


def folder_config(config, root, **fields):
    return config("imagefolder", root=str(root), image_size=16, **fields)


def test_an_image_folder_is_read_in_a_fixed_order(config, image_folder, tmp_path):
    root = image_folder()
    nested = root / "train" / "bee" / "images"
    nested.mkdir()
    (root / "train" / "bee" / "3.png").rename(nested / "3.JPEG")
    (root / "train" / "bee" / ".hidden.png").write_bytes(b"x")
    (root / "train" / "bee" / "notes.txt").write_bytes(b"x")
    (root / "train" / ".cache").mkdir()
    source = load_source(folder_config(config, root), tmp_path)
    assert source.class_names == ["ant", "bee", "cat"]
    bees = [path for path in source.train.paths if "bee" in path]
    assert bees == ["train/bee/0.png", "train/bee/1.png", "train/bee/2.png", "train/bee/images/3.JPEG"]
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.train.sizes_in_bytes[0] == (root / "train" / "ant" / "0.png").stat().st_size
    assert source.val is not None
    assert source.notes == [f"left out of {root / 'train'}, by the end of the name: 1 file"]


def test_without_test_the_val_folder_is_the_test_split_and_a_note_says_so(config, image_folder, tmp_path):
    source = load_source(folder_config(config, image_folder(("train", "val"))), tmp_path)
    assert source.val is None
    assert source.test.paths[0] == "val/ant/0.png"
    assert any("no test/" in note for note in source.notes)


def test_identity_follows_content_and_not_place(config, image_folder, tmp_path):
    first = load_source(folder_config(config, image_folder(name="one")), tmp_path)
    second = load_source(folder_config(config, image_folder(name="two")), tmp_path)
    assert content_identity(first) == content_identity(second)
    (tmp_path / "two" / "train" / "ant" / "0.png").write_bytes(b"shorter")
    third = load_source(folder_config(config, tmp_path / "two"), tmp_path)
    assert content_identity(first) != content_identity(third)


def broken_folders():
    return {
        "no train": (lambda root: (root / "train").rename(root / "training"), "{root}/train is not there"),
        "no other": (
            lambda root: [(root / part).rename(root / f"x{part}") for part in ("val", "test")],
            "{root}/test nor",
        ),
        "new class": (
            lambda root: (root / "test" / "ant").rename(root / "test" / "ants"),
            "{root}/test/ants is a class",
        ),
        "empty class": (lambda root: (root / "train" / "dog").mkdir(), "{root}/train/dog has no images"),
        "flat": (
            lambda root: [(folder.rename(root / f"x{folder.name}")) for folder in list((root / "test").iterdir())],
            "{root}/test has no class folders",
        ),
    }


@pytest.mark.parametrize("fault", broken_folders())
def test_a_broken_image_folder_names_the_path(fault, config, image_folder, tmp_path):
    root = image_folder()
    damage, words = broken_folders()[fault]
    damage(root)
    with pytest.raises(DataError) as caught:
        load_source(folder_config(config, root), tmp_path)
    assert words.format(root=root) in str(caught.value)


def test_a_root_that_is_absent_or_a_file_is_named(config, tmp_path):
    (tmp_path / "file").write_text("x")
    for root, words in [(tmp_path / "none", "does not exist"), (tmp_path / "file", "is not a folder")]:
        with pytest.raises(DataError, match=words) as caught:
            load_source(folder_config(config, root), tmp_path)
        assert f"dataset.root={root}" in str(caught.value)
    with pytest.raises(DataError, match=r"dataset\.root is null"):
        load_source(config("imagefolder"), tmp_path)


# Splitting and the yaml files


def test_labels_of_test_change_nothing_in_train_and_val(config, write_packed, tmp_path):
    def batches():
        data = load_data(config("mine", val_fraction=0.2), tmp_path, device=CPU)
        train = data.train_batches(seed=0, epoch=1, batch_size=5, drop_last=False)
        return [
            [(b.images, b.targets, b.indices) for b in part] for part in (train, data.eval_batches("val", batch_size=5))
        ]

    write_packed(split="train", count=40)
    write_packed(split="test", count=20)
    before = batches()
    write_packed(split="test", count=20, labels=(np.arange(20) + 1) % 4)
    for one, other in zip(before, batches(), strict=True):
        assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_the_data_sets_own_val_is_used_when_there_is_to_be_one(config, write_packed, tmp_path):
    for split, count in (("train", 40), ("val", 12), ("test", 20)):
        write_packed(split=split, count=count)
    data = load_data(config("mine"), tmp_path, device=CPU)
    assert data.sizes == {"train": 40, "val": 12, "test": 20}
    assert any("own val" in note for note in data.notes)
    data = load_data(config("mine", val_fraction=0.0), tmp_path, device=CPU)
    assert data.splits_present == {"train", "test"}


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 7, float("nan")])
def test_an_impossible_val_fraction_names_its_key(fraction, config, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.val_fraction"):
        load_data(config(val_fraction=fraction), tmp_path, device=CPU)


def test_a_val_fraction_that_leaves_a_class_no_train_image_is_refused(config, write_packed, tmp_path):
    write_packed(split="train")
    write_packed(split="test")
    with pytest.raises(DataError, match=r"val_fraction=0.95 leaves class 'class 0' with 5 images none"):
        load_data(config("mine", val_fraction=0.95), tmp_path, device=CPU)
    write_packed(split="train", labels=np.array([0, *[1, 2, 3] * 6, 1]))
    data = load_data(config("mine", val_fraction=0.1), tmp_path, device=CPU)
    assert any("absent from val" in note for note in data.notes)


def test_every_registered_data_set_is_documented():
    assert all(SOURCES[name].__doc__ for name in SOURCES)
    assert ImageArrays.__doc__
