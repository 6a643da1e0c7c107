"""One thread: on networks this small, more of them only wait for each other."""

import pytest
import torch
from toys import DrawnProjection, registered, toy_data


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path):
    """Thirty training images, twelve for validation, fourteen for testing, four classes."""
    return toy_data(tmp_path / "data")


@pytest.fixture
def drawn(monkeypatch):
    """The name of a method that has parameters, a buffer and a generator."""
    registered(monkeypatch, "drawn", DrawnProjection)
    return "drawn"
