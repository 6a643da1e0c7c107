"""The command that repeats a run trains, and does nothing else, whoever wrote the record."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from records.studies import result
from vkd.records.commands import command_of, train_command
from vkd.records.reading import Run


def offered(command, **content):
    return command_of(Run("run", "done", "", result(environment={"command": command}, **content)))


def test_a_recorded_command_is_repeated_without_the_places_of_its_machine():
    words = "dataset=digits 'divergence.alpha=0.5' seed=2 runs_root=/home/me/runs +data_root=x ++tracker.name=wandb"
    assert offered(f"python -m vkd.train {words}") == "python -m vkd.train dataset=digits divergence.alpha=0.5 seed=2"
    assert offered("python -m vkd.train seed=1", world_size=2).startswith("torchrun --nproc-per-node 2 -m vkd.train")
    assert train_command(["-m", "hydra/launcher=fused", "seed=1,2"]) == (
        "python -m vkd.train -m hydra/launcher=fused seed=1,2"
    )


HOSTILE = [
    "+hydra.callbacks.x._target_=os.mkdir",
    "hydra.run.dir=elsewhere",
    "++hydra.searchpath=[file:///elsewhere]",
    "hydra/launcher@hydra.callbacks.x=fused",
    "+dataset@hydra.callbacks.x=imagefolder",
    "hydra/job_logging=elsewhere",
    "--config-dir=elsewhere",
    "-cn",
    "dataset.root=${oc.env:HOME}",
    "+x={_target_: os.mkdir}",
    "experiment=../../elsewhere",
    "seed=1\x1b[2J",
    "seed=1\nrm",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_words_that_do_more_than_train_are_not_offered(word):
    assert train_command(["dataset=digits", word]) is None
    assert offered(shlex.join(["python", "-m", "vkd.train", word])) is None


@pytest.mark.parametrize(
    "command", ["rm -rf x", "python -m vkd.train 'seed=1", "python -m vkd.collect study=x", None, 3]
)
def test_what_is_no_command_of_ours_is_not_offered(command):
    assert offered(command) is None


@pytest.mark.parametrize(
    "word", ["seed=$(touch here)", "seed=`touch here`", "seed=1; touch here", "seed=1 && touch here"]
)
def test_a_shell_takes_every_word_as_one(word, tmp_path):
    line = train_command([word]).replace("python -m vkd.train", f"{sys.executable} -c 'import sys; print(sys.argv[1])'")
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == word + "\n"
    assert not (tmp_path / "here").exists()
