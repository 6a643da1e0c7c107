"""One teacher and one student of it, trained once, for all tests of the commands that need them."""

import os
import shutil

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: more threads than cores make tiny networks many times slower.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of the tests' own in place of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The runs root with a teacher and one student, both of one epoch. Tests must leave it as it is."""
    from commands import train

    root = tmp_path_factory.mktemp("trained") / "runs"
    assert train(f"runs_root={root}") == 0
    return root


@pytest.fixture
def place(tmp_path, monkeypatch, trained):
    """An empty working directory whose runs root holds the trained teacher, so that no test trains it again."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "teachers", tmp_path / "runs" / "teachers")
    return tmp_path
