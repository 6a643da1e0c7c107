"""Data sets of photos in files, which torchvision's readers list.

Where the authors publish a validation split it is `Source.val`, which vkd selects on and never trains on, not even at
`dataset.val_fraction=0`; papers that train on train and val together for their last figure have more images.
Where they publish no split at all, one that never changes is made here, in the literature's usual proportions, and a
note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vkd.config import DatasetConfig
from vkd.data.contract import SOURCES, ImageFiles, Source, given_root, noting_size
from vkd.data.originals import Original, attribute, image_files
from vkd.data.splits import stratified_split
from vkd.errors import DataError

SPLIT_SEED = 0
"""Of the splits that are made here."""

Listing = Callable[[Any], tuple[list[Any], list[int]]]
"""The absolute paths of a reader's images and their labels."""


# Published splits


@SOURCES.register("dtd")
def dtd(config: DatasetConfig, data_root: Path) -> Source:
    """Describable Textures: 1,880 + 1,880 + 1,880 photos (train, val, test) of 47 textures; the first of 10 partitions.

    Cimpoi, Maji, Kokkinos, Mohamed, Vedaldi: Describing Textures in the Wild. CVPR 2014.
    """
    from torchvision.datasets import DTD

    original = Original(
        name="dtd",
        reader=DTD,
        parts={split: {"split": split, "partition": 1} for split in ("train", "val", "test")},
        files=["dtd/dtd"],
        archives={"dtd/dtd-r1.0.1.tar.gz": attribute(DTD, "_MD5")},
        urls=[attribute(DTD, "_URL")],
        assemble=_as_published,
    )
    return noting_size(original.source(config, data_root), train=1_880, val=1_880, test=1_880, classes=47)


@SOURCES.register("fgvc_aircraft")
def fgvc_aircraft(config: DatasetConfig, data_root: Path) -> Source:
    """FGVC-Aircraft: 3,334 + 3,333 + 3,333 photos (train, val, test) of 100 variants of aircraft.

    The banner with the photographer's name, the lowest 20 rows of pixels, is left in.

    Maji, Kannala, Rahtu, Blaschko, Vedaldi: Fine-Grained Visual Classification of Aircraft. arXiv 2013.
    """
    from torchvision.datasets import FGVCAircraft

    original = Original(
        name="fgvc_aircraft",
        reader=FGVCAircraft,
        parts={split: {"split": split, "annotation_level": "variant"} for split in ("train", "val", "test")},
        files=["fgvc-aircraft-2013b"],
        archives={"fgvc-aircraft-2013b.tar.gz": None},
        urls=[attribute(FGVCAircraft, "_URL")],
        assemble=_as_published,
    )
    return noting_size(original.source(config, data_root), train=3_334, val=3_333, test=3_333, classes=100)


@SOURCES.register("flowers102")
def flowers102(config: DatasetConfig, data_root: Path) -> Source:
    """Oxford Flowers-102: 1,020 + 1,020 + 6,149 photos (train, val, test) of 102 flowers.

    Nilsback, Zisserman: Automated Flower Classification over a Large Number of Classes. ICVGIP 2008.
    """
    from torchvision.datasets import Flowers102

    archives = dict(attribute(Flowers102, "_file_dict").values())
    folder = "flowers-102"
    original = Original(
        name="flowers102",
        reader=Flowers102,
        parts={split: {"split": split} for split in ("train", "val", "test")},
        files=[f"{folder}/jpg", f"{folder}/imagelabels.mat", f"{folder}/setid.mat"],
        archives={f"{folder}/{file}": md5 for file, md5 in archives.items()},
        urls=[attribute(Flowers102, "_download_url_prefix") + file for file in archives],
        assemble=_as_published,
    )
    return noting_size(original.source(config, data_root), train=1_020, val=1_020, test=6_149, classes=102)


@SOURCES.register("food101")
def food101(config: DatasetConfig, data_root: Path) -> Source:
    """Food-101: 75,750 + 25,250 photos of 101 dishes; the labels of the training images are noisy.

    Bossard, Guillaumin, Van Gool: Food-101 -- Mining Discriminative Components with Random Forests. ECCV 2014.
    """
    from torchvision.datasets import Food101

    original = Original(
        name="food101",
        reader=Food101,
        parts={split: {"split": split} for split in ("train", "test")},
        files=["food-101"],
        archives={"food-101.tar.gz": attribute(Food101, "_MD5")},
        urls=[attribute(Food101, "_URL")],
        assemble=_as_published,
    )
    return noting_size(original.source(config, data_root), train=75_750, test=25_250, classes=101)


@SOURCES.register("oxford_pets")
def oxford_pets(config: DatasetConfig, data_root: Path) -> Source:
    """Oxford-IIIT Pets: 3,680 + 3,669 photos ("trainval", test) of 37 breeds of cats and dogs.

    Parkhi, Vedaldi, Zisserman, Jawahar: Cats and Dogs. CVPR 2012.
    """
    from torchvision.datasets import OxfordIIITPet

    folder, resources = "oxford-iiit-pet", attribute(OxfordIIITPet, "_RESOURCES")
    original = Original(
        name="oxford_pets",
        reader=OxfordIIITPet,
        parts={"train": {"split": "trainval"}, "test": {"split": "test"}},
        files=[f"{folder}/images", f"{folder}/annotations"],
        archives={f"{folder}/{url.rsplit('/', 1)[1]}": md5 for url, md5 in resources},
        urls=[url for url, _ in resources],
        assemble=partial(_as_published, listing=lambda reader: (attribute(reader, "_images"), _labels(reader))),
    )
    return noting_size(original.source(config, data_root), train=3_680, test=3_669, classes=37)


@SOURCES.register("stanford_cars")
def stanford_cars(config: DatasetConfig, data_root: Path) -> Source:
    """Stanford Cars: 8,144 + 8,041 photos of 196 models of cars. Its authors no longer offer it.

    Krause, Stark, Deng, Fei-Fei: 3D Object Representations for Fine-Grained Categorization. 3dRR 2013.
    """
    from torchvision.datasets import StanfordCars

    original = Original(
        name="stanford_cars",
        reader=StanfordCars,
        parts={split: {"split": split} for split in ("train", "test")},
        files=[
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
        ],
        archives={},
        urls=[],
        assemble=partial(_as_published, listing=lambda reader: _unzipped(attribute(reader, "_samples"))),
    )
    return noting_size(original.source(config, data_root), train=8_144, test=8_041, classes=196)


# Splits that are made here


@SOURCES.register("caltech101")
def caltech101(config: DatasetConfig, data_root: Path) -> Source:
    """Caltech-101: 8,677 photos of 101 categories, without BACKGROUND_Google.

    No split is published. As is common, 30 images a class are for training and all others for the test: 3,030 + 5,647.
    Which ones, a fixed seed says.

    Fei-Fei, Fergus, Perona: Learning Generative Visual Models from Few Training Examples. CVPR Workshop 2004.
    """
    from torchvision.datasets import Caltech101

    categories = (given_root(config) or data_root) / "caltech101" / "101_ObjectCategories"
    if categories.is_dir() and not (categories / "BACKGROUND_Google").is_dir():
        raise DataError(
            f"{categories} has no folder BACKGROUND_Google, which torchvision wants to leave out itself",
            hint=f"mkdir {categories / 'BACKGROUND_Google'}",
        )
    original = Original(
        name="caltech101",
        reader=Caltech101,
        parts={"all": {}},
        files=["caltech101/101_ObjectCategories"],
        archives={"caltech101/caltech-101.zip": "3138e1922a9193bfa496528edbbc45d0"},
        urls=["https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"],
        assemble=_caltech101,
    )
    return noting_size(original.source(config, data_root), train=3_030, test=5_647, classes=101)


def _caltech101(parts: dict[str, Any], root: Path) -> Source:
    reader = parts["all"]
    names, labels = attribute(reader, "categories"), attribute(reader, "y")
    folder = root / "caltech101" / "101_ObjectCategories"
    numbers = zip(labels, attribute(reader, "index"), strict=True)
    paths = [folder / names[label] / f"image_{number:04d}.jpg" for label, number in numbers]
    images = image_files(root, paths, labels)
    test, train = _hold_each(images, names, 30)
    note = "Caltech-101 has no published split: a fixed draw of 30 images a class is train, all others are test"
    return Source(images.subset(train), None, images.subset(test), [str(name) for name in names], [note])


@SOURCES.register("eurosat")
def eurosat(config: DatasetConfig, data_root: Path) -> Source:
    """EuroSAT: 27,000 satellite images, 64x64x3 (the RGB version), of 10 kinds of land.

    No split is published. As in its paper, 80 % are for training and 20 % for the test, class by class: 21,600 + 5,400.
    Which ones, a fixed seed says.

    Helber, Bischke, Dengel, Borth: EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover
    Classification. IEEE JSTARS 2019.
    """
    from torchvision.datasets import EuroSAT

    original = Original(
        name="eurosat",
        reader=EuroSAT,
        parts={"all": {}},
        files=["eurosat/2750"],
        archives={"eurosat/EuroSAT.zip": "c8fa014336c82ac7804f0398fcb19387"},
        urls=[
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
        ],
        assemble=_eurosat,
    )
    return noting_size(original.source(config, data_root), train=21_600, test=5_400, classes=10)


def _eurosat(parts: dict[str, Any], root: Path) -> Source:
    images = image_files(root, *_unzipped(attribute(parts["all"], "samples")))
    train, test = stratified_split(images.labels, 0.2, SPLIT_SEED)
    names = [str(name) for name in attribute(parts["all"], "classes")]
    note = "EuroSAT has no published split: a fixed draw of 20 % of each class is test, all others are train"
    return Source(images.subset(train), None, images.subset(test), names, [note])


@SOURCES.register("sun397")
def sun397(config: DatasetConfig, data_root: Path) -> Source:
    """SUN397: photos of 397 kinds of places, 50 + 50 (train, test) of each: 19,850 + 19,850 of the 108,754.

    The authors publish ten partitions of that size, apart from the images. The first is used where Training_01.txt and
    Testing_01.txt, from their Partitions.zip, lie in SUN397/ or SUN397/Partitions/; elsewhere a fixed seed chooses.

    Xiao, Hays, Ehinger, Oliva, Torralba: SUN Database: Large-scale Scene Recognition from Abbey to Zoo. CVPR 2010.
    """
    from torchvision.datasets import SUN397

    original = Original(
        name="sun397",
        reader=SUN397,
        parts={"all": {}},
        files=["SUN397"],
        archives={"SUN397.tar.gz": attribute(SUN397, "_DATASET_MD5")},
        urls=[attribute(SUN397, "_DATASET_URL")],
        assemble=_sun397,
    )
    return noting_size(original.source(config, data_root), train=19_850, test=19_850, classes=397)


def _sun397(parts: dict[str, Any], root: Path) -> Source:
    names = [str(name) for name in attribute(parts["all"], "classes")]
    images = image_files(root, attribute(parts["all"], "_image_files"), _labels(parts["all"]))
    for folder in (root / "SUN397", root / "SUN397" / "Partitions"):
        lists = [folder / f"{part}_01.txt" for part in ("Training", "Testing")]
        if all(file.is_file() for file in lists):
            train, test = (_listed(file, images) for file in lists)
            note = f"the split is the authors' first partition, from {folder}"
            break
    else:
        rest, train = _hold_each(images, names, 50)
        _, test = _hold_each(images.subset(rest), names, 50)
        test = rest[test]
        note = (
            f"the authors' partitions are not in {root / 'SUN397'} (Training_01.txt, Testing_01.txt), so a fixed draw "
            "of 50 images a class is train, one of 50 others is test"
        )
    return Source(images.subset(train), None, images.subset(test), names, [note])


def _listed(file: Path, images: ImageFiles) -> np.ndarray:
    """Positions of the images that a partition of SUN397 lists, as /a/abbey/<name>.jpg: int64 [M]."""
    position_of = {path: position for position, path in enumerate(images.paths)}
    positions = []
    for line in file.read_text(encoding="utf-8").split():
        if f"SUN397{line}" not in position_of:
            raise DataError(
                f"{file} lists {line}, which is not there", hint="restore the image, or delete both lists of images"
            )
        positions.append(position_of[f"SUN397{line}"])
    return np.sort(np.array(positions, dtype=np.int64))


# What they share


def _labels(reader: Any) -> list[int]:
    return attribute(reader, "_labels")


def _unzipped(samples: list[tuple[Any, int]]) -> tuple[list[Any], list[int]]:
    """(path, label) pairs as paths and labels."""
    return [path for path, _ in samples], [label for _, label in samples]


def _as_published(
    parts: dict[str, Any],
    root: Path,
    *,
    listing: Listing = lambda reader: (attribute(reader, "_image_files"), _labels(reader)),
) -> Source:
    """The source of the readers of "train", perhaps "val", and "test".

    Args:
        listing: how the reader keeps its paths and labels.
    """
    names = {part: [str(name) for name in attribute(reader, "classes")] for part, reader in parts.items()}
    for part, mine in names.items():
        if mine != names["train"]:
            raise DataError(
                f"the {part} list of images in {root} has other classes than the train list",
                expected=f"{len(names['train'])} of the same names, not {len(mine)}",
            )
    images = {part: image_files(root, *listing(reader)) for part, reader in parts.items()}
    return Source(images["train"], images.get("val"), images["test"], names["train"])


def _hold_each(images: ImageFiles, class_names: list[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits positions into kept ones and `count` held ones of each class, by `stratified_split` with a fixed seed.

    Returns:
        (kept, held): sorted positions, int64 [N - M] and int64 [M].
    """
    is_held = np.zeros(len(images.labels), dtype=bool)
    for label, name in enumerate(class_names):
        positions = np.flatnonzero(images.labels == label)
        if len(positions) < count:
            raise DataError(
                f"{images.root} has {len(positions)} images of class {name!r}",
                expected=f"{count} or more, of which the split takes {count}",
            )
        if len(positions) > count:
            positions = positions[stratified_split(images.labels[positions], count / len(positions), SPLIT_SEED)[1]]
        is_held[positions] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
