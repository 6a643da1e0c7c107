import json
import os

import numpy as np
import pytest

from vkd.records.atomic import write_bytes_atomically, write_json_atomically, write_text_atomically


def test_written_content_is_the_content_of_the_file_and_nothing_else_is_left(tmp_path):
    write_bytes_atomically(tmp_path / "a", b"\x00\r\n")
    write_text_atomically(tmp_path / "b", "é\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\r\n"
    assert (tmp_path / "b").read_bytes() == "é\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_text_that_utf8_cannot_hold_is_escaped_not_an_error(tmp_path):
    write_text_atomically(tmp_path / "a", "x\udce9y")
    assert (tmp_path / "a").read_text() == "x\\udce9y"


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    write_text_atomically(tmp_path / "a", "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_json_has_null_for_floats_that_are_not_finite_and_keeps_the_order_of_keys(tmp_path):
    values = {"b": float("nan"), "a": [float("inf"), np.float32(1.5), np.int64(3)], "c": (tmp_path, True, None)}
    write_json_atomically(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": None, "a": [None, 1.5, 3], "c": [str(tmp_path), True, None]}
    assert text.startswith('{\n  "b": null')


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json_atomically(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_files_get_the_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_text_atomically(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
