"""What comes from elsewhere is data, never code; what is damaged is listed and takes nothing else with it.

Each attack is first seen to work against the reader that one would write without thinking of it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import http.server
import io
import itertools
import json
import os
import pickle
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra.utils
import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.datasets
import yaml
from commands import PAIR, TINY, only_run, snapshot, train
from matplotlib.mathtext import MathTextParser
from omegaconf import DictConfig, OmegaConf
from records.studies import result, write_run

import vkd.collect
import vkd.evaluate
from vkd.composition import compose_config
from vkd.config import DatasetConfig
from vkd.data import load_source
from vkd.errors import DataError, ModelError, UserError
from vkd.models import create_model, load_weights
from vkd.records.foreign import confined
from vkd.records.grouping import build_table
from vkd.records.reading import clean, read_run, read_runs
from vkd.records.tables import to_csv, to_markdown
from vkd.training.checkpoint import write_checkpoint

ARCH = "cifar_resnet8_width4"
DIGITS = ("dataset=digits", "device=cpu")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(autouse=True)
def composed_once(monkeypatch):
    """Compose the same words of `vkd.evaluate` once: Hydra takes a third of a second, and sees nothing of a run."""
    monkeypatch.setattr(vkd.evaluate, "compose_config", lambda words: compose_once(tuple(words)))


@functools.cache
def compose_once(words: tuple[str, ...]) -> DictConfig:
    """The config of these words; nobody may change it."""
    return compose_config(list(words))


@pytest.fixture
def undrawn(monkeypatch):
    """Leave plots empty where a test looks at the tables alone: drawing takes as long as all the rest."""
    for name in ("to_png", "to_svg"):
        monkeypatch.setattr(f"vkd.records.plots.{name}", lambda _figure: b"")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory inside a folder of the test's own, so that what is written beside it is seen too."""
    folder = tmp_path / "above" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def sprung(tmp_path):
    """Where the traps of a test make their folder."""
    return tmp_path / "sprung"


@pytest.fixture
def refused(here, sprung, capsys):
    """A function that runs a command, sees that it refuses in one message and leaves no trace, and returns that."""

    def run(main: Callable[[list[str]], int], *words: str) -> str:
        before = snapshot(here.parent)
        capsys.readouterr()
        code = main(list(words))
        said = capsys.readouterr()
        assert code in (1, 2), said.out
        assert "Traceback" not in said.out + said.err
        assert said.err.strip()
        assert all(sign.isprintable() or sign == "\n" for sign in said.err)
        assert snapshot(here.parent) == before
        assert not sprung.exists()
        return said.err

    return run


@pytest.fixture
def foreign(trained, here):
    """A run directory from elsewhere, as `runs/digits/pair/run` with the teacher beside it."""
    shutil.copytree(trained, here / "runs")
    return only_run(here / "runs" / PAIR)


def change_config(run: Path, **sections: Any) -> None:
    """Replace entries of a run's config; in a section that is given as a dict, entries of that."""
    file = run / "config.yaml"
    content = yaml.safe_load(file.read_text())
    for name, value in sections.items():
        both = isinstance(value, dict) and isinstance(content.get(name), dict)
        content[name] = content[name] | value if both else value
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def assert_springs(read: Callable[[], Any], sprung: Path) -> None:
    """The careless reader runs what is in the file."""
    read()
    assert sprung.is_dir()
    sprung.rmdir()


def peak_bytes(act: Callable[[], Any]) -> int:
    """The most memory that Python and NumPy held at once for it."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_packed(folder: Path, *, savez: Callable[..., None] = np.savez, **arrays: Any) -> Path:
    """Packed files of 12 images of 3 classes, with any array of train replaced; the path of train's."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("test", "train"):
        content = {
            "images": np.zeros((12, 8, 8, 1), dtype=np.uint8),
            "labels": np.arange(12, dtype=np.int64) % 3,
            "class_names": np.array(["ant", "bee", "cat"]),
        }
        savez(folder / f"{split}.npz", **content)
    if arrays:
        savez(folder / "train.npz", **(content | arrays))
    return folder / "train.npz"


def replace_member(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a zip file anew with another content of one member."""
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry, data in (members | {name: content}).items():
            archive.writestr(entry, data)


def npy_header(descr: str, shape: str, *, pad: int = 0) -> bytes:
    """The beginning of an npy file; with `pad`, of version 2 and with so many spaces."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode() + b" " * pad + b"\n"
    length = len(text).to_bytes(4 if pad else 2, "little")
    return b"\x93NUMPY" + (b"\x02\x00" if pad else b"\x01\x00") + length + text


# Pickles


def plain_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


WAYS = {
    "a torch file": ("evil.pth", torch.save, lambda path: torch.load(path, weights_only=False)),
    "an old torch file": (
        "evil.pt",
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda path: torch.load(path, weights_only=False),
    ),
    "a plain pickle": (
        "evil.bin",
        lambda content, path: plain_pickle(path, content),
        lambda path: pickle.loads(path.read_bytes()),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["evaluate", "student", "teacher of a run", "teacher"])
def test_a_pickle_in_place_of_weights_runs_nothing_wherever_it_is_given(way, place, foreign, here, sprung, refused):
    name, save, careless = WAYS[way]
    weights = create_model(ARCH, num_classes=10, in_channels=1, image_size=(8, 8), seed=0).state_dict()
    save({"state_dict": weights, "epoch": Trap(sprung)}, here / name)
    assert_springs(lambda: careless(here / name), sprung)
    if place == "evaluate":
        said = refused(vkd.evaluate.main, f"arch={ARCH}", f"checkpoint={name}", *DIGITS)
    elif place == "student":
        (here / name).replace(foreign / "student.safetensors")
        said = refused(vkd.evaluate.main, f"run={foreign}", "device=cpu")
        name = "student.safetensors"
    elif place == "teacher of a run":
        change_config(foreign, teacher={"checkpoint": str(here / name)})
        said = refused(vkd.evaluate.main, f"run={foreign}", "device=cpu")
    else:
        said = refused(lambda words: train(*words), f"teacher.checkpoint={name}", "runs_root=elsewhere")
    assert name in said.splitlines()[0]
    assert "which is refused" in said


def test_a_checkpoint_to_go_on_from_runs_nothing_though_its_checksum_is_right(foreign, here, sprung, capsys):
    for _ in range(2):  # the one before it is another place to put a pickle
        write_checkpoint(foreign / "last.ckpt", {"fingerprint": "0", "history": Trap(sprung)})
    payload = (foreign / "last.ckpt").read_bytes()[:-48]
    assert_springs(lambda: torch.load(io.BytesIO(payload), weights_only=False), sprung)
    (foreign / "status.json").write_text(json.dumps({"state": "interrupted"}))
    assert train() != 0
    said = capsys.readouterr()
    assert "last.ckpt" in said.out + said.err
    assert not sprung.exists()
    assert torch.load(io.BytesIO((foreign / "last.ckpt").read_bytes()[:-48]), weights_only=False)  # still the trap
    assert sprung.exists()


def test_packed_data_are_never_unpickled(here, sprung, refused, model_file):
    traps = np.array([Trap(sprung)] * 12, dtype=object)
    path = write_packed(here / "data" / "objects", labels=traps)
    assert_springs(lambda: [np.load(path, allow_pickle=True)["labels"] for _ in range(1)], sprung)
    words = [f"arch={ARCH}", f"checkpoint={model_file}", "dataset.mean=[0.5]", "dataset.std=[0.5]", "device=cpu"]
    assert "labels is an array of Python objects" in refused(vkd.evaluate.main, *words, "dataset.name=objects")
    path = write_packed(here / "data" / "raw")
    replace_member(path, "images.npy", pickle.dumps(Trap(sprung)))
    with zipfile.ZipFile(path) as archive:
        assert_springs(lambda: np.load(io.BytesIO(archive.read("images.npy")), allow_pickle=True), sprung)
    assert "raw/train.npz is damaged" in refused(vkd.evaluate.main, *words, "dataset.name=raw")


def test_members_of_packed_data_that_do_not_belong_there_are_not_looked_at(here, sprung):
    path = write_packed(here / "data" / "more", config=np.array([Trap(sprung)], dtype=object))
    assert_springs(lambda: np.load(path, allow_pickle=True)["config"], sprung)
    source = load_source(DatasetConfig(name="more", mean=[0.5], std=[0.5]), here / "data")
    assert len(source.train.labels) == 12
    assert not sprung.exists()


@pytest.fixture
def model_file(here):
    """Weights of a student of three classes."""
    path = here / "student.safetensors"
    weights = create_model(ARCH, num_classes=3, in_channels=1, image_size=(8, 8), seed=0).state_dict()
    safetensors.torch.save_file(weights, path)
    return path.name


# Configs


def test_a_python_tag_in_a_run_s_config_runs_nothing(foreign, sprung, refused, capsys):
    text = (foreign / "config.yaml").read_text() + f"extra: !!python/object/apply:os.mkdir ['{sprung}']\n"
    (foreign / "config.yaml").write_text(text)
    assert_springs(lambda: yaml.unsafe_load(text), sprung)
    assert "config.yaml is not plain YAML" in refused(vkd.evaluate.main, f"run={foreign}", "device=cpu")
    (foreign / "result.json").unlink()
    assert vkd.collect.main(["study=digits"]) == 0
    assert "config.yaml is not plain YAML" in capsys.readouterr().out
    assert not sprung.exists()


@pytest.mark.parametrize(
    "place", ["student", "dataset", "teacher", "recipe", "method.kd", "dataset.augmentation", "divergence"]
)
def test_a_target_in_a_run_s_config_is_no_call(place, foreign, sprung, refused):
    call = {"_target_": "os.mkdir", "path": str(sprung)}
    assert_springs(lambda: hydra.utils.instantiate(OmegaConf.create(call)), sprung)
    section, _, below = place.partition(".")
    change_config(foreign, **{section: {below: call} if below else call})
    assert "_target_" in refused(vkd.evaluate.main, f"run={foreign}", "device=cpu")


@pytest.mark.parametrize("place", ["recipe.optimizer_options", "tracker", "hydra", "_target_"])
def test_a_target_where_measuring_looks_at_nothing_is_no_call_either(place, foreign, sprung):
    call = {"_target_": "os.mkdir", "path": str(sprung)}
    section, _, below = place.partition(".")
    change_config(foreign, **{section: {below: call} if below else call})
    assert vkd.evaluate.main([f"run={foreign}", "device=cpu", "split=val"]) == 0
    assert not sprung.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": {"name": "${oc.env:VKD_SECRET}"}},
        {"data_root": "${oc.env:VKD_SECRET}"},
        {"study": "a ${oc.env:VKD_SECRET} b"},
        {"student": {"arch": "${hydra:runtime.cwd}"}},
        {"dataset": {"augmentation": {"crop": {"padding": "${oc.decode:${oc.env:VKD_SECRET}}"}}}},
        {"tracker": {"tags": ["${oc.env:VKD_SECRET}"]}},
        {"recipe": {"optimizer_options": {"${oc.env:VKD_SECRET}": 1}}},
    ],
)
def test_interpolations_in_a_run_s_config_are_not_resolved(change, foreign, refused, monkeypatch):
    monkeypatch.setenv("VKD_SECRET", "swordfish")
    assert OmegaConf.to_container(OmegaConf.create({"a": "${oc.env:VKD_SECRET}"}), resolve=True) == {"a": "swordfish"}
    change_config(foreign, **change)
    said = refused(vkd.evaluate.main, f"run={foreign}", "device=cpu")
    assert "the interpolation" in said
    assert "swordfish" not in said
    (foreign / "result.json").unlink()
    (foreign / "status.json").unlink()
    table = build_table([read_run(foreign)], study="digits", metric="test/top1", command="x")
    assert "swordfish" not in to_markdown(table) + to_csv(table)


def unfolded(value: Any, known: dict[int, int]) -> int:
    """How many values there would be if each alias were written out."""
    if not isinstance(value, (list, dict)):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(unfolded(entry, known) for entry in inner)
    return known[id(value)]


LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 12)
)
ENDLESS = {
    "aliases": LAUGHS,
    "merged mappings": MERGES,
    "a list in itself": "a: &a [*a]\n",
    "a number in base 60": f"a: 1{':1' * 100_000}\n",
    "a number of many digits": f"a: {'9' * 200_000}\n",
    "a hexadecimal number": f"a: 0x{'f' * 100_000}\n",
    "brackets": "a: " + "[" * 100_000,
    "dashes": "- " * 100_000,
    "levels": "".join(" " * level + "a:\n" for level in range(600)),
    "many values": "a: [" + "1, " * 51_000 + "]\n",
    "a large file": "a: " + "x" * 400_000 + "\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "an empty number": "a: !!int ''\n",
    "an odd switch": "a: !!bool perhaps\n",
    "an odd time": "a: !!timestamp never\n",
    "an impossible day": "a: 2026-99-99\n",
    "bytes": "a: !!binary aGVsbG8=\n",
    "a set": "a: !!set {1, 2}\n",
    "a key that is a list": "? [1, 2]\n: 1\n",
    "a key that is no text": "1: 2\n",
    "an escape code": 'a: "\\e[31m"\n',
    "a day": "a: 2026-01-01\n",
}


@pytest.mark.parametrize("fault", ENDLESS)
def test_a_config_that_is_none_is_refused_fast_and_listed(fault, foreign, refused):
    if fault == "aliases":
        assert unfolded(yaml.safe_load(LAUGHS), {}) > 9**11
    text = (foreign / "config.yaml").read_text()
    (foreign / "config.yaml").write_text(ENDLESS[fault] if fault in ("dashes",) else text + ENDLESS[fault])
    before = time.process_time()
    said = refused(vkd.evaluate.main, f"run={foreign}", "device=cpu")
    assert "config.yaml" in said.splitlines()[0]
    (foreign / "result.json").unlink()
    (foreign / "status.json").write_text('{"state": "failed", "reason": "no luck"}')
    run = read_run(foreign)
    assert (run.state, run.parameters is not None) == ("failed", True)
    assert time.process_time() - before < 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": {"name": "../../x"}}, "dataset.name"),
        ({"student": {"arch": "../../x"}}, "names a hub or a path"),
        ({"student": {"arch": "hf-hub:somebody/network"}}, "names a hub or a path"),
        ({"evaluation_batch_size": 10**9}, "pixels"),
        ({"teacher": {"image_size": 10**6, "checkpoint": "x"}}, "pixels"),
        ({"dataset": {"name": "imagefolder", "root": ".", "image_size": 10**6}}, "pixels"),
        ({"dataset": {"mean": [1.0] * 5_000}}, "too many values"),
        ({"dataset": None}, "dataset"),
        ({"student": ["x"]}, "student"),
    ],
)
def test_a_run_s_config_cannot_ask_for_what_a_command_line_cannot(change, words, foreign, refused):
    change_config(foreign, **change)
    assert words in refused(vkd.evaluate.main, f"run={foreign}", "device=cpu")


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and the paths that it was asked for."""
    paths: list[str] = []

    class Noting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_is_fetched_because_a_run_s_config_names_it_unless_that_is_asked_for(
    foreign, refused, asked, monkeypatch, capsys
):
    address, paths = asked
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", f"{address}/cifar.tgz")
    words = [f"run={foreign}", "device=cpu"]
    for data_root in ("nowhere", "."):
        change_config(foreign, data_root=data_root, dataset={"name": "cifar100", "mean": [0.5] * 3, "std": [0.5] * 3})
        said = refused(vkd.evaluate.main, *words)
        assert "data set 'cifar100'" in said
        assert "try: fetch=true" in said
        assert paths == []
    assert vkd.evaluate.main([*words, "fetch=true"]) == 2
    assert paths == ["/cifar.tgz"]
    assert "fetch=true" not in capsys.readouterr().err
    assert vkd.evaluate.main([f"arch={ARCH}", "pretrained=true", "fetch=true"]) == 2


def test_a_run_s_own_teacher_is_never_trained(foreign, here, capsys):
    shutil.rmtree(here / "runs" / "teachers")
    before = snapshot(here.parent)
    assert vkd.evaluate.main([f"run={foreign}", "device=cpu", "split=val"]) == 0
    assert "the run's teacher is no longer there" in capsys.readouterr().out
    assert snapshot(here.parent) == before


def fail(act: Callable[[], Any]) -> None:
    """Act, and complain whatever came of it."""
    with contextlib.suppress(OSError):
        act()
    raise ModelError("not found", hint="its own")


def test_confined_nothing_leaves_the_machine_and_no_folder_is_made(here, asked):
    address, paths = asked
    (here / "old").mkdir()
    with confined("a hint"):
        for act in (
            lambda: urllib.request.urlopen(f"{address}/inside", timeout=5),
            lambda: (here / "new").mkdir(),
            lambda: (here / "newer" / "still").mkdir(parents=True),
            lambda: tempfile.mkdtemp(dir=here),
        ):
            with pytest.raises(OSError, match="nothing is fetched"):
                act()
        (here / "old").mkdir(exist_ok=True)
    with pytest.raises(ModelError, match="try: a hint"), confined("a hint"):
        fail(lambda: (here / "new").mkdir())
    with pytest.raises(ModelError, match="try: its own"), confined("a hint"):
        fail(lambda: None)
    assert paths == []
    with pytest.raises(OSError, match="404"):
        urllib.request.urlopen(f"{address}/outside", timeout=5)
    (here / "new").mkdir()
    assert paths == ["/outside"]


# Files that ask for more than they hold


def load_packed(here: Path) -> Any:
    return load_source(DatasetConfig(name="mine", mean=[0.5], std=[0.5]), here / "data")


def refused_packed(here: Path) -> str:
    """The message for packed data that are refused in little memory and time."""
    messages = []

    def load() -> None:
        with pytest.raises(DataError) as caught:
            load_packed(here)
        messages.append(str(caught.value))

    before = time.process_time()
    assert peak_bytes(load) < 8e6
    assert time.process_time() - before < 2
    assert str(here / "data" / "mine" / "train.npz") in messages[0]
    return messages[0]


def test_a_header_of_a_million_million_images_takes_no_memory(here):
    path = write_packed(here / "data" / "mine")
    replace_member(path, "images.npy", npy_header("|u1", "(1000000000000, 32, 32, 3)") + bytes(100))
    with pytest.raises(MemoryError):
        np.load(path)["images"]
    assert "declares [1000000000000, 32, 32, 3]" in refused_packed(here)


def test_names_without_a_letter_take_no_memory_however_many_there_are(here):
    path = write_packed(here / "data" / "mine")
    replace_member(path, "class_names.npy", npy_header("<U0", "(10000000,)"))
    assert path.stat().st_size < 3_000
    assert len(np.load(path)["class_names"]) == 10_000_000
    assert "class_names is <U0 [10000000]" in refused_packed(here)


def test_images_that_were_compressed_beyond_reason_are_not_unpacked(here):
    images = np.zeros((70, 1000, 1000, 1), dtype=np.uint8)
    path = write_packed(here / "data" / "mine", images=images, savez=np.savez_compressed)
    assert path.stat().st_size < 100_000
    assert peak_bytes(lambda: np.load(path)["images"]) > 70e6
    assert "would unpack to 70,000," in refused_packed(here)


def test_a_header_longer_than_any_array_has_is_not_read(here):
    path = write_packed(here / "data" / "mine")
    replace_member(path, "images.npy", npy_header("|u1", "(12, 8, 8, 1)", pad=12_000_000), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000

    def read_carelessly() -> None:
        with pytest.raises(ValueError, match="large"):
            np.load(path)["images"]

    assert peak_bytes(read_carelessly) > 10e6
    assert "has a header of 12,000," in refused_packed(here)


def test_more_than_the_memory_of_the_machine_is_not_loaded(here, monkeypatch):
    write_packed(here / "data" / "mine", images=np.zeros((12, 1000, 1000, 1), dtype=np.uint8))
    monkeypatch.setattr(os, "sysconf", lambda _name: 3000)
    assert "does not fit into memory: images alone has 12,000," in refused_packed(here)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_packed_file_is_a_message_of_the_command(share, here, refused, model_file):
    path = write_packed(here / "data" / "mine")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    words = [f"arch={ARCH}", f"checkpoint={model_file}", "dataset.name=mine", "dataset.mean=[0.5]", "dataset.std=[0.5]"]
    assert "mine/train.npz is damaged" in refused(vkd.evaluate.main, *words)


def refused_weights(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert all(sign.isprintable() or sign == "\n" for sign in str(caught.value))
    return str(caught.value)


def test_a_torch_file_that_unpacks_to_a_hundred_times_its_size_is_not_unpacked(here):
    torch.save({"weight": torch.zeros(20_000_000)}, here / "bomb.pth")
    with zipfile.ZipFile(here / "bomb.pth") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data/0"))
    replace_member(here / "bomb.pth", name, bytes(80_000_000), zipfile.ZIP_DEFLATED)
    assert (here / "bomb.pth").stat().st_size < 200_000
    assert torch.load(here / "bomb.pth", weights_only=True)["weight"].nbytes == 80_000_000
    assert "would unpack to 80,0" in refused_weights(here / "bomb.pth")


class Room:
    """Ten million bytes when it is unpickled, and none before."""

    def __reduce__(self):
        return bytearray, (10_000_000,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_cannot_ask_for_memory_by_a_number(zipped, here):
    content = {"weight": torch.zeros(2), "room": Room()}
    torch.save(content, here / "room.pth", _use_new_zipfile_serialization=zipped)
    assert len(torch.load(here / "room.pth", weights_only=True)["room"]) == 10_000_000
    assert peak_bytes(lambda: refused_weights(here / "room.pth")) < 5e6
    assert "bytearray" in refused_weights(here / "room.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(3, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ],
    ids=["repeated", "complex", "sparse", "without numbers", "quantized"],
)
def test_tensors_that_are_no_weights_are_refused_by_name(tensor, here):
    torch.save({"good": torch.zeros(2), "layer.bad\x1b[31m": tensor}, here / "odd.pth")
    assert set(torch.load(here / "odd.pth", weights_only=True)) == {"good", "layer.bad\x1b[31m"}
    said = refused_weights(here / "odd.pth")
    assert "no weights: layer.bad [31m\n" in said


def test_a_checkpoint_that_wraps_itself_in_every_way_is_searched_once(here):
    wrappers = "state_dict_ema model_ema state_dict model model_state_dict model_state net network weights params"
    content: dict[Any, Any] = dict.fromkeys((f"weight{index}" for index in range(2_000)), torch.zeros(()))
    names = set(content)
    content[7] = torch.zeros(2)
    content |= dict.fromkeys(wrappers.split(), content)
    torch.save(content, here / "itself.pth")
    before = time.process_time()
    assert set(load_weights(here / "itself.pth")) == names
    assert time.process_time() - before < 2


def test_prefixes_are_taken_off_however_many_there_are_and_at_once():
    from vkd.models.weights import strip_shared_prefixes

    many = "module.model." * 100_000
    before = time.process_time()
    assert set(strip_shared_prefixes({many + "a": 1, many + "b": 2})) == {"a", "b"}
    assert time.process_time() - before < 1


def safetensors_file(header: dict[str, Any] | bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (4,), offsets: tuple[int, int] = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "a header longer than the file": safetensors_file({"a": tensor()}, length=10**6),
    "a header of almost 2^63 bytes": safetensors_file({"a": tensor()}, length=2**63 - 1),
    "a header shorter than it is": safetensors_file({"a": tensor()}, length=9),
    "numbers beyond the end": safetensors_file({"a": tensor(shape=(10**9,), offsets=(0, 4 * 10**9))}),
    "fewer numbers than the shape": safetensors_file({"a": tensor(shape=(10**9,))}),
    "a shape that overflows": safetensors_file({"a": tensor(shape=(2**62, 4))}),
    "a shape with a negative side": safetensors_file({"a": tensor(shape=(-4,))}),
    "the same numbers twice": safetensors_file({"a": tensor(), "b": tensor()}),
    "numbers that run backwards": safetensors_file({"a": tensor(offsets=(16, 0))}),
    "an unknown type": safetensors_file({"a": tensor("O")}),
    "a type that torch has not": safetensors_file({"a": tensor("F6_E2M3", (4,), (0, 3))}, bytes(3)),
    "a list": safetensors_file(b"{" + b"[" * 10_000),
    "levels": safetensors_file(b'{"a":' * 100_000),
    "a name that steers a terminal": safetensors_file({"\x1b]0;title\x07": tensor("\x1b[31m")}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(lie, here):
    (here / "lie.safetensors").write_bytes(LIES[lie])
    assert peak_bytes(lambda: refused_weights(here / "lie.safetensors")) < 5e6
    assert "damaged or no checkpoint" in refused_weights(here / "lie.safetensors")


def test_numbers_of_a_type_that_this_torch_has_not_are_a_message(here, monkeypatch):
    (here / "new.safetensors").write_bytes(safetensors_file({"a": tensor()}))

    def lacking(*_arguments: Any, **_keywords: Any) -> None:
        raise AttributeError("module 'torch' has no attribute 'float2'")

    monkeypatch.setattr(safetensors.torch, "load_file", lacking)
    assert "has no attribute 'float2'" in refused_weights(here / "new.safetensors")


def test_a_lying_header_is_a_message_of_the_command(here, refused):
    (here / "lie.safetensors").write_bytes(LIES["a name that steers a terminal"])
    said = refused(vkd.evaluate.main, f"arch={ARCH}", "checkpoint=lie.safetensors", *DIGITS)
    assert "damaged or no checkpoint" in said


def test_a_pipe_in_place_of_a_checkpoint_is_not_waited_for(here):
    os.mkfifo(here / "pipe.pth")
    assert "is no plain file" in refused_weights(here / "pipe.pth").replace("it is", "is")


def test_names_in_a_checkpoint_cannot_steer_a_terminal(here, refused):
    weights = create_model(ARCH, num_classes=10, in_channels=1, image_size=(8, 8), seed=0).state_dict()
    safetensors.torch.save_file(weights | {"\x1b[2J\u202eextra": torch.zeros(1)}, here / "names.safetensors")
    assert "[2J extra" in refused(vkd.evaluate.main, f"arch={ARCH}", "checkpoint=names.safetensors", *DIGITS)


# Names that leave their place


@pytest.mark.parametrize("name", ["../../x", "/etc"])
def test_no_command_takes_a_name_that_leaves_its_folder(name, here, refused, model_file):
    write_packed(here.parent.parent / "x")
    words = [f"arch={ARCH}", f"checkpoint={model_file}", f"dataset.name={name}", "dataset.mean=[0.5]"]
    assert "dataset.name" in refused(vkd.evaluate.main, *words, "dataset.std=[0.5]")
    for key in ("dataset.name", "study"):
        assert key in refused(vkd.train.main, *TINY, f"{key}={name}")
    for study in (name, "x/../../y", "."):
        assert "no name of a study" in refused(vkd.collect.main, f"study={study}")


ODD_NAMES = [
    "../../x",
    "a/b",
    "",
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@sum",
    "\x1b]0;title\x07",
    "a\nb",
    "a|b",
    "x" * 300,
]


@pytest.mark.parametrize("key", ["dataset", "teacher", "student", "method", "divergence", "group", "fingerprint"])
def test_a_result_with_a_name_that_is_none_is_damaged(key, tmp_path):
    for number, name in enumerate(ODD_NAMES if key == "method" else [*ODD_NAMES, 3, ["x"]]):
        content = result(seed=number)
        if key in ("group", "fingerprint"):
            content[key] = name
        elif key == "method":
            content[key] = {name: {"weight": 1}}
        else:
            content[key]["name" if key in ("dataset", "divergence") else "arch"] = name
        folder = write_run(tmp_path / str(number), result(seed=number))
        (folder / "result.json").write_text(json.dumps(content))
        run = read_run(folder)
        assert run.state == "damaged", name
        assert key in run.reason
        assert run.reason.isprintable()
        assert run.identified  # by its config, which is whole


def test_a_study_in_a_result_decides_no_place(here):
    content = result(seed=1)
    write_run(here / "runs", content)
    (file,) = here.rglob("result.json")
    file.write_text(json.dumps(content | {"study": "../../etc", "runs_root": "../../etc", "results_root": "/"}))
    before = snapshot(here.parent)
    assert vkd.collect.main(["study=quickstart"]) == 0
    made = snapshot(here.parent).keys() - before.keys()
    folder = "here/results/quickstart"
    assert made == {"here/results", folder, *(f"{folder}/{name}" for name in RESULTS)}


RESULTS = ("table.md", "table.csv", "table.tex", "report.html")
RESULTS += tuple(f"{name}.{suffix}" for name in ("accuracy", "cost") for suffix in ("png", "svg"))
HOSTILE = [
    "\x1b[31mred\x1b[0m\x07",
    "\x9b2J\u202egnp.exe\u2066",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "a | b | c",
    "x\n\n# a heading\n",
    "![pixel](http://127.0.0.1/pixel.png)",
    "<img src=http://127.0.0.1/pixel.png>",
    "`` ` ``",
    "$\\notacommand{$",
    "\ud800 and \udcff",
]


@pytest.fixture
def hostile_study(here):
    """A study in whose runs everything that may be any text is hostile."""
    for number, text in enumerate(HOSTILE):
        environment = {"torch": text, "device": text, text: text}
        content = result(seed=number, top1=50.0, recipe={"note": text, text: 1}, environment=environment)
        write_run(here / "runs", content, name=f"done{number}")
        failed = {"state": "failed", "reason": text, "traceback": text}
        write_run(here / "runs", result("dkd", seed=number, recipe={"note": text}), failed, name=f"failed{number}")
        running = {"state": "running", "epoch": text, "epochs": [text], "updated": text}
        write_run(here / "runs", result("dkd", seed=100 + number), running, name=f"running{number}")
    name = os.fsdecode(b"bad\x1b[31m\xff`|")
    write_run(here / "runs", result(seed=50), {"state": "failed", "reason": "x"}, name=name)
    return here


def test_text_of_a_run_steers_no_terminal_and_breaks_no_table(hostile_study, capsys):
    with pytest.raises(ValueError, match="notacommand"):
        MathTextParser("path").parse(HOSTILE[-2] + "$")
    assert vkd.collect.main(["study=quickstart"]) == 0
    folder = hostile_study / "results" / "quickstart"
    said, page = capsys.readouterr().out, (folder / "table.md").read_text()
    assert said == page
    assert all(sign.isprintable() or sign == "\n" for sign in page)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# quickstart: test top-1 (%)",
        "## Notes",
        "## Holes",
    ]
    assert "](" not in page
    assert "<img" not in page
    assert all(line.count("`") % 2 == 0 for line in page.splitlines())
    assert "/bad [31m\\udcff'" in page  # what cannot be shown of a path is numbered, so that it is found
    for number in range(len(HOSTILE)):
        assert f"failed{number}`" in page
    with (folder / "table.csv").open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert len(cells) > 100
    for cell in cells:
        assert cell.isprintable()
        assert not cell.startswith(("=", "+", "@", "\t", "\r"))
        assert not cell.startswith("-") or float(cell) < 0


def test_on_a_terminal_too(hostile_study, undrawn, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert vkd.collect.main(["study=quickstart"]) == 0
    assert "hole: " in terminal.getvalue()
    assert all(sign.isprintable() or sign == "\n" for sign in terminal.getvalue())


def test_clean_text_stays_as_it_is_when_it_is_cleaned_again():
    for text in HOSTILE:
        assert clean(clean(text)) == clean(text)
        assert clean(text).isprintable()
    assert clean("naïve café 数据 top-1 (%) [N, C] a_b*c") == "naïve café 数据 top-1 (%) [N, C] a_b*c"


def test_names_of_studies_and_runs_roots_cannot_steer_a_terminal(here, refused):
    (here / "runs" / "bad\x1b[31m").mkdir(parents=True)
    assert "study=bad [31m" in refused(vkd.collect.main, "study=nothing")
    assert "\\x1b" in refused(vkd.collect.main, "study=nothing", "runs_root=\x1b[31m")


def test_a_published_figure_cannot_be_a_formula(here, refused):
    write_run(here / "runs", result())
    for text in ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)"):
        (here / "mine.csv").write_text(f'dataset,student,label,method,top1,source\ndigits,s,x,none,70,"{text}"\n')
        said = refused(vkd.collect.main, "study=quickstart", "published=mine.csv")
        assert "mine.csv, line 2: source" in said
        assert "formula" in said
    (here / "mine.csv").unlink()
    os.mkfifo(here / "mine.csv")
    assert "no plain file" in vkd_message(lambda: vkd.collect.read_classification("mine.csv"))


def vkd_message(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize("names", [("../../x", "\x1b[31m", "=a()"), ("a\nb", "\u202ea", "`")])
def test_class_names_of_packed_data_are_data(names, here, capsys, model_file):
    write_packed(here / "data" / "mine", class_names=np.array(names))
    shutil.copy(here / "data" / "mine" / "train.npz", here / "data" / "mine" / "test.npz")
    words = [f"arch={ARCH}", f"checkpoint={model_file}", "dataset.name=mine", "dataset.mean=[0.5]", "dataset.std=[0.5]"]
    before = snapshot(here.parent)
    assert vkd.evaluate.main([*words, "device=cpu", "split=test"]) == 0
    write_packed(here / "data" / "mine", class_names=np.array([*names, "\x1b[32m"]))
    assert vkd.evaluate.main([*words, "device=cpu"]) == 2
    said = capsys.readouterr()
    assert all(sign.isprintable() or sign == "\n" for sign in said.out + said.err)
    shutil.rmtree(here / "data")
    before = {name for name in before if not name.startswith("here/data")}
    assert set(snapshot(here.parent)) == before


# Links


def test_links_are_looked_at_and_not_followed_for_ever(here, tmp_path):
    pair = write_run(here / "runs", result(seed=1)).parent
    study = pair.parent
    outside = tmp_path / "outside"
    for number in range(300):
        (outside / f"folder{number}" / "inner").mkdir(parents=True)
    elsewhere = write_run(tmp_path / "disk", result(seed=2))
    links = {
        "up": "..",
        "down": ".",
        "self": "self",
        "there": "back",
        "back": "there",
        "gone": str(tmp_path / "nowhere"),
        "outside": str(outside),
    }
    for name, target in links.items():
        (study / name).symlink_to(target)
        (pair / name).symlink_to(target)
    (study / elsewhere.name).symlink_to(elsewhere)
    walk = os.walk(study, followlinks=True)
    assert sum(1 for _ in itertools.islice(walk, 5_000)) == 5_000
    before = time.process_time()
    found = {run.path: run for run in read_runs(study, relative_to=here / "runs")}
    assert time.process_time() - before < 1
    assert sorted(run.seed for run in found.values() if run.done) == [1, 2]
    listed = {path.rpartition("/")[2] for path, run in found.items() if "links are not followed" in run.reason}
    assert listed == set(links)
    assert len(found) == 2 + 2 * len(links)
    assert not any("folder" in path for path in found)


def test_whatever_may_hide_runs_is_listed(here, monkeypatch):
    first = write_run(here / "runs", result(seed=1))
    second = write_run(here / "runs", result(seed=2, student="cifar_resnet8"))
    (first.parent / "kd-fkld-s3-0123abcd").write_text("a file")
    (first.parent / "kd-fkld-s4-0123abcd" / "wandb").mkdir(parents=True)
    scan = os.scandir

    def forbid(path: str) -> Any:
        if Path(path) == second.parent:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbid)
    reasons = {run.path.rpartition("/")[2]: run.why for run in read_runs(here / "runs")}
    assert reasons == {
        first.name: "done",
        second.parent.name: "damaged: the folder cannot be read: Permission denied",
        "kd-fkld-s3-0123abcd": "damaged: a file in place of a run's directory",
        "kd-fkld-s4-0123abcd": "unfinished: no result.json; no config.yaml",
    }


# Damage


WHOLE = result(seed=7)


def changed(*path: str, value: Any) -> bytes:
    """A result with the entry at a path replaced."""
    content = json.loads(json.dumps(WHOLE))
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return json.dumps(content).encode()


DAMAGE = {
    "nothing": (b"", "is not whole JSON"),
    "a half": (json.dumps(WHOLE).encode()[:300], "is not whole JSON"),
    "a page": (b"<html>404</html>", "is not whole JSON"),
    "rubbish": (bytes(range(256)) * 20, "is not whole JSON"),
    "a list": (b"[1, 2]", "holds list"),
    "levels": (b'{"a":' * 100_000, "is not whole JSON"),
    "fewer levels": (b'{"a":' * 60 + b"1" + b"}" * 60, "too many values or levels"),
    "values": (b'{"a": [' + b"1," * 60_000 + b"1]}", "too many values or levels"),
    "digits": (
        changed("seed", value=1).replace(b'"seed": 1', b'"seed": 1' + b"0" * 100_000),
        "a number of 100,001 digits",
    ),
    "a number beyond all": (changed("x", value=1).replace(b'"x": 1', b'"x": 1e999'), "1e999 is no number"),
    "NaN": (changed("metrics", "test/top1", value=float("nan")), "NaN is no number"),
    "infinity": (changed("metrics", "test/nll", value=float("inf")), "Infinity is no number"),
    "a key twice": (json.dumps(WHOLE).encode()[:-1] + b', "seed": 8}', "the key 'seed' is there twice"),
    "text for a figure": (
        changed("metrics", "test/top1", value="94.0"),
        "test/top1 = '94.0', which is no finite number",
    ),
    "true for a figure": (changed("metrics", "test/top1", value=True), "which is no finite number"),
    "a list for a figure": (changed("metrics", "test/top1", value=[94.0]), "which is no finite number"),
    "more than all": (changed("metrics", "test/top1", value=100.1), "which is no percentage"),
    "less than none": (changed("metrics", "val/top1", value=-1), "which is no percentage"),
    "a loss beyond all": (changed("metrics", "test/nll", value=1e300), "which is none"),
    "a huge whole number": (changed("metrics", "test/nll", value=10**400), "which is no finite number"),
    "a teacher beyond all": (changed("teacher", "accuracy", "test", value=1e9), "teacher.accuracy.test = 1e+09"),
    "text for metrics": (changed("metrics", value="none"), "lacks metrics"),
    "a seed in words": (changed("seed", value="one"), "a whole-numbered seed"),
    "half a seed": (changed("seed", value=1.5), "a whole-numbered seed"),
    "another seed": (changed("seed", value=8), "of another run than its directory's name says"),
    "another run": (json.dumps(result(seed=7, student="cifar_resnet8")).encode(), "of another run than"),
    "a later format": (changed("format", value=2), "format 2"),
    "a formula for a key": (changed("=cmd()", value=1), "which is no plain name"),
    "a formula for a metric": (changed("metrics", "=cmd()", value=1), "which is no plain name"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_listed_with_its_reason_and_averaged_with_nothing(damage, here, capsys):
    content, reason = DAMAGE[damage]
    if damage in ("NaN", "infinity", "a key twice"):
        assert json.loads(content)  # Python's reader takes it
    for seed in (1, 2):
        write_run(here / "runs", result(seed=seed, top1=50.0 + seed))
    folder = write_run(here / "runs", WHOLE)
    (folder / "result.json").write_bytes(content)
    before = time.process_time()
    (damaged,) = (run for run in read_runs(here / "runs") if not run.done)
    assert time.process_time() - before < 2
    assert damaged.state == "damaged"
    assert damaged.reason.startswith("result.json")
    assert reason in damaged.reason
    assert damaged.seed == 7
    (row,) = build_table(read_runs(here / "runs"), study="quickstart", metric="test/top1", command="x").rows
    assert row.cells[0].values == {1: 51.0, 2: 52.0}
    assert [hole.seeds for hole in row.cells[0].holes] == [(7,)]


@pytest.mark.parametrize(
    "content", [b"", b'{"state":' * 50_000, b'{"state": "done", "state": "failed"}', b'{"state": NaN}', b"[]", b"\xff"]
)
def test_a_damaged_status_is_listed_and_damaged_metrics_of_epochs_are_nobody_s_business(content, here):
    folder = write_run(here / "runs", WHOLE)
    (folder / "metrics.jsonl").write_bytes(content)
    assert read_run(folder).done
    (folder / "status.json").write_bytes(content)
    run = read_run(folder)
    assert run.state == "damaged"
    assert run.reason.startswith("status.json")


def test_seeds_that_differ_in_their_last_digit_stay_apart(here):
    for seed in (2**53, 2**53 + 1):
        write_run(here / "runs", result(seed=seed))
    assert [run.seed for run in read_runs(here / "runs")] == [2**53, 2**53 + 1]


def test_two_results_of_one_fingerprint_with_other_figures_are_told_of(here, capsys):
    write_run(here / "runs", result(top1=50.0), name="a")
    write_run(here / "runs", result(top1=99.0), name="b")
    assert vkd.collect.main(["study=quickstart"]) == 0
    page = capsys.readouterr().out
    assert "b` has the fingerprint of" in page
    assert "50.00 (1)" in page
    assert "99.00" not in page


def test_thousands_of_settings_that_differ_make_no_name_of_thousands_of_words(here):
    for seed in (1, 2):
        settings = {f"setting{number}": seed * number for number in range(3_000)}
        write_run(here / "runs", result(seed=seed, recipe=settings))
    table = build_table(read_runs(here / "runs"), study="q", metric="test/top1", command="x")
    assert len(table.rows) == 2
    assert all(row.label.endswith("and 2,987 further settings]") for row in table.rows)


def damage_run(folder: Path, way: int, content: dict[str, Any]) -> str:
    """Damage a run in one of ten ways; what the table must say of it."""
    file = folder / "result.json"
    whole = file.read_bytes()
    if way == 0:
        file.write_bytes(b"")
    elif way == 1:
        file.write_bytes(whole[: len(whole) // 2])
    elif way == 2:
        file.write_text("Segmentation fault")
    elif way == 3:
        file.write_text(json.dumps(content | {"metrics": {"test/top1": "99.9"}}))
        return "metrics.test/top1 = '99.9', which is no finite number"
    elif way == 4:
        file.write_text(json.dumps({name: value for name, value in content.items() if name != "group"}))
        return "result.json lacks group"
    elif way == 5:
        file.write_text(json.dumps(content | {"metrics": {"test/top1": float("nan")}}))
        return "NaN is no number of JSON"
    elif way == 6:
        file.unlink()
        if os.geteuid() == 0:  # who may read everything
            os.mkfifo(file)
            return "result.json is no plain file"
        file.write_bytes(whole)
        file.chmod(0)
        return "result.json cannot be read: Permission denied"
    elif way == 7:
        file.unlink()
        file.mkdir()
        return "result.json is no plain file"
    elif way == 8:
        file.write_bytes(np.random.RandomState(0).bytes(3_000))
    else:
        file.write_text(json.dumps(content | {"fingerprint": "f" * 64}))
        return "result.json is of another run than its directory's name says"
    return "result.json is not whole JSON"


def test_fifty_damaged_runs_among_a_thousand_are_listed_and_change_no_other_figure(here, undrawn, capsys, monkeypatch):
    monkeypatch.setattr(yaml, "safe_dump", lambda content, **_keywords: json.dumps(content))  # YAML too, and fast
    random = np.random.RandomState(3)
    points = list(itertools.product(range(1, 11), range(5)))
    expected: dict[tuple[float, float], list[float]] = {}
    reasons: dict[str, str] = {}
    for row, point in enumerate(points):
        for seed in range(20):
            top1 = round(float(random.uniform(60, 90)), 4)
            content = result("kd", "abkd", point=point, seed=seed, top1=top1)
            folder = write_run(here / "runs", content)
            if seed == row % 20:
                reasons[folder.name] = damage_run(folder, row % 10, content)
            else:
                expected.setdefault(point, []).append(top1)
    assert (len(reasons), sum(map(len, expected.values()))) == (50, 950)
    before = time.process_time()
    assert vkd.collect.main(["study=quickstart"]) == 0
    assert time.process_time() - before < 15
    page = capsys.readouterr().out
    holes = page[page.index("## Holes") :].splitlines()
    for name, reason in reasons.items():
        (line,) = (line for line in holes if f"/{name}`" in line)
        assert reason in line
        assert "damaged: " in line
    assert sum("damaged: " in line for line in holes) == 50
    with (here / "results" / "quickstart" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(points)
    for line in lines:
        figures = expected[float(line["alpha"]), float(line["beta"])]
        assert int(line["n"]) == 19
        assert float(line["mean"]) == pytest.approx(statistics.fmean(figures), abs=1e-12)
        assert float(line["std"]) == pytest.approx(statistics.stdev(figures), abs=1e-12)
