"""The table of the teacher's logits: what it gives back, and what kills, power cuts and other processes do to it."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import CLASSES, toy_data

import vkd.training.teacher_views as module
from vkd.config import DatasetConfig
from vkd.data import load_data
from vkd.errors import ConfigError, TrainingError
from vkd.models import create_model
from vkd.training.teacher_views import TeacherViews, describe, require_discrete

CPU = torch.device("cpu")
WIDTH = 3
DTYPES = {torch.float32: np.float32, torch.float16: np.float16}
SYNC = "fdatasync" if hasattr(os, "fdatasync") else "fsync"


def table(folder, rows=1000, *, dtype=torch.float32, identity=None, classes=WIDTH):
    identity = {"teacher": "abc", "mean": [0.5], "augmentation": [["flip", {}]]} if identity is None else identity
    return TeacherViews.open(folder, rows=rows, classes=classes, dtype=dtype, identity=identity, device=CPU)


def true_logits(rows, dtype=torch.float32):
    """What a teacher says about rows, float32 [B, WIDTH]: a different value in every place, some beyond float16."""
    places = np.asarray(rows, dtype=np.int64)[:, None] * WIDTH + np.arange(WIDTH)
    values = ((places * 7919 % 10007 - 5000) * 15 / 7).astype(np.float32)
    values[places % 101 == 0] *= 1000
    if dtype == torch.float16:
        values = values.clip(-65504, 65504).astype(np.float16).astype(np.float32)
    return torch.from_numpy(values)


class Teacher:
    """Computes the logits of a batch of rows, and remembers the positions that it was asked for."""

    def __init__(self, rows):
        self.rows = rows
        self.asked = []

    def __call__(self, positions):
        assert positions.dtype == torch.int64
        self.asked.append(positions.tolist())
        return true_logits(self.rows[positions])


def ask(views, rows):
    """The logits of rows, and the positions that had to be computed for them."""
    rows = torch.as_tensor(rows)
    teacher = Teacher(rows)
    logits = views.logits(rows, teacher)
    assert logits.dtype == torch.float32
    assert len(teacher.asked) <= 1
    return logits, teacher.asked[0] if teacher.asked else []


def rows_there(folder, rows=1000, dtype=torch.float32):
    """The rows that the files say are filled, after checking that they hold the right logits, read with NumPy alone."""
    filled = np.flatnonzero(np.fromfile(folder / "filled.bin", np.uint8))
    stored = np.fromfile(folder / "logits.bin", DTYPES[dtype]).reshape(rows, WIDTH)[filled]
    assert np.array_equal(stored.astype(np.float32), true_logits(filled, dtype).numpy())
    return set(filled.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_bit_for_bit_the_same_live_partly_and_wholly_from_the_table(tmp_path, dtype):
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:48]
    expected = true_logits(rows, dtype)
    for already in (0, 1, 20, 47, 48):
        views = table(tmp_path / str(already), dtype=dtype)
        if already:
            ask(views, rows[:already])
        found, computed = ask(views, rows)
        assert set(computed) == set(range(already, 48))
        assert torch.equal(found, expected)
        again, computed = ask(views, rows)
        assert computed == []
        assert torch.equal(again, expected)
        views.close()
        later, computed = ask(table(tmp_path / str(already), dtype=dtype), rows.flip(0))
        assert computed == []
        assert torch.equal(later, expected.flip(0))


def test_half_precision_gives_the_nearest_number_and_never_an_infinity(tmp_path):
    given = torch.tensor([[1e6, -1e6, math.pi], [math.inf, -math.inf, 65519.0], [1e-7, 2049.0, 0.1]])
    expected = torch.from_numpy(given.numpy().clip(-65504, 65504).astype(np.float16).astype(np.float32))
    assert expected.isfinite().all()
    views = table(tmp_path, dtype=torch.float16)
    for _ in range(2):
        assert torch.equal(views.logits(torch.arange(3), lambda positions: given[positions]), expected)
        views.flush()


def test_what_a_teacher_or_a_method_does_to_its_tensor_later_does_not_reach_the_table(tmp_path):
    for dtype in DTYPES:
        views, rows = table(tmp_path / f"{dtype}", dtype=dtype), torch.arange(32)
        buffer = true_logits(rows)
        views.logits(rows, lambda positions, buffer=buffer: buffer).zero_()
        buffer.zero_()
        views.logits(rows, Teacher(rows)).zero_()
        assert torch.equal(ask(views, rows)[0], true_logits(rows, dtype))


@pytest.mark.parametrize(("batch", "there"), [(64, 63), (64, 40), (50, 1), (17, 16), (8, 0), (8, 7), (1, 0)])
def test_a_few_missing_images_are_repeated_up_to_a_multiple_of_sixteen(tmp_path, batch, there):
    views, rows = table(tmp_path), torch.arange(100, 100 + batch)
    if there:
        ask(views, rows[:there])
    _, computed = ask(views, rows)
    missing = list(range(there, batch))
    assert len(computed) % 16 == 0
    assert len(computed) - len(missing) < 16
    assert computed[: len(missing)] == missing
    assert set(computed) == set(missing)


@pytest.mark.parametrize("batch", [16, 50, 64])
def test_a_batch_of_which_nothing_is_there_is_computed_as_without_a_table(tmp_path, batch):
    assert ask(table(tmp_path), torch.arange(batch))[1] == list(range(batch))


def test_a_networks_logits_are_those_that_it_gives_live(tmp_path):
    data = toy_data(tmp_path / "data", train=60)
    network = create_model(
        "cifar_resnet20", num_classes=CLASSES, in_channels=3, image_size=data.image_size, pretrained=False, seed=1
    ).eval()
    options = {"rows": data.train_size * data.view_count, "classes": CLASSES, "identity": {}, "device": CPU}
    exact = TeacherViews.open(tmp_path / "exact", dtype=torch.float32, **options)
    half = TeacherViews.open(tmp_path / "half", dtype=torch.float16, **options)
    asked = 0

    def live(images):
        nonlocal asked
        asked += len(images)
        with torch.no_grad():
            return network(images.float() / 255)

    for epoch in (*range(1, 16), 1):
        asked = 0
        for batch in data.train_batches(seed=1, epoch=epoch, batch_size=20, drop_last=True):
            expected = live(batch.images)
            asked -= len(batch.images)
            for views, wanted in ((exact, expected), (half, expected.half().float())):
                found = views.logits(batch.view_rows, lambda positions, images=batch.images: live(images[positions]))
                assert torch.equal(found, wanted)
    assert asked == 0  # the first epoch came again
    assert exact.filled_share > 0.4


def test_rows_that_are_stored_are_not_asked_for_and_stay_as_they_are(tmp_path):
    views = table(tmp_path)
    views.store(torch.arange(300, 700), true_logits(range(300, 700)))
    views.store(torch.arange(290, 310), torch.where(torch.arange(290, 310)[:, None] < 300, 1.0, 2.0).expand(-1, WIDTH))
    logits, computed = ask(views, torch.arange(290, 310))
    assert computed == []
    assert torch.equal(logits, torch.cat([torch.ones(10, WIDTH), true_logits(range(300, 310))]))
    assert views.filled_share == 410 / 1000


def test_a_row_that_comes_twice_in_a_batch_has_the_same_logits_twice(tmp_path):
    views = table(tmp_path)
    for _ in range(2):
        assert torch.equal(ask(views, [5, 6, 5, 5])[0], true_logits([5, 6, 5, 5]))
        views.flush()
    assert rows_there(tmp_path) == {5, 6}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES)), queue=st.integers(1, 60), flush=st.integers(1, 200))
def test_whatever_is_asked_stored_flushed_and_reopened_every_row_is_right(tmp_path_factory, data, dtype, queue, flush):
    folder, there = tmp_path_factory.mktemp("table"), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUEUE_ROWS", queue)
        patch.setattr(module, "FLUSH_ROWS", flush)
        views = table(folder, 80, dtype=dtype)
        batches = st.lists(st.integers(0, 79), min_size=1, max_size=40, unique=True)
        for action in data.draw(st.lists(st.sampled_from(["ask", "ask", "store", "flush", "reopen"]), max_size=15)):
            if action == "ask":
                rows = data.draw(batches)
                logits, computed = ask(views, rows)
                assert torch.equal(logits, true_logits(rows, dtype))
                assert {rows[position] for position in computed} == set(rows) - there
                there |= set(rows)
            elif action == "store":
                rows = data.draw(batches)
                views.store(torch.tensor(rows), true_logits(rows))
                there |= set(rows)
            elif action == "flush":
                views.flush()
                assert rows_there(folder, 80, dtype) == there
            else:
                views.close()
                views = table(folder, 80, dtype=dtype)
            assert views.filled_share == len(there) / 80
        views.close()
        assert rows_there(folder, 80, dtype) == there


def test_rows_are_flushed_without_being_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUEUE_ROWS", 32)
    monkeypatch.setattr(module, "FLUSH_ROWS", 64)
    views = table(tmp_path)
    for start in range(0, 160, 16):
        ask(views, range(start, start + 16))
    assert rows_there(tmp_path) >= set(range(64))


def test_rows_that_do_not_exist_and_logits_of_another_width_are_refused(tmp_path):
    views = table(tmp_path)
    for row in (-1, 1000):
        with pytest.raises(IndexError):
            ask(views, [row])
    with pytest.raises(ValueError, match=r"\(16, 7\)"):
        views.logits(torch.arange(16), lambda positions: torch.zeros(len(positions), 7))
    with pytest.raises(ValueError, match="bfloat16"):
        table(tmp_path, dtype=torch.bfloat16)
    views.close()
    assert rows_there(tmp_path) == set()


class PowerCut:
    """Records what is written and synced, and makes the worst folder that a power cut could leave at any moment.

    Of logits, only what was synced survives; of flags, everything that was written.
    """

    def __init__(self, monkeypatch):
        self.log = []
        write, sync = os.pwrite, getattr(os, SYNC)

        def pwrite(file, content, offset):
            content = bytes(content)[: max(1, len(content) // 2)]  # a system may write less than it was asked to
            self.log.append((os.fstat(file).st_ino, offset, content))
            return write(file, content, offset)

        def recorded_sync(file):
            self.log.append((os.fstat(file).st_ino, None, None))
            sync(file)

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, SYNC, recorded_sync)

    def folders(self, folder, target):
        """The folder as a cut after each number of operations would leave it, one after the other at `target`."""
        names = {(folder / name).stat().st_ino: name for name in ("logits.bin", "filled.bin")}
        for count in range(len(self.log) + 1):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            shutil.copy(folder / "identity.json", target)
            for inode, name in names.items():
                mine = [(offset, content) for file, offset, content in self.log[:count] if file == inode]
                if name == "logits.bin":
                    last_sync = max((place for place, (offset, _) in enumerate(mine) if offset is None), default=0)
                    mine = mine[:last_sync]
                survivor = bytearray((folder / name).stat().st_size)
                for offset, content in mine:
                    if offset is not None:
                        survivor[offset : offset + len(content)] = content
                (target / name).write_bytes(survivor)
            yield target


def test_after_a_power_cut_at_any_moment_no_row_counts_as_filled_that_is_not(tmp_path, monkeypatch):
    views, cut = table(tmp_path / "table", 60), PowerCut(monkeypatch)
    for rows in (range(20), range(10, 30, 2), [59, 58, 1, 40]):
        ask(views, rows)
        views.flush()
    monkeypatch.undo()
    expected = {*range(20), *range(10, 30, 2), 59, 58, 1, 40}
    seen = [rows_there(folder, 60) for folder in cut.folders(tmp_path / "table", tmp_path / "left")]
    assert seen[0] == set()
    assert seen[-1] == expected
    assert all(earlier <= later for earlier, later in itertools.pairwise(seen))
    reopened = table(tmp_path / "left", 60)
    assert reopened.filled_share == len(expected) / 60


def in_processes(*functions):
    """Run functions in processes of their own at the same time; each must end well."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(functions)


@pytest.mark.parametrize("dtype", DTYPES)
def test_processes_that_fill_one_table_at_once_lose_none_of_each_others_rows(tmp_path, dtype):
    count, start = 3000, multiprocessing.get_context("fork").Barrier(4)

    def fill(number):
        start.wait(30)
        views = table(tmp_path / "table", count, dtype=dtype)  # all of them make it
        random = torch.Generator().manual_seed(number)
        for step in range(60):
            rows = torch.randperm(count, generator=random)[:24]
            logits, _ = ask(views, rows)
            assert torch.equal(logits, true_logits(rows, dtype))
            if step % 3 == number % 3:
                views.flush()
        views.close()

    in_processes(*(lambda number=number: fill(number) for number in range(4)))
    everything = {
        row
        for random in (torch.Generator().manual_seed(number) for number in range(4))
        for _ in range(60)
        for row in torch.randperm(count, generator=random)[:24].tolist()
    }
    assert rows_there(tmp_path / "table", count, dtype) == everything


def test_of_two_processes_that_make_a_table_at_once_neither_takes_the_others_away(tmp_path):
    start = multiprocessing.get_context("fork").Barrier(2)
    write = module.write_json_atomically

    def fill(number):
        def write_slowly(path, obj):
            time.sleep(0.3)
            write(path, obj)

        module.write_json_atomically = write_slowly
        start.wait(30)
        views = table(tmp_path / "table")
        ask(views, range(32 * number, 32 * number + 32))
        views.close()

    in_processes(lambda: fill(0), lambda: fill(1))
    assert rows_there(tmp_path / "table") == set(range(64))


def test_a_process_finds_what_another_has_flushed_since_it_opened_the_table(tmp_path):
    mine, theirs = table(tmp_path), table(tmp_path)
    ask(theirs, range(40))
    assert set(ask(mine, range(10))[1]) == set(range(10))
    theirs.flush()
    assert mine.filled_share == 40 / 1000
    logits, computed = ask(mine, range(48))
    assert set(computed) == set(range(40, 48))
    assert torch.equal(logits, true_logits(range(48)))


def test_a_kill_leaves_what_was_flushed_and_nothing_that_is_wrong(tmp_path):
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def fill():
        views, random = table(tmp_path / "table", 5000), torch.Generator().manual_seed(1)
        while True:
            rows = torch.randperm(5000, generator=random)[:16]
            ask(views, rows)
            views.flush()
            writer.send(rows.tolist())

    process = context.Process(target=fill)
    process.start()
    flushed = set()
    while len(flushed) < 400:
        assert reader.poll(30)
        flushed |= set(reader.recv())
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    while reader.poll():
        flushed |= set(reader.recv())
    there = rows_there(tmp_path / "table", 5000)
    assert there >= flushed
    views = table(tmp_path / "table", 5000)
    assert torch.equal(ask(views, range(5000))[0], true_logits(range(5000)))


def test_a_kill_before_a_flush_costs_the_rows_that_were_not_flushed_alone(tmp_path):
    def fill():
        views = table(tmp_path / "table")
        ask(views, range(32))
        views.flush()
        ask(views, range(32, 64))
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join(30)
    logits, computed = ask(table(tmp_path / "table"), range(64))
    assert set(computed) == set(range(32, 64))
    assert torch.equal(logits, true_logits(range(64)))


def test_a_table_takes_no_space_for_rows_that_are_not_there(tmp_path):
    views = table(tmp_path, 10_000_000)
    ask(views, [0, 5_000_000, 9_999_999])
    views.close()
    assert (tmp_path / "logits.bin").stat().st_size == views.bytes == 10_000_000 * WIDTH * 4
    assert (tmp_path / "logits.bin").stat().st_blocks * 512 < 1_000_000


def test_closing_twice_is_closing_once(tmp_path):
    views = table(tmp_path)
    ask(views, range(20))
    views.close()
    views.close()
    assert rows_there(tmp_path) == set(range(20))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"identity": {"teacher": "abd"}}, "identity"),
        ({"identity": {"teacher": "abc", "mean": [0.5], "augmentation": [["flip", {"p": 0.5}]]}}, "identity"),
        ({"rows": 999}, "rows"),
        ({"classes": 4}, "classes"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_a_table_of_something_else_is_refused_and_left_alone(tmp_path, changed, named):
    views = table(tmp_path)
    ask(views, range(32))
    views.close()
    with pytest.raises(ConfigError, match=named) as caught:
        table(tmp_path, **changed)
    assert "teacher.cache=none" in caught.value.hint
    assert str(tmp_path) in caught.value.problem
    assert ask(table(tmp_path), range(32))[1] == []


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("identity.json", lambda path: path.write_text('{"format": 1, "rows"')),
        ("identity.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
        ("identity.json", lambda path: path.write_text("[]")),
        ("identity.json", lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 0'))),
        ("identity.json", lambda path: path.unlink()),
        ("logits.bin", cut_short),
        ("logits.bin", lambda path: path.unlink()),
        ("filled.bin", cut_short),
        ("filled.bin", lambda path: path.unlink()),
    ],
)
def test_a_damaged_table_is_made_anew_and_said_to_be(tmp_path, caplog, name, damage):
    views = table(tmp_path)
    ask(views, range(32))
    views.flush()
    damage(tmp_path / name)
    half_made = not (tmp_path / "identity.json").exists()
    again = table(tmp_path)
    assert again.filled_share == 0
    assert (str(tmp_path) in caplog.text) == (not half_made)
    assert torch.equal(ask(again, range(48))[0], true_logits(range(48)))
    again.close()
    assert rows_there(tmp_path) == set(range(48))
    # Who still has the old files goes on with them.
    assert torch.equal(ask(views, range(64))[0], true_logits(range(64)))


def test_flags_that_vkd_does_not_write_are_not_believed(tmp_path):
    table(tmp_path).close()
    (tmp_path / "filled.bin").write_bytes(bytes([7, 255]) + bytes(998))
    assert set(ask(table(tmp_path), range(16))[1]) == set(range(16))


def test_a_folder_that_cannot_be_written_is_refused_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError) as caught:
        table(tmp_path / "file" / "table")
    assert str(tmp_path / "file" / "table") in caught.value.problem
    assert "teacher.cache=none" in caught.value.hint
    assert "runs_root=" in caught.value.hint
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="Permission denied"):
        table(tmp_path / "table")


def test_a_table_that_would_not_fit_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = 1_000_000 * WIDTH * 4 + 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(ConfigError, match=r"13\.0 MB more .* 13\.0 MB free") as caught:
        table(tmp_path / "runs" / "table", 1_000_000)
    assert "teacher.cache=none" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    views = table(tmp_path / "runs" / "table", 1_000_000)
    views.store(torch.arange(900_000), torch.zeros(900_000, WIDTH))
    views.close()
    # What it has already is not asked for again.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed // 4))
    table(tmp_path / "runs" / "table", 1_000_000)


@pytest.mark.parametrize("operation", ["pwrite", SYNC])
def test_a_disk_that_is_full_is_one_message_and_costs_only_what_was_not_flushed(tmp_path, monkeypatch, operation):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    views = table(tmp_path)
    ask(views, range(32))
    views.flush()
    ask(views, range(32, 64))
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(TrainingError) as caught:
            views.flush()
    assert "No space left on device" in caught.value.problem
    assert str(tmp_path) in caught.value.problem
    assert "teacher.cache=none" in caught.value.hint
    assert views.filled_share == 32 / 1000
    assert rows_there(tmp_path) == set(range(32))
    logits, computed = ask(views, range(64))
    assert set(computed) == set(range(32, 64))
    assert torch.equal(logits, true_logits(range(64)))
    views.close()
    assert rows_there(tmp_path) == set(range(64))


def test_a_limit_of_the_system_on_the_size_of_files_is_one_message_too(tmp_path):
    resource = pytest.importorskip("resource")

    def fill():
        views = table(tmp_path / "table", 100_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        ask(views, range(32))
        views.flush()
        ask(views, range(99_000, 99_032))
        with pytest.raises(TrainingError, match="File too large"):
            views.close()

    in_processes(fill)
    assert rows_there(tmp_path / "table", 100_000) == set(range(32))


def test_views_that_can_be_counted_are_described_by_number_and_size(tmp_path):
    data = toy_data(tmp_path, augmentation={"crop": {"padding": 4}, "flip": {}})
    require_discrete(data)
    assert describe(data, torch.float32) == (
        f"{CLASSES} logits for 162 views of each of {data.train_size} images in float32, "
        f"{162 * data.train_size * CLASSES * 4 / 1e6:.1f} MB when full"
    )
    alone = toy_data(tmp_path / "alone", augmentation={})
    assert f"for 1 view of each of {alone.train_size} images in float16" in describe(alone, torch.float16)
    views = table(tmp_path / "table", 10_000_000)
    views.store(torch.arange(2_500_000), torch.zeros(2_500_000, WIDTH))
    assert "25.0 % of 10,000,000 rows, 120.0 MB when full" in str(views)


def test_an_augmentation_of_too_many_views_is_named(tmp_path):
    data = toy_data(tmp_path, augmentation={"crop": {}, "auto_augment": {}, "flip": {}})
    for refuse in (require_discrete, lambda data: describe(data, torch.float16)):
        with pytest.raises(ConfigError, match="augmentation auto_augment of 'toy'") as caught:
            refuse(data)
        assert caught.value.hint == "teacher.cache=none, or dataset.augmentation.auto_augment=null"


def test_images_that_are_read_from_files_are_refused(tmp_path):
    for split in ("train", "test"):
        for kind in ("ant", "bee"):
            (tmp_path / "pictures" / split / kind).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / split / kind / f"{number}.png")
    config = DatasetConfig(
        name="imagefolder",
        root=str(tmp_path / "pictures"),
        mean=[0.5] * 3,
        std=[0.5] * 3,
        image_size=8,
        val_fraction=0.0,
        augmentation={"flip": {}},
    )
    with pytest.raises(ConfigError, match="'imagefolder' are read from files") as caught:
        require_discrete(load_data(config, tmp_path, device=CPU, workers=0))
    assert caught.value.hint == "teacher.cache=none"


def test_the_identity_can_be_read_by_anyone(tmp_path):
    table(tmp_path, identity={"teacher": "abc", "mean": (0.25, 0.5)})
    assert json.loads((tmp_path / "identity.json").read_text()) == {
        "format": 1,
        "rows": 1000,
        "classes": WIDTH,
        "dtype": "float32",
        "identity": {"teacher": "abc", "mean": [0.25, 0.5]},
    }
    table(tmp_path, identity={"mean": (0.25, 0.5), "teacher": "abc"})
