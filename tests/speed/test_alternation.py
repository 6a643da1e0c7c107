"""Alternation: every part in turn, over the same steps, with nothing else running."""

import contextlib

import pytest
import torch

from vkd.speed import alternation
from vkd.speed.alternation import WARM_UP_STEPS, Part, Spread, alternate, ratio

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when a part takes a step, at the part's own pace."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.said = []
        monkeypatch.setattr(alternation.time, "perf_counter", lambda: self.now)

    def part(self, name, *, pace, images=10, first_step_costs=0.0):
        """A part whose steps take `pace` seconds each; the first one within `running` costs more."""
        fresh = [False]

        @contextlib.contextmanager
        def running():
            self.said.append((name, "begins"))
            fresh[0] = True
            yield
            self.said.append((name, "ends"))

        def take_steps(count):
            self.now += pace() * count if callable(pace) else pace * count
            if fresh[0]:
                self.now += first_step_costs
                fresh[0] = False
            self.said.append((name, count))

        return Part(name, images, take_steps, None, running)


def measure(parts, **options):
    given = {"device": CPU, "repetitions": 3, "steps": 7, "seconds": 1.0, "settling_steps": 2, **options}
    return alternate(parts, **given)


def test_a_rate_is_the_images_of_the_timed_steps_by_their_seconds(monkeypatch):
    clock = Clock(monkeypatch)
    parts = [
        clock.part("slow", pace=0.5, first_step_costs=60.0),
        clock.part("fast", pace=0.125, images=90, first_step_costs=7.0),
    ]
    rates = measure(parts)
    assert rates.steps == 7
    assert rates.images_per_second == {"slow": [20.0] * 3, "fast": [720.0] * 3}


def test_each_alternation_has_every_part_once_and_begins_with_another(monkeypatch):
    clock = Clock(monkeypatch)
    measure([clock.part(name, pace=0.1) for name in "abc"], repetitions=4)
    timed = [name for name, what in clock.said if what == 7]
    assert timed == [*"abc", *"bca", *"cab", *"abc"]


def test_no_part_is_running_while_another_takes_steps(monkeypatch):
    clock = Clock(monkeypatch)
    measure([clock.part(name, pace=0.1) for name in "abc"])
    running = None
    for name, what in clock.said:
        if what == "begins":
            assert running is None
            running = name
        elif what == "ends":
            running = None
        else:
            assert running == name


def test_steps_are_settled_untimed_before_each_timing_and_warmed_up_once(monkeypatch):
    clock = Clock(monkeypatch)
    measure([clock.part("one", pace=0.1)], repetitions=2)
    counts = [what for _, what in clock.said if isinstance(what, int)]
    assert counts == [WARM_UP_STEPS, 2, 7, 2, 7]


@pytest.mark.parametrize(("pace", "steps"), [(0.125, 24), (400.0, 1), (1e-9, alternation.MOST_STEPS)])
def test_without_a_number_of_steps_the_first_part_takes_about_the_seconds_asked_for(monkeypatch, pace, steps):
    clock = Clock(monkeypatch)
    parts = [clock.part("paced", pace=pace, first_step_costs=9.0), clock.part("other", pace=1.0)]
    assert measure(parts, steps=None, seconds=3.0).steps == steps
    assert ("other", steps) in clock.said


def test_a_ratio_is_taken_within_each_repetition():
    rates = {"classic": [10.0, 20.0, 5.0], "run": [30.0, 40.0, 25.0], "none": []}
    assert ratio(rates, "run", "classic") == Spread(median=3.0, least=2.0, most=5.0)
    assert ratio(rates, "run", "none") is None
    assert ratio(rates, "none", "run") is None
