"""A checkpoint is whole or refused, replaced or kept, and never runs code."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from toys import differences

from vkd.errors import TrainingError
from vkd.training.checkpoint import read_checkpoint, read_newest_checkpoint, remove_checkpoints, write_checkpoint

STATE = {"weights": torch.arange(50.0), "position": [2, 3], "history": [{"epoch": 1, "val/top1": None}], "name": "kd"}


@pytest.fixture
def path(tmp_path):
    write_checkpoint(tmp_path / "last.ckpt", STATE)
    return tmp_path / "last.ckpt"


def test_what_was_written_is_read(path):
    assert differences(STATE, read_checkpoint(path)) == []
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_torn_file_is_refused_by_its_name(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(TrainingError, match=r"last\.ckpt is damaged") as caught:
        read_checkpoint(path)
    assert "remove last.ckpt" in str(caught.value)


def test_a_file_that_lacks_its_last_byte_or_has_one_more_is_refused(path):
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(TrainingError, match=r"last\.ckpt"):
            read_checkpoint(path)


def test_one_flipped_byte_anywhere_is_noticed(path):
    content = path.read_bytes()
    for place in [*range(0, len(content), 97), len(content) - 60, len(content) - 40, len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(TrainingError, match=r"last\.ckpt is damaged"):
            read_checkpoint(path)


def test_a_file_that_cannot_be_read_is_an_error_without_a_traceback(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(TrainingError, match=r"last\.ckpt cannot be read"):
        read_checkpoint(tmp_path / "last.ckpt")


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match="No space left on device") as caught:
            write_checkpoint(path, {"weights": torch.zeros(3)})
    assert str(path) in str(caught.value)
    assert differences(STATE, read_checkpoint(path)) == []
    assert list(path.parent.iterdir()) == [path]


def test_a_rename_that_fails_keeps_the_checkpoint_before(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(TrainingError, match="could not be written"):
            write_checkpoint(path, {"weights": torch.zeros(3)})
    assert differences(STATE, read_checkpoint(path)) == []
    assert {file.name for file in path.parent.iterdir()} <= {"last.ckpt", "previous.ckpt"}


def test_the_one_before_is_kept_and_no_other(path):
    for number in (1, 2, 3):
        write_checkpoint(path, {"number": number})
    assert read_checkpoint(path) == {"number": 3}
    assert read_checkpoint(path.with_name("previous.ckpt")) == {"number": 2}
    assert len(list(path.parent.iterdir())) == 2


def test_it_is_kept_where_a_file_cannot_have_two_names_too(path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", full)
    write_checkpoint(path, {"number": 2})
    assert read_checkpoint(path) == {"number": 2}
    assert differences(STATE, read_checkpoint(path.with_name("previous.ckpt"))) == []


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"", lambda content: b"x" + content])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_which_no_writing_loses(path, damage, caplog):
    write_checkpoint(path, {"number": 2})
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="vkd"):
        assert differences(STATE, read_newest_checkpoint(path)) == []
    assert "last.ckpt is damaged" in caplog.text
    assert "going on from the checkpoint before it" in caplog.text
    write_checkpoint(path, {"number": 3})
    path.write_bytes(damage(path.read_bytes()))
    assert differences(STATE, read_newest_checkpoint(path)) == []


def test_a_kill_between_the_two_files_leaves_one_to_go_on_from(path, caplog):
    path.rename(path.with_name("previous.ckpt"))
    assert differences(STATE, read_newest_checkpoint(path)) == []
    assert caplog.text == ""


def test_without_any_that_can_be_read_there_is_one_message_and_nothing_is_removed(path):
    write_checkpoint(path, STATE)
    before = path.with_name("previous.ckpt")
    for file in (path, before):
        file.write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"last\.ckpt is damaged"):
        read_newest_checkpoint(path)
    assert path.exists()
    assert before.exists()
    remove_checkpoints(path)
    assert read_newest_checkpoint(path) is None


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def with_a_right_checksum(payload: bytes) -> bytes:
    return payload + b"vkd-checkpoint-1" + hashlib.sha256(payload).digest()


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_code_in_a_file_with_a_right_checksum_is_refused_and_not_run(path, way):
    trap = Trap(path.with_name("sprung"))
    if way == "torch":
        buffer = io.BytesIO()
        torch.save({"weights": trap}, buffer)
        payload = buffer.getvalue()
    else:
        payload = pickle.dumps({"weights": trap}, protocol=2)
    path.write_bytes(with_a_right_checksum(payload))
    with pytest.raises(TrainingError, match=r"last\.ckpt"):
        read_checkpoint(path)
    assert not path.with_name("sprung").exists()


@pytest.mark.parametrize("payload", [b"", b"no archive at all", b"PK\x03\x04 half an archive"])
def test_something_else_with_a_right_checksum_is_refused(path, payload):
    path.write_bytes(with_a_right_checksum(payload))
    with pytest.raises(TrainingError, match=r"last\.ckpt"):
        read_checkpoint(path)


def test_data_that_is_no_state_is_refused(path):
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    path.write_bytes(with_a_right_checksum(buffer.getvalue()))
    with pytest.raises(TrainingError, match=r"last\.ckpt holds no checkpoint"):
        read_checkpoint(path)
