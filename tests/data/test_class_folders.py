"""ImageNet and Tiny-ImageNet in the folders in which they are published, and what may be wrong with them."""

import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from published_formats import classes_by_path, colour, fails, write_lines, write_photo

from vkd.config import DatasetConfig, config_directory
from vkd.data import load_data, load_source
from vkd.data.sources import content_identity

WNIDS = ["n02124075", "n01443537", "n04067472"]
"""Not sorted, as in wnids.txt."""


def write_imagenet(root):
    """Three of ImageNet's classes in `root`/imagenet; returns {split: {path: wnid}}, paths relative to imagenet/."""
    folder = root / "imagenet"
    names = {
        "train": {f"train/{wnid}/{wnid}_{image}.JPEG": wnid for wnid in WNIDS for image in (7, 10)},
        "test": {f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(WNIDS[::-1])},
    }
    for images in names.values():
        for path in images:
            write_photo(folder, path)
    return names


def write_tiny_imagenet(root, name="tiny-imagenet-200"):
    """Three of Tiny-ImageNet's classes in `root`/`name`; returns {split: {path: wnid}}, paths relative to it."""
    folder = root / name
    train = {f"train/{wnid}/images/{wnid}_{image}.JPEG": wnid for wnid in WNIDS for image in range(3)}
    val = {f"val/images/val_{image}.JPEG": WNIDS[image % 3] for image in range(11)}
    for path in (*train, *val, "test/images/test_0.JPEG"):
        write_photo(folder, path)
    for wnid in WNIDS:
        write_lines(folder / "train" / wnid / f"{wnid}_boxes.txt", [f"{wnid}_0.JPEG\t0\t10\t63\t58"])
    lines = [f"{path.removeprefix('val/images/')}\t{wnid}\t0\t32\t44\t62" for path, wnid in val.items()]
    write_lines(folder / "val" / "val_annotations.txt", lines)
    write_lines(folder / "wnids.txt", WNIDS)
    words = ["Egyptian cat", "goldfish, Carassius auratus", "reel"]
    write_lines(folder / "words.txt", ["n00001740\tentity", *map("\t".join, zip(WNIDS, words, strict=True))])
    return {"train": train, "test": val}


@pytest.fixture
def load(config, tmp_path):
    """A function that loads the source of a name from the data root `tmp_path`."""
    return lambda name, **fields: load_source(config(name, **fields), tmp_path)


def check_pictures(name, root, written, class_of):
    """Loads a data set as its yaml says and checks shapes, and each test picture's colour and label."""
    chosen = yaml.safe_load((config_directory() / "dataset" / f"{name}.yaml").read_text())["dataset"]
    data = load_data(DatasetConfig(**{**chosen, "val_fraction": 0.0}), root, device=torch.device("cpu"), workers=0)
    size = {"imagenet": 224, "tiny_imagenet": 64}[name]
    batch = next(data.train_batches(seed=1, epoch=1, batch_size=3, drop_last=True))
    assert batch.images.shape == (3, 3, size, size)
    seen = {}
    for batch in data.eval_batches("test", batch_size=2):
        for image, target in zip(batch.images, batch.targets.tolist(), strict=True):
            assert (image == image[:, :1, :1]).all()
            seen[tuple(image[:, 0, 0].tolist())] = data.class_names[target]
    assert seen == {colour(path): class_of(wnid) for path, wnid in written["test"].items()}


# ImageNet


def test_imagenet_counts_the_sorted_wnids_and_its_val_split_is_the_test_split(load, tmp_path):
    written, source = write_imagenet(tmp_path), load("imagenet")
    assert source.class_names == sorted(WNIDS)
    assert source.val is None
    for split, expected in written.items():
        assert classes_by_path(source, split) == expected
        assert getattr(source, split).paths == sorted(expected)
    assert any("val split is the test split" in note for note in source.notes)
    check_pictures("imagenet", tmp_path, written, lambda wnid: wnid)


def test_a_part_of_imagenet_is_noted_as_such(load, tmp_path):
    write_imagenet(tmp_path)
    (note,) = [note for note in load("imagenet").notes if "whole" in note]
    assert "6 train, 3 test, 3 classes; published: 1,281,167 train, 50,000 test, 1,000 classes" in note


def test_imagenet_may_lie_where_dataset_root_says(load, tmp_path):
    write_imagenet(tmp_path)
    before = content_identity(load("imagenet"))
    (tmp_path / "imagenet").rename(tmp_path / "elsewhere")
    assert content_identity(load("imagenet", root=str(tmp_path / "elsewhere"))) == before


@pytest.mark.parametrize("missing", ["train", "val", "."])
def test_without_imagenet_the_message_says_where_to_get_it_and_nothing_is_left(missing, load, tmp_path):
    write_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet" / missing)
    before = sorted(tmp_path.rglob("*"))
    message = fails(load, "imagenet")
    gone = tmp_path / "imagenet" / (missing if missing != "." else "train")
    for word in [f"{gone} is not there", "image-net.org", "ILSVRC2012_img_train.tar", "dataset.root="]:
        assert word in message
    assert sorted(tmp_path.rglob("*")) == before


def test_the_flat_val_folder_of_imagenets_archive_is_explained(load, tmp_path):
    write_imagenet(tmp_path)
    val = tmp_path / "imagenet" / "val"
    for image in list(val.rglob("*.JPEG")):
        image.rename(val / image.name)
        image.parent.rmdir()
    message = fails(load, "imagenet")
    assert f"{val} has no class folders" in message
    assert "not the flat folder of the archive" in message


def test_a_class_that_imagenets_train_folder_lacks_is_named(load, tmp_path):
    write_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet" / "train" / WNIDS[0])
    assert f"{tmp_path / 'imagenet' / 'val' / WNIDS[0]} is a class" in fails(load, "imagenet")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="every folder can be read by root")
def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(load, tmp_path):
    write_imagenet(tmp_path)
    closed = tmp_path / "imagenet" / "train" / WNIDS[0]
    closed.chmod(0)
    try:
        assert f"{closed} cannot be read" in fails(load, "imagenet")
    finally:
        closed.chmod(0o755)


def test_a_link_to_nothing_is_named(load, tmp_path):
    write_imagenet(tmp_path)
    link = tmp_path / "imagenet" / "train" / WNIDS[0] / "link.JPEG"
    link.symlink_to(tmp_path / "nothing")
    assert f"{link} cannot be read" in fails(load, "imagenet")


# Tiny-ImageNet


@pytest.mark.parametrize("name", ["tiny-imagenet-200", "tiny_imagenet"])
def test_tiny_imagenet_is_read_as_published(name, load, tmp_path):
    written, source = write_tiny_imagenet(tmp_path, name), load("tiny_imagenet")
    assert source.class_names == ["goldfish, Carassius auratus", "Egyptian cat", "reel"]
    words = dict(zip(sorted(WNIDS), source.class_names, strict=True))
    for split, expected in written.items():
        assert classes_by_path(source, split) == {path: words[wnid] for path, wnid in expected.items()}
        files = getattr(source, split)
        assert files.paths == sorted(expected)
        assert files.labels.dtype == files.sizes_in_bytes.dtype == np.int64
        assert files.sizes_in_bytes.tolist() == [(tmp_path / name / path).stat().st_size for path in files.paths]
    assert source.val is None
    assert len(source.notes) == 2
    assert "val split is the test split" in source.notes[0]
    assert "published: 100,000 train, 10,000 test, 200 classes" in source.notes[1]
    check_pictures("tiny_imagenet", tmp_path, written, words.get)


def test_the_sorted_form_of_tiny_imagenets_val_folder_is_read_too(load, tmp_path):
    write_tiny_imagenet(tmp_path)
    published, val = load("tiny_imagenet"), tmp_path / "tiny-imagenet-200" / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        file, wnid = line.split("\t")[:2]
        (val / wnid).mkdir(exist_ok=True)
        (val / "images" / file).rename(val / wnid / file)
    (val / "images").rmdir()
    source = load("tiny_imagenet")
    assert (source.class_names, source.notes) == (published.class_names, published.notes)
    mine, theirs = classes_by_path(source, "test"), classes_by_path(published, "test")
    by_name = [{path.rsplit("/", 1)[1]: name for path, name in images.items()} for images in (mine, theirs)]
    assert by_name[0] == by_name[1]


def test_without_words_the_classes_are_called_by_their_wnids(load, tmp_path):
    write_tiny_imagenet(tmp_path)
    words = tmp_path / "tiny-imagenet-200" / "words.txt"
    write_lines(words, [f"{WNIDS[0]}\tcrane", f"{WNIDS[2]}\tcrane"])
    assert load("tiny_imagenet").class_names == ["n01443537", "crane (n02124075)", "crane (n04067472)"]
    words.unlink()
    assert load("tiny_imagenet").class_names == sorted(WNIDS)


def test_classes_without_a_test_image_are_counted(load, tmp_path):
    write_tiny_imagenet(tmp_path)
    write_lines(tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt", [f"val_0.JPEG\t{WNIDS[0]}\t0\t0\t9\t9"])
    assert any("2 of the 3 classes have no test image" in note for note in load("tiny_imagenet").notes)


@pytest.mark.parametrize("missing", ["train", "val/val_annotations.txt", "val", "."])
def test_without_tiny_imagenet_the_message_says_where_to_get_it_and_nothing_is_left(missing, load, tmp_path):
    write_tiny_imagenet(tmp_path)
    path = tmp_path / "tiny-imagenet-200" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(tmp_path.rglob("*"))
    message = fails(load, "tiny_imagenet")
    gone = path if missing != "." else path / "train"
    for word in [f"{gone} is not there", "http://cs231n.stanford.edu/tiny-imagenet-200.zip", f"in {tmp_path}"]:
        assert word in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", ["val_0.JPEG", "val_0.JPEG\tn00000000\t0\t0\t9\t9", f"../x.JPEG\t{WNIDS[0]}\t0", ""])
def test_a_line_of_the_annotations_that_makes_no_sense_is_named(line, load, tmp_path):
    write_tiny_imagenet(tmp_path)
    annotations = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    write_lines(annotations, [f"val_1.JPEG\t{WNIDS[0]}\t0\t0\t9\t9", line])
    assert f"{annotations}, line 2" in fails(load, "tiny_imagenet")


def test_an_annotated_image_that_is_missing_is_named(load, tmp_path):
    write_tiny_imagenet(tmp_path)
    image = tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_5.JPEG"
    image.unlink()
    assert f"{image} cannot be read" in fails(load, "tiny_imagenet")
