"""torchvision's readers on small copies of what is published: splits, labels, pixels, archives, and every fault."""

import functools
import http.server
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
import yaml
from published_formats import (
    PACKERS,
    WRITERS,
    classes_by_path,
    colour,
    fails,
    md5,
    pack,
    write_lines,
    write_stl10,
    write_svhn,
)

from vkd.config import DatasetConfig, config_directory
from vkd.data import SOURCES, load_data, load_source
from vkd.data.contract import noting_size
from vkd.data.sources import content_identity
from vkd.randomness import derive_seed

CPU = torch.device("cpu")
UNSPLIT = ["caltech101", "eurosat", "sun397"]
SPLIT = sorted(set(WRITERS) - set(UNSPLIT))
ARRAYS = {"svhn": write_svhn, "stl10": write_stl10}
ALL = {**WRITERS, **ARRAYS}


@pytest.fixture
def write(tmp_path, monkeypatch, no_network):
    """A function that writes a data set, of any name, into the data root `tmp_path / "data"`; there is no network."""

    def run(name):
        return ALL[name](tmp_path / "data", monkeypatch)

    return run


@pytest.fixture
def load(config, tmp_path):
    """A function that loads the source of a name from that data root."""
    return lambda name, **fields: load_source(config(name, **fields), tmp_path / "data")


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Splits, labels and pixels


@pytest.mark.parametrize("name", SPLIT)
def test_the_published_splits_and_classes_are_kept(name, write, load):
    written, source = write(name), load(name)
    assert (source.val is not None) == ("val" in written)
    for split, expected in written.items():
        assert classes_by_path(source, split) == expected


@pytest.mark.parametrize("name", WRITERS)
def test_files_come_in_the_order_of_their_paths_with_int64_labels_and_their_sizes(name, write, load, tmp_path):
    write(name)
    source = load(name)
    for files in filter(None, (source.train, source.val, source.test)):
        assert files.paths == sorted(files.paths)
        assert files.labels.dtype == files.sizes_in_bytes.dtype == np.int64
        assert files.sizes_in_bytes.tolist() == [(tmp_path / "data" / path).stat().st_size for path in files.paths]


@pytest.mark.parametrize("name", WRITERS)
def test_every_picture_comes_with_its_own_label(name, write, config, tmp_path):
    written = write(name)
    fields = {"image_size": 8, "crop_fraction": 1.0}
    data = load_data(config(name, **fields), tmp_path / "data", device=CPU, workers=0)
    name_of_colour = {colour(path): kind for images in written.values() for path, kind in images.items()}
    seen = 0
    for split in data.splits_present:
        for batch in data.eval_batches(split, batch_size=50):
            assert (batch.images == batch.images[:, :, :1, :1]).all()
            for pixel, target in zip(batch.images[:, :, 0, 0].tolist(), batch.targets.tolist(), strict=True):
                assert name_of_colour[tuple(pixel)] == data.class_names[target]
                seen += 1
    assert seen == sum(data.sizes.values()) > 10


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("dtd", ["banded", "dotted", "woven"]),
        ("fgvc_aircraft", ["Yak-42", "707-320", "F-16A/B", "Boeing 717"]),
        ("food101", ["apple_pie", "waffles"]),
        ("oxford_pets", ["Abyssinian", "Egyptian Mau", "American Bulldog"]),
        ("stanford_cars", ["AM General Hummer SUV 2000", "Volvo 240 Sedan 1993", "smart fortwo Convertible 2012"]),
        ("caltech101", ["Faces", "ant", "yin_yang"]),
        ("eurosat", ["AnnualCrop", "Forest", "SeaLake"]),
        ("sun397", ["abbey", "apartment_building/outdoor", "yard"]),
        ("svhn", [str(digit) for digit in range(10)]),
        ("stl10", ["airplane", "bird", "car"]),
    ],
)
def test_class_names_come_in_the_published_order(name, names, write, load):
    write(name)
    assert load(name).class_names == names


def test_the_flowers_are_named(write, load):
    write("flowers102")
    names = load("flowers102").class_names
    assert (len(names), names[0], names[73], names[101]) == (102, "pink primrose", "rose", "blackberry lily")


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_pixel_by_pixel(name, write, load):
    written, source = write(name), load(name)
    assert source.val is None
    for split, (pixels, labels) in written.items():
        arrays = getattr(source, split)
        assert np.array_equal(arrays.images, pixels)
        assert arrays.images.dtype == np.uint8
        assert arrays.labels.tolist() == labels.tolist()
        assert arrays.labels.dtype == np.int64


def test_the_unlabelled_images_of_stl10_are_neither_needed_nor_checked(write, load, tmp_path):
    write("stl10")
    (tmp_path / "data" / "stl10_binary" / "unlabeled_X.bin").write_bytes(b"not checked")
    assert len(load("stl10").train.labels) == 9


# Splits that are made here


def drawn(paths, count, label):
    """What a fixed seed draws of the sorted paths of a class: `count` of them."""
    stream = np.random.RandomState(derive_seed(0, "split", label) % 2**32)
    return {paths[position] for position in stream.permutation(len(paths))[:count]}


def sorted_by_class(written, names):
    return [sorted(path for path, kind in written["all"].items() if kind == name) for name in names]


def test_caltech101_trains_on_thirty_images_of_each_class_and_tests_on_all_others(write, load):
    written = write("caltech101")
    source = load("caltech101")
    mine = sorted_by_class(written, source.class_names)
    train = set().union(*(drawn(paths, 30, label) for label, paths in enumerate(mine)))
    assert set(source.train.paths) == train
    assert set(source.test.paths) == set(written["all"]) - train
    assert np.bincount(source.test.labels).tolist() == [10, 1, 3]
    assert any("no published split" in note for note in source.notes)


def test_eurosat_tests_on_a_fifth_of_each_class(write, load):
    written = write("eurosat")
    source = load("eurosat")
    mine = sorted_by_class(written, source.class_names)
    test = set().union(*(drawn(paths, len(paths) // 5, label) for label, paths in enumerate(mine)))
    assert set(source.test.paths) == test
    assert set(source.train.paths) == set(written["all"]) - test
    assert any("no published split" in note for note in source.notes)


def test_sun397_without_the_authors_lists_has_fifty_images_of_each_class_in_either_split(write, load):
    written = write("sun397")
    source = load("sun397")
    assert np.bincount(source.train.labels).tolist() == np.bincount(source.test.labels).tolist() == [50] * 3
    assert not set(source.train.paths) & set(source.test.paths)
    mine = sorted_by_class(written, source.class_names)
    assert set(source.train.paths) == set().union(*(drawn(paths, 50, label) for label, paths in enumerate(mine)))
    assert {**classes_by_path(source, "train"), **classes_by_path(source, "test")}.items() <= written["all"].items()
    assert any("Training_01.txt" in note and "fixed draw" in note for note in source.notes)


@pytest.mark.parametrize("folder", [".", "Partitions"])
def test_sun397_follows_the_authors_first_partition_where_it_is(folder, write, load, tmp_path):
    paths = sorted(write("sun397")["all"])
    expected = {"Training": paths[::20], "Testing": paths[7::25]}
    for part, mine in expected.items():
        lines = [path.removeprefix("SUN397") for path in reversed(mine)]
        write_lines(tmp_path / "data" / "SUN397" / folder / f"{part}_01.txt", lines)
    source = load("sun397")
    assert (source.train.paths, source.test.paths) == (expected["Training"], expected["Testing"])
    assert any("first partition" in note for note in source.notes)
    lists = tmp_path / "data" / "SUN397" / folder
    write_lines(lists / "Testing_01.txt", ["/a/abbey/sun_gone.jpg"])
    assert f"{lists / 'Testing_01.txt'} lists /a/abbey/sun_gone.jpg" in fails(load, "sun397")


def test_the_order_in_which_a_disk_lists_its_files_changes_nothing(write, load, monkeypatch):
    write("sun397")
    before, rglob = content_identity(load("sun397")), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(rglob(path, pattern))))
    assert content_identity(load("sun397")) == before


def test_a_class_with_fewer_images_than_the_split_takes_is_named(write, load, tmp_path):
    write("caltech101")
    folder = tmp_path / "data" / "caltech101" / "101_ObjectCategories" / "ant"
    for number in (30, 31):
        (folder / f"image_{number:04d}.jpg").unlink()
    message = fails(load, "caltech101")
    assert "29 images of class 'ant'" in message
    assert "30 or more" in message


def test_caltech101_without_its_background_folder_says_what_to_do(write, load, tmp_path):
    write("caltech101")
    background = tmp_path / "data" / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google"
    shutil.rmtree(background)
    assert f"mkdir {background}" in fails(load, "caltech101")


# Sizes


@pytest.mark.parametrize("name", WRITERS)
def test_a_part_of_a_data_set_is_noted_as_such(name, write, load):
    write(name)
    source = load(name)
    (note,) = [note for note in source.notes if "not the whole data set" in note]
    assert f"{len(source.train.labels):,} train" in note


def test_a_whole_data_set_has_no_such_note(write, load):
    write("dtd")
    source = load("dtd")
    whole = {"train": 6, "val": 6, "test": 6, "classes": 3}
    assert noting_size(source, **whole) is source
    for key in whole:
        assert len(noting_size(source, **{**whole, key: 9}).notes) == len(source.notes) + 1


# Archives in the data root


@pytest.mark.parametrize("name", PACKERS)
def test_archives_placed_by_hand_are_unpacked_without_a_network(name, write, load, tmp_path, monkeypatch):
    write(name)
    identity, files = content_identity(load(name)), everything_below(tmp_path / "data")
    archives = pack(tmp_path / "data", name)
    contents = [archive.read_bytes() for archive in archives]
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda *_args, **_kwargs: True)
    assert content_identity(load(name)) == identity
    placed = [archive.relative_to(tmp_path / "data").as_posix() for archive in archives]
    assert everything_below(tmp_path / "data") == sorted([*files, *placed])
    assert [archive.read_bytes() for archive in archives] == contents
    for archive in archives:
        archive.unlink()
    assert content_identity(load(name)) == identity


@pytest.mark.parametrize("name", sorted(set(PACKERS) - {"fgvc_aircraft"}))
def test_an_archive_that_fails_its_md5_is_named_and_left_alone(name, write, load, tmp_path):
    write(name)
    archive = pack(tmp_path / "data", name)[0]
    content, before = archive.read_bytes(), everything_below(tmp_path / "data")
    message = fails(load, name)
    assert f"{archive} is damaged: its md5 is not" in message
    assert archive.read_bytes() == content
    assert everything_below(tmp_path / "data") == before


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"no archive", lambda _: b""])
def test_an_archive_without_an_md5_that_cannot_be_unpacked_is_named(damage, write, load, tmp_path):
    write("fgvc_aircraft")
    (archive,) = pack(tmp_path / "data", "fgvc_aircraft")
    archive.write_bytes(damage(archive.read_bytes()))
    message = fails(load, "fgvc_aircraft")
    assert f"{archive}: data set 'fgvc_aircraft' cannot be made of this" in message
    assert everything_below(tmp_path / "data") == [archive.name]


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python cannot refuse such an archive")
def test_an_archive_that_would_write_elsewhere_is_refused(write, load, tmp_path):
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "fgvc-aircraft-2013b.tar.gz"
    (tmp_path / "file").write_text("x")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "file", "../../escaped")
    assert "cannot be made of this" in fails(load, "fgvc_aircraft")
    assert everything_below(tmp_path) == ["data", f"data/{archive.name}", "file"]
    assert tarfile.TarFile.extraction_filter is None


def test_a_python_that_cannot_check_where_an_archive_writes_unpacks_none_without_an_md5(
    write, load, tmp_path, monkeypatch
):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    write("fgvc_aircraft")
    pack(tmp_path / "data", "fgvc_aircraft")
    assert "unpacks archives without a check" in fails(load, "fgvc_aircraft")


# Nothing there, or half of it


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("caltech101", ["caltech101/101_ObjectCategories", "caltech101/caltech-101.zip", "data.caltech.edu"]),
        ("dtd", ["dtd/dtd", "dtd/dtd-r1.0.1.tar.gz", "www.robots.ox.ac.uk"]),
        ("eurosat", ["eurosat/2750", "eurosat/EuroSAT.zip", "huggingface.co"]),
        ("fgvc_aircraft", ["fgvc-aircraft-2013b; or", "fgvc-aircraft-2013b.tar.gz", "www.robots.ox.ac.uk"]),
        (
            "flowers102",
            ["flowers-102/jpg", "flowers-102/102flowers.tgz", "flowers-102/setid.mat", "www.robots.ox.ac.uk"],
        ),
        ("food101", ["food-101; or", "food-101.tar.gz", "data.vision.ee.ethz.ch"]),
        ("oxford_pets", ["oxford-iiit-pet/images", "oxford-iiit-pet/annotations.tar.gz", "www.robots.ox.ac.uk"]),
        ("stl10", ["stl10_binary/train_X.bin", "stl10_binary.tar.gz", "ai.stanford.edu", "stl10/train.npz"]),
        ("sun397", ["SUN397; or", "SUN397.tar.gz", "vision.princeton.edu"]),
        ("svhn", ["train_32x32.mat, test_32x32.mat", "ufldl.stanford.edu", "svhn/test.npz"]),
    ],
)
def test_without_data_and_network_the_message_says_what_to_place_where(name, words, load, tmp_path, no_network):
    message = fails(load, name)
    for word in [*words, str(tmp_path / "data"), "could not be reached", "name resolution", "fetch http"]:
        assert word in message
    assert not (tmp_path / "data").exists()


def test_stanford_cars_can_only_be_placed_by_hand(write, load, tmp_path):
    message = fails(load, "stanford_cars")
    for word in ["can no longer be fetched", str(tmp_path / "data"), "stanford_cars/devkit/cars_meta.mat", "cars_test"]:
        assert word in message
    assert not (tmp_path / "data").exists()
    write("stanford_cars")
    labels = tmp_path / "data" / "stanford_cars" / "cars_test_annos_withlabels.mat"
    labels.unlink()
    assert f"{labels} is not there" in fails(load, "stanford_cars")


def test_half_a_data_set_is_neither_replaced_nor_fetched(write, load, tmp_path):
    write("oxford_pets")
    shutil.rmtree(tmp_path / "data" / "oxford-iiit-pet" / "annotations")
    before = everything_below(tmp_path / "data")
    message = fails(load, "oxford_pets")
    folder = tmp_path / "data" / "oxford-iiit-pet"
    assert f"{folder / 'images'} is there, but data set 'oxford_pets' is not whole" in message
    assert f"{folder / 'annotations'} is not there" in message
    assert everything_below(tmp_path / "data") == before


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"eurosat", "sun397"}))
def test_a_listed_image_that_is_missing_is_named(name, write, load, tmp_path):
    written = write(name)
    path = tmp_path / "data" / next(iter(written.get("test", written.get("all"))))
    path.unlink()
    if name == "caltech101":  # whose reader counts the files of a folder
        path.with_name("stray.txt").write_text("")
    assert str(path) in fails(load, name)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dtd", "dtd/dtd/labels/test1.txt"),
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data/images_variant_val.txt"),
        ("food101", "food-101/meta/test.json"),
        ("oxford_pets", "oxford-iiit-pet/annotations/trainval.txt"),
        ("stanford_cars", "stanford_cars/devkit/cars_meta.mat"),
        ("sun397", "SUN397/ClassName.txt"),
    ],
)
@pytest.mark.parametrize("content", [b"\xff\x00 nonsense\n", None])
def test_a_damaged_or_missing_list_is_one_message(name, file, content, write, load, tmp_path):
    write(name)
    path = tmp_path / "data" / file
    path.unlink() if content is None else path.write_bytes(content)
    message = fails(load, name)
    assert f"'{name}'" in message
    assert str(tmp_path / "data") in message
    assert not list((tmp_path / "data").glob(".fetching*"))


def test_splits_of_different_classes_are_refused(write, load, tmp_path):
    write("dtd")
    write_lines(tmp_path / "data" / "dtd" / "dtd" / "labels" / "val1.txt", ["banded/banded_10.jpg"])
    assert "the val list of images" in fails(load, "dtd")


@pytest.mark.parametrize(
    ("name", "kind", "attribute"),
    [
        ("dtd", "DTD", "_image_files"),
        ("food101", "Food101", "_labels"),
        ("oxford_pets", "OxfordIIITPet", "_images"),
        ("stanford_cars", "StanfordCars", "_samples"),
        ("eurosat", "EuroSAT", "samples"),
        ("caltech101", "Caltech101", "index"),
        ("svhn", "SVHN", "labels"),
    ],
)
def test_a_torchvision_that_keeps_its_lists_elsewhere_is_told_so(name, kind, attribute, write, load, monkeypatch):
    write(name)
    reader = getattr(torchvision.datasets, kind)
    initialise = reader.__init__

    def changed(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.__dict__["another" + attribute] = self.__dict__.pop(attribute)

    monkeypatch.setattr(reader, "__init__", changed)
    message = fails(load, name)
    assert f"keeps {attribute} of {kind} elsewhere" in message
    assert torchvision.__version__ in message


@pytest.mark.parametrize("name", ["dtd", "svhn"])
def test_dataset_root_stands_in_for_the_data_root(name, write, load, config, tmp_path):
    write(name)
    source = load_source(config(name, root=str(tmp_path / "data")), tmp_path / "other")
    assert content_identity(source) == content_identity(load(name))
    assert not (tmp_path / "other").exists()
    assert "dataset.root=/not/there does not exist" in fails(load, name, root="/not/there")


# Downloads, from this machine


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A folder and the address under which its files can be fetched."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_moved_in_whole_and_its_archive_is_not_kept(serve, load, tmp_path, monkeypatch):
    folder, address = serve
    written = ALL["dtd"](tmp_path / "data", monkeypatch)
    files = everything_below(tmp_path / "data" / "dtd" / "dtd")
    (archive,) = pack(tmp_path / "data", "dtd")
    archive.rename(folder / archive.name)
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{address}/{archive.name}")
    message = fails(load, "dtd")  # what is served is not what was published
    assert "127.0.0.1" in message
    assert "corrupted" in message
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(folder / archive.name))
    assert classes_by_path(load("dtd"), "test") == written["test"]
    assert everything_below(tmp_path / "data") == ["dtd", "dtd/dtd", *(f"dtd/dtd/{file}" for file in files)]


def test_only_what_is_missing_is_fetched(serve, load, tmp_path, monkeypatch):
    folder, address = serve
    written = write_svhn(tmp_path / "data", monkeypatch)
    (tmp_path / "data" / "test_32x32.mat").rename(folder / "test_32x32.mat")
    kind = torchvision.datasets.SVHN
    listed = {part: [f"{address}/{file}", file, md5] for part, (_, file, md5) in kind.split_list.items()}
    monkeypatch.setattr(kind, "split_list", listed)
    before = (tmp_path / "data" / "train_32x32.mat").stat()
    assert np.array_equal(load("svhn").test.images, written["test"][0])
    after = (tmp_path / "data" / "train_32x32.mat").lstat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert everything_below(tmp_path / "data") == ["test_32x32.mat", "train_32x32.mat"]
    # A file that fails its md5 is fetched again
    shutil.copy(tmp_path / "data" / "test_32x32.mat", folder / "test_32x32.mat")
    (tmp_path / "data" / "test_32x32.mat").write_bytes(b"damaged")
    assert np.array_equal(load("svhn").test.images, written["test"][0])


# The yaml files


def chosen(name):
    """The `dataset` group of a choice."""
    return DatasetConfig(**yaml.safe_load((config_directory() / "dataset" / f"{name}.yaml").read_text())["dataset"])


@pytest.mark.parametrize("name", ALL)
def test_the_config_of_a_data_set_trains_on_its_published_form(name, write, tmp_path):
    write(name)
    data = load_data(chosen(name), tmp_path / "data", device=CPU, workers=0)
    size = {"svhn": 32, "stl10": 96}.get(name, 224)
    batches = data.train_batches(seed=1, epoch=1, batch_size=3, drop_last=True)
    assert next(batches).images.shape == (3, 3, size, size)
    assert len(data.mean) == len(data.std) == 3
    assert next(data.eval_batches("test", batch_size=3)).images.shape == (3, 3, size, size)


def test_every_data_set_has_a_config_of_its_name_and_every_config_a_data_set():
    configs = {path.stem for path in (config_directory() / "dataset").glob("*.yaml")}
    assert configs == set(SOURCES)
    assert all(chosen(name).name == name for name in configs)
