"""What is shown of a run, and that showing it changes nothing."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console
from toys import differences, outcome, rig

import vkd.training.display
from vkd.training.display import BarDisplay, LineDisplay, describe_epoch, make_display

LINE = {
    "epoch": 3,
    "learning_rate": 0.05,
    "train/loss": 1.23456,
    "train/cross_entropy": 0.23456,
    "train/kd": 1.0,
    "train/top1": 51.234,
    "val/top1": 48.0,
    "test/top1": 47.5,
    "test/nll": 2.0,
    "images_per_second": 12345.6,
    "seconds": 9.0,
}


@pytest.fixture
def console():
    """A terminal that one can read afterwards."""
    return Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)


def shown(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_line_says_epoch_terms_accuracies_and_speed():
    assert describe_epoch(LINE, 30) == (
        "epoch 3/30  loss 1.2346  cross_entropy 0.2346  kd 1.0000  "
        "train 51.23 %  val 48.00 %  test 47.50 %  12,346 images/s"
    )


def test_a_line_leaves_out_what_was_not_measured():
    line = {"epoch": 1, "train/loss": 2.0, "train/top1": 10.0, "val/top1": None, "images_per_second": None}
    assert describe_epoch(line, 2) == "epoch 1/2  loss 2.0000  train 10.00 %"


@pytest.mark.parametrize("kind", [LineDisplay, BarDisplay])
def test_every_epoch_gives_one_line(kind, console, caplog):
    display = kind() if kind is LineDisplay else kind(console)
    with caplog.at_level(logging.INFO, logger="vkd"):
        display.epoch_started(1, 5, 0, 10)
        display.step_done(64, dict)
        display.epoch_done({**LINE, "epoch": 1})
        display.close()
    assert [record.getMessage().split("  ")[0] for record in caplog.records] == ["epoch 1/5"]


def test_the_total_of_a_single_term_is_not_said_twice():
    line = {"epoch": 1, "train/loss": 2.0, "train/cross_entropy": 2.0, "train/top1": 10.0}
    assert describe_epoch(line, 2) == "epoch 1/2  cross_entropy 2.0000  train 10.00 %"


def test_bars_are_for_terminals_alone(console):
    assert type(make_display(console)) is BarDisplay
    assert type(make_display(Console(file=io.StringIO(), force_terminal=False))) is LineDisplay


def test_a_bar_shows_epoch_terms_accuracy_speed_and_the_time_left(console, monkeypatch):
    monkeypatch.setattr(vkd.training.display, "SECONDS_BETWEEN_FIGURES", 0.0)
    bar = BarDisplay(console)
    bar.epoch_started(2, 3, 4, 10)
    bar.step_done(64, lambda: {"loss": 1.5, "cross_entropy": 1.25, "kd": 0.25, "top1": 62.34})
    bar.progress.refresh()
    bar.close()
    text = shown(console)
    assert "epoch 2/3" in text
    assert re.search(r"[\d-]:[\d-]{2}:[\d-]{2}", text)
    assert re.search(r"[\d,]+ images/s  train 62\.3 %  loss 1\.500  cross_entropy 1\.250  kd 0\.250", text)


def test_a_bar_asks_for_figures_about_once_a_second(console, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(vkd.training.display.time, "perf_counter", lambda: clock[0])
    asked = []

    def figures():
        asked.append(clock[0])
        return {"loss": 1.0, "top1": 0.0}

    bar = BarDisplay(console)
    bar.epoch_started(1, 1, 0, 100)
    for _ in range(100):
        clock[0] += 0.25
        bar.step_done(10, figures)
    bar.close()
    assert asked == [float(second) for second in range(1, 26)]


def test_the_speed_of_a_bar_leaves_out_the_time_between_epochs(console, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(vkd.training.display.time, "perf_counter", lambda: clock[0])
    bar = BarDisplay(console)
    # Starting up and an evaluation of a hundred seconds each, and steps of half a second.
    for epoch in (1, 2):
        clock[0] += 100
        bar.epoch_started(epoch, 2, 0, 1)
        clock[0] += 0.5
        bar.step_done(10, lambda: {"loss": 1.0, "top1": 0.0})
    figures = bar.progress.tasks[0].fields["figures"]
    bar.close()
    assert "20 images/s" in figures


def test_a_bar_that_never_started_can_be_closed(console):
    BarDisplay(console).close()


def test_bars_change_no_number(data, console, monkeypatch):
    monkeypatch.setattr(vkd.training.display, "SECONDS_BETWEEN_FIGURES", 0.0)
    quiet, loud = rig(data), rig(data)
    loud.trainer.display = BarDisplay(console)
    loud.trainer.should_stop = lambda: False
    expected = outcome(quiet)
    assert differences(expected, outcome(loud)) == []
    loud.trainer.display.close()
    assert "epoch 3/3" in shown(console)
