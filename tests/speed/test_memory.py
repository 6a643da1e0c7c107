"""What something takes of memory, in tensors of known sizes."""

import numpy as np
import torch
from torch import nn

from vkd.speed.memory import held_bytes, peak_bytes

CPU = torch.device("cpu")
MEGABYTE = 250_000
"""Numbers of float32 in it."""


def test_the_peak_is_the_most_that_is_alive_at_once():
    def work():
        one = torch.empty(3 * MEGABYTE)
        two = torch.empty(4 * MEGABYTE)
        del one
        three = torch.empty(2 * MEGABYTE)
        del two, three
        torch.empty(5 * MEGABYTE)

    assert peak_bytes(work, CPU) == 7_000_000


def test_what_an_operation_needs_for_itself_counts_too():
    values = torch.rand(4 * MEGABYTE)

    # The values sorted are 4 MB, their positions 8 MB, whatever sorting takes beside.
    assert peak_bytes(lambda: torch.sort(values).values, CPU) >= 12_000_000


def test_what_was_there_before_and_what_stays_from_one_time_to_the_next_is_not_counted():
    there = torch.zeros(9 * MEGABYTE, requires_grad=True)

    def work():
        there.grad = None
        # The product and the gradient, of 9 MB each, one after the other in the place of the gradient before.
        (there * 2.0).sum().backward()

    assert peak_bytes(work, CPU) < 1_000_000
    there.grad = None
    alone = peak_bytes(lambda: torch.empty(2 * MEGABYTE), CPU)
    assert alone == 2_000_000


def test_nothing_is_said_on_standard_error(capfd):
    values = torch.ones(10, requires_grad=True)
    values.sum().backward()
    peak_bytes(lambda: setattr(values, "grad", None), CPU)
    assert capfd.readouterr().err == ""


class Loop:
    """Holds tensors in the ways that a loop may."""

    def __init__(self):
        self.network = nn.Linear(100, 50)  # 5,050 parameters
        self.network.register_buffer("counts", torch.zeros(7, dtype=torch.int64))
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9)
        self.parts = {"list": [torch.zeros(10), (torch.zeros(20),)]}
        self.same = self.network.weight.detach()[:3]


def test_held_are_weights_buffers_gradients_and_optimizer_state_each_once():
    loop = Loop()
    base = 4 * 5050 + 8 * 7 + 4 * 30
    assert held_bytes(loop, CPU) == base
    loop.network(torch.ones(1, 100)).sum().backward()
    assert held_bytes(loop, CPU) == base + 4 * 5050
    loop.optimizer.step()
    assert held_bytes(loop, CPU) == base + 2 * 4 * 5050


def test_arrays_count_whole_and_once_and_files_do_not(tmp_path):
    loop = Loop()
    before = held_bytes(loop, CPU)
    pixels = np.zeros((10, 4, 4, 3), dtype=np.uint8)
    np.zeros(1000, dtype=np.uint8).tofile(tmp_path / "file")
    loop.pixels, loop.part = pixels, pixels[2:5]
    loop.file = np.memmap(tmp_path / "file", dtype=np.uint8, mode="r")
    assert held_bytes(loop, CPU) == before + 480


def test_other_loops_are_not_held_by_a_loop_that_has_a_function_of_the_same_module():
    other = Loop()
    loop = Loop()
    loop.make = lambda: other
    assert held_bytes(loop, CPU) == held_bytes(other, CPU)
