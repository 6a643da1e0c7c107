"""Small copies of data sets in the form in which their authors publish them, and what a reader must find in them.

A writer puts one into a data root and returns, for each split, the class name of every image by its path. The picture
at a path has a colour that follows from the path; it is a PPM whatever its name says, so that the colour is exact.
"""

import hashlib
import json
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from scipy.io import savemat

from vkd.errors import DataError

SPLITS = ("train", "val", "test")


def md5(path):
    return hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()


def colour(path):
    """The (red, green, blue) of the picture at a path relative to the data root."""
    return tuple(zlib.crc32(path.encode()).to_bytes(4, "big")[:3])


def write_photo(root, path):
    """Writes the picture of a path, 8x8; returns the path."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(b"P6 8 8 255\n" + bytes(colour(path)) * 64)
    return path


def classes_by_path(source, split):
    """{path: class name} of a split."""
    files = getattr(source, split)
    return {path: source.class_names[label] for path, label in zip(files.paths, files.labels, strict=True)}


def fails(load, name, **fields):
    """The message of the one DataError that loading ends in."""
    with pytest.raises(DataError) as caught:
        load(name, **fields)
    return str(caught.value)


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# Published splits


def write_dtd(root, _monkeypatch):
    folder, written = root / "dtd" / "dtd", {}
    for number, split in enumerate(SPLITS):
        names = [f"{kind}/{kind}_{number}{image}.jpg" for kind in ("woven", "banded", "dotted") for image in range(2)]
        write_lines(folder / "labels" / f"{split}1.txt", names)
        write_lines(folder / "labels" / f"{split}2.txt", ["banded/of_another_partition.jpg"])
        written[split] = {write_photo(root, f"dtd/dtd/images/{name}"): name.split("/")[0] for name in names}
    return written


def write_fgvc_aircraft(root, _monkeypatch):
    folder, written = root / "fgvc-aircraft-2013b" / "data", {}
    variants = ["Yak-42", "707-320", "F-16A/B", "Boeing 717"]
    write_lines(folder / "variants.txt", variants)
    for number, split in enumerate(SPLITS):
        images = [(f"{100 + 10 * number + index:07d}", variants[index % 4]) for index in range(6)]
        write_lines(folder / f"images_variant_{split}.txt", [" ".join(image) for image in images])
        write_lines(folder / f"images_family_{split}.txt", [f"{image} Fokker" for image, _ in images])
        written[split] = {
            write_photo(root, f"fgvc-aircraft-2013b/data/images/{image}.jpg"): variant for image, variant in images
        }
    return written


def write_flowers102(root, monkeypatch):
    """Three images of each of the 102 flowers, the last one first; the first of the three is for training."""
    folder, kind = root / "flowers-102", torchvision.datasets.Flowers102
    labels = [102 - (image - 1) // 3 for image in range(1, 307)]
    written = {split: {} for split in SPLITS}
    for image, label in enumerate(labels, 1):
        path = write_photo(root, f"flowers-102/jpg/image_{image:05d}.jpg")
        written[SPLITS[(image - 1) % 3]][path] = kind.classes[label - 1]
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    ids = {key: np.arange(start, 307, 3)[None] for key, start in (("trnid", 1), ("valid", 2), ("tstid", 3))}
    savemat(folder / "setid.mat", ids)
    sums = {
        "image": kind._file_dict["image"],
        "label": ("imagelabels.mat", md5(folder / "imagelabels.mat")),
        "setid": ("setid.mat", md5(folder / "setid.mat")),
    }
    monkeypatch.setattr(kind, "_file_dict", sums)
    return written


def write_food101(root, _monkeypatch):
    written = {}
    for number, split in enumerate(("train", "test")):
        names = {dish: [f"{dish}/{dish}{number}{image}" for image in range(3)] for dish in ("waffles", "apple_pie")}
        meta = root / "food-101" / "meta" / f"{split}.json"
        meta.parent.mkdir(parents=True, exist_ok=True)
        meta.write_text(json.dumps(names))
        written[split] = {
            write_photo(root, f"food-101/images/{name}.jpg"): dish for dish, mine in names.items() for name in mine
        }
    return written


def write_oxford_pets(root, _monkeypatch):
    breeds = {"Abyssinian": (1, 1), "Egyptian_Mau": (2, 1), "american_bulldog": (3, 2)}
    names = {"Abyssinian": "Abyssinian", "Egyptian_Mau": "Egyptian Mau", "american_bulldog": "American Bulldog"}
    written = {}
    for number, (split, file) in enumerate((("train", "trainval"), ("test", "test"))):
        images = [(f"{breed}_{100 * number + image}", breed) for breed in reversed(breeds) for image in range(2)]
        lines = [f"{image} {breeds[breed][0]} {breeds[breed][1]} 1" for image, breed in images]
        write_lines(root / "oxford-iiit-pet" / "annotations" / f"{file}.txt", lines)
        written[split] = {
            write_photo(root, f"oxford-iiit-pet/images/{image}.jpg"): names[breed] for image, breed in images
        }
    return written


def write_stanford_cars(root, _monkeypatch):
    folder, written = root / "stanford_cars", {}
    names = ["AM General Hummer SUV 2000", "Volvo 240 Sedan 1993", "smart fortwo Convertible 2012"]
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    for split, file, count in (
        ("train", "devkit/cars_train_annos.mat", 7),
        ("test", "cars_test_annos_withlabels.mat", 4),
    ):
        images = [(f"{image + 1:05d}.jpg", (image * 2) % 3) for image in range(count)]
        fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        rows = np.array([(np.uint8(3), np.uint8(label + 1), image) for image, label in images], dtype=fields)
        savemat(folder / file, {"annotations": rows[None]})
        written[split] = {
            write_photo(root, f"stanford_cars/cars_{split}/{image}"): names[label] for image, label in images
        }
    return written


# No published splits: the images are under "all"


def write_caltech101(root, _monkeypatch):
    written, folder = {}, "caltech101/101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 3), ("ant", 31), ("Faces", 40), ("yin_yang", 33)):
        paths = [write_photo(root, f"{folder}/{name}/image_{image + 1:04d}.jpg") for image in range(count)]
        if name != "BACKGROUND_Google":
            written |= dict.fromkeys(paths, name)
    return {"all": written}


def write_eurosat(root, _monkeypatch):
    counts = {"Forest": 10, "AnnualCrop": 15, "SeaLake": 5}
    return {
        "all": {
            write_photo(root, f"eurosat/2750/{name}/{name}_{image + 1}.jpg"): name
            for name, count in counts.items()
            for image in range(count)
        }
    }


def write_sun397(root, _monkeypatch):
    counts = {"a/abbey": 103, "a/apartment_building/outdoor": 100, "y/yard": 101}
    write_lines(root / "SUN397" / "ClassName.txt", [f"/{name}" for name in counts])
    return {
        "all": {
            write_photo(root, f"SUN397/{name}/sun_{zlib.crc32(f'{name}{image}'.encode()):08x}.jpg"): name[2:]
            for name, count in counts.items()
            for image in range(count)
        }
    }


WRITERS = {
    "caltech101": write_caltech101,
    "dtd": write_dtd,
    "eurosat": write_eurosat,
    "fgvc_aircraft": write_fgvc_aircraft,
    "flowers102": write_flowers102,
    "food101": write_food101,
    "oxford_pets": write_oxford_pets,
    "stanford_cars": write_stanford_cars,
    "sun397": write_sun397,
}
"""Of the data sets in files: (data root, monkeypatch) -> {split: {path: class name}}."""


# Arrays


def write_svhn(root, monkeypatch):
    """Returns {split: (pixels [N, 32, 32, 3], digits [N])}."""
    kind, written, listed = torchvision.datasets.SVHN, {}, dict(torchvision.datasets.SVHN.split_list)
    for split, count in (("train", 20), ("test", 11)):
        pixels = np.random.RandomState(count).randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        digits = np.arange(count) % 10
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)
        url, file, _ = kind.split_list[split]
        root.mkdir(parents=True, exist_ok=True)
        savemat(root / file, {"X": pixels.transpose(1, 2, 3, 0), "y": labels[:, None]})
        listed[split] = [url, file, md5(root / file)]
        written[split] = (pixels, digits)
    monkeypatch.setattr(kind, "split_list", listed)
    return written


def write_stl10(root, monkeypatch):
    """Returns {split: (pixels [N, 96, 96, 3], labels [N])}. There is no unlabeled_X.bin."""
    kind, written = torchvision.datasets.STL10, {}
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    write_lines(folder / "class_names.txt", ["airplane", "bird", "car"])
    for split, count in (("train", 9), ("test", 6)):
        pixels = np.random.RandomState(count).randint(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        labels = np.arange(count) % 3
        (folder / f"{split}_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())  # column by column
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        listed = getattr(kind, f"{split}_list")
        sums = [[file, md5(folder / file) if (folder / file).exists() else old] for file, old in listed]
        monkeypatch.setattr(kind, f"{split}_list", sums)
        written[split] = (pixels, labels)
    return written


# Archives


def pack(root, name):
    """Packs what a writer wrote into the archives that the authors publish, and returns these; the files are gone."""
    return [archive(root) for archive in PACKERS[name]]


def _tar(archive, folder, inner):
    """Packs `folder`/`inner` (and no more) as a .tar.gz, under the name that `inner` has."""

    def run(root):
        with tarfile.open(root / archive, "w:gz") as tar:
            tar.add(root / folder / inner, inner)
        shutil.rmtree(root / folder / inner)
        return root / archive

    return run


def _eurosat_zip(root):
    with zipfile.ZipFile(root / "eurosat" / "EuroSAT.zip", "w") as archive:
        for path in sorted((root / "eurosat" / "2750").rglob("*.jpg")):
            archive.write(path, path.relative_to(root / "eurosat"))
    shutil.rmtree(root / "eurosat" / "2750")
    return root / "eurosat" / "EuroSAT.zip"


def _caltech_zip(root):
    inner = _tar("caltech101/101_ObjectCategories.tar.gz", "caltech101", "101_ObjectCategories")(root)
    with zipfile.ZipFile(root / "caltech101" / "caltech-101.zip", "w") as archive:
        archive.write(inner, "caltech-101/101_ObjectCategories.tar.gz")
        archive.writestr("caltech-101/show_annotation.m", "")
    inner.unlink()
    return root / "caltech101" / "caltech-101.zip"


PACKERS = {
    "caltech101": [_caltech_zip],
    "dtd": [_tar("dtd/dtd-r1.0.1.tar.gz", "dtd", "dtd")],
    "eurosat": [_eurosat_zip],
    "fgvc_aircraft": [_tar("fgvc-aircraft-2013b.tar.gz", ".", "fgvc-aircraft-2013b")],
    "flowers102": [_tar("flowers-102/102flowers.tgz", "flowers-102", "jpg")],
    "food101": [_tar("food-101.tar.gz", ".", "food-101")],
    "oxford_pets": [
        _tar("oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet", "images"),
        _tar("oxford-iiit-pet/annotations.tar.gz", "oxford-iiit-pet", "annotations"),
    ],
    "stl10": [_tar("stl10_binary.tar.gz", ".", "stl10_binary")],
    "sun397": [_tar("SUN397.tar.gz", ".", "SUN397")],
}
