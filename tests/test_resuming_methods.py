"""Methods with memories, drawn numbers, learned layers and several views go on exactly where they were stopped."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from commands import TINY
from rich.console import Console

from vkd.composition import compose_config
from vkd.config import parse
from vkd.training.interruption import Interrupted
from vkd.training.run import run

QUIET = Console(quiet=True)


def outcome(directory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The history without its clock, and the student's weights."""
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    timeless = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    return timeless, safetensors.torch.load_file(directory.weights)


@pytest.mark.parametrize(
    "words",
    [
        ["method=crd", "method.crd.negatives=64"],
        ["method=mlkd"],
        ["method=ctkd", "method.ctkd.scope=instance"],
        ["method=[kd,at,vid]", "precision=bf16"],
        ["method=reviewkd", "recipe.ema_decay=0.9"],
    ],
)
@pytest.mark.usefixtures("place")
def test_a_run_that_is_stopped_in_an_epoch_ends_as_if_it_had_not_been(words):
    def config(study):
        return parse(compose_config([*TINY, *words, f"study={study}", "recipe.epochs=2"]))

    whole = run(config("whole"), console=QUIET).directory
    asked = []

    def after_twenty_steps():
        asked.append(None)
        return len(asked) == 20

    with pytest.raises(Interrupted, match="step 2 of epoch 2"):
        run(config("cut"), console=QUIET, should_stop=after_twenty_steps)
    cut = run(config("cut"), console=QUIET).directory
    (history, weights), (expected_history, expected_weights) = outcome(cut), outcome(whole)
    assert history == expected_history
    assert len(history) == 2
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name
