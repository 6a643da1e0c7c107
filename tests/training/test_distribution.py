"""Two processes that train one student together do what one process does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import CPU, toy_data
from two_processes import CASES

import vkd
from vkd import launched
from vkd.errors import ConfigError
from vkd.training.distribution import ONE, Processes, join
from vkd.training.environment import choose_device


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(script: str, *words: str) -> list[subprocess.Popen[str]]:
    """A script of this folder in each of two processes."""
    path = Path(__file__).with_name(script)
    given = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(vkd.__file__).parents[1]), str(path.parent)]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(path), *words],
            env={**given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> dict[str, str]:
    """What each case found wrong, by its name."""
    folder = tmp_path_factory.mktemp("two")
    started = start_two("two_processes.py", str(folder))
    said = [process.communicate(timeout=600)[0] for process in started]
    assert (folder / "faults.json").exists(), said
    return json.loads((folder / "faults.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(name, faults):
    assert not faults[name], faults[name]


def test_a_process_that_hangs_is_ended_when_another_dies_and_leaves_the_reason(tmp_path):
    told = tmp_path / "told.txt"
    first, second = start_two("hanging_process.py", str(told))
    assert second.wait(timeout=120) == -signal.SIGKILL
    out, _ = first.communicate(timeout=30)
    assert first.returncode == 1
    assert told.read_text().startswith("another of the 2 processes of this run ended without a word")
    assert "vkd: another of the 2 processes" in out


LEAVING = """
import os, sys, time
from vkd.training.distribution import join

# Copies of one process, which need not import torch again.
for port in sys.argv[1:]:
    started = []
    for rank in range(2):
        started.append(os.fork())
        if started[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=port)
            join().gather(rank)
            time.sleep(0.3 * rank)
            sys.exit(2)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started), flush=True)
"""


def test_the_first_process_waits_for_a_later_one_and_ends_with_its_own_exit_code():
    given = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    given |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ports = [str(free_port()) for _ in range(3)]
    command = [sys.executable, "-c", LEAVING, *ports]
    found = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
    assert found.stdout.splitlines() == ["2 2"] * 3, found.stderr
    assert found.stderr == ""


class Pretended(Processes):
    """One of several processes, by its number alone."""

    def __init__(self, rank: int, world_size: int, local_rank: int | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank = rank if local_rank is None else local_rank


@pytest.mark.parametrize(("train", "batch_size", "drop_last"), [(30, 8, False), (30, 8, True), (27, 8, False)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_a_batch_are_its_images_in_their_order(tmp_path, train, batch_size, drop_last, world_size):
    data = toy_data(tmp_path, train=train, val_fraction=0)
    given = {"seed": 3, "epoch": 2, "batch_size": batch_size, "drop_last": drop_last}
    for start_step in (0, 2):
        whole = list(data.train_batches(**given, start_step=start_step))
        shares = [
            list(data.train_batches(**given, start_step=start_step, part=(rank, world_size)))
            for rank in range(world_size)
        ]
        # A last batch that leaves a process less than two images is left out.
        steps = data.steps_per_epoch(batch_size, drop_last, world_size)
        assert [len(share) for share in shares] == [steps - start_step] * world_size
        for number, batch in enumerate(whole[: steps - start_step]):
            parts = [share[number] for share in shares]
            sizes = [len(part.targets) for part in parts]
            assert sum(sizes) == len(batch.targets)
            assert sizes == sorted(sizes, reverse=True)
            assert min(sizes) >= 2
            assert max(sizes) - min(sizes) <= 1
            for name in ("images", "targets", "indices", "view_rows"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name


@pytest.mark.parametrize(("train", "steps"), [(30, {1: 4, 2: 4, 4: 3}), (27, {1: 4, 2: 3, 4: 3}), (25, {1: 3, 2: 3})])
def test_a_rest_is_used_where_each_process_gets_two_images_of_it(tmp_path, train, steps):
    data = toy_data(tmp_path, train=train, val_fraction=0)
    for world_size, expected in steps.items():
        assert data.steps_per_epoch(8, False, world_size) == expected


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused_with_one_that_can(tmp_path):
    data = toy_data(tmp_path)
    with pytest.raises(ConfigError, match=r"recipe\.batch_size=7") as caught:
        data.steps_per_epoch(7, False, 3)
    assert "recipe.batch_size=6" in str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_the_parts_of_a_split_are_its_images_in_their_order(tmp_path, world_size):
    data = toy_data(tmp_path)
    for split in ("val", "test", "train"):
        whole = torch.cat([batch.indices for batch in data.eval_batches(split, batch_size=4)])
        parts = [
            batch
            for rank in range(world_size)
            for batch in data.eval_batches(split, batch_size=4, part=(rank, world_size))
        ]
        assert torch.equal(torch.cat([part.indices for part in parts]), whole)
        assert torch.equal(torch.cat([part.images for part in parts]), data.images(split))
        assert torch.equal(torch.cat([part.targets for part in parts]), data.targets(split))


@pytest.mark.parametrize("count", [0, 1, 5, 17, 64])
def test_shares_are_cut_as_torch_cuts_a_tensor(count):
    for world_size in (1, 2, 3, 8):
        expected = [len(part) for part in torch.arange(count).tensor_split(world_size)]
        assert Pretended(0, world_size).sizes(count) == expected


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert join.__wrapped__() is ONE
    assert (ONE.rank, ONE.world_size, ONE.is_first, ONE.several) == (0, 1, True, False)
    assert ONE.first(lambda: 5) == 5
    assert ONE.flags(True, False) == (True, False)


@pytest.mark.parametrize(
    "given",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "-2"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "RANK": "x"},
    ],
)
def test_an_environment_that_makes_no_sense_is_refused_with_its_values(monkeypatch, given):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        launched.rank()
    assert f"WORLD_SIZE={given['WORLD_SIZE']}" in str(caught.value)
    assert "torchrun" in str(caught.value)


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert choose_device(name, Pretended(5, 8, local_rank=1)) == torch.device("cuda", 1)
    assert choose_device("cpu", Pretended(5, 8, local_rank=1)) == CPU
    with pytest.raises(ConfigError, match="--nproc-per-node 2"):
        choose_device("auto", Pretended(2, 3))
    with pytest.raises(ConfigError, match="device=cuda:1 is one device"):
        choose_device("cuda:1", Pretended(0, 2))


def test_without_gpus_several_processes_take_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", Pretended(1, 2)) == CPU
