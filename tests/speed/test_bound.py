"""The bound takes the step that a run takes, over one batch."""

from pathlib import Path

import pytest
import torch

from vkd.composition import compose_config
from vkd.config import parse
from vkd.speed.bound import BoundLoop
from vkd.speed.loops import Loops, as_measured
from vkd.training.assembly import assemble

WORDS = [
    "teacher.arch=cifar_resnet8_width4",
    "student.arch=cifar_resnet8",
    "device=cpu",
    "recipe.batch_size=32",
    "recipe.epochs=2",
]


@pytest.fixture
def assembled(tmp_path):
    """A function that gives a new trainer for some words; those for the same words have the same teacher."""

    def make(*words):
        config = as_measured(parse(compose_config([*WORDS, *words])), Path(tmp_path))
        loops = Loops(config, students=1)
        return assemble([loops.config], loops.workplace)

    return make


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["divergence=abkd", "recipe.clip_grad_norm=0.1", "recipe.label_smoothing=0.1"],
        ["method=at"],
        ["precision=bf16"],
        ["channels_last=false", "teacher.fold=false", "fused_optimizer=false"],
    ],
    ids=" ".join,
)
def test_its_first_step_is_that_of_a_run(assembled, words):
    trainer = assembled(*words)
    trainer.take_steps(1)
    loop = BoundLoop(assembled(*words))
    loop.take_steps(1)
    expected = trainer.sessions[0].learner.student.state_dict()
    found = loop.learner.student.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_every_step_learns_from_the_same_batch(assembled):
    loop = BoundLoop(assembled())
    images = loop.images.clone()
    losses = [loop.step().item() for _ in range(30)]
    assert torch.equal(loop.images, images)
    assert losses[-1] < losses[0]
