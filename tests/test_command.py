"""The words of a command: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vkd.command import parse_words
from vkd.errors import ConfigError


@dataclass
class Words:
    study: str | None = "usual"
    images: int = 3
    watch: bool = False


@pytest.mark.parametrize("name", ["on", "1e3", "[", "007", "a: b", "${x}", "{", "#1", "'a'", "2026-11-26", "x=y"])
def test_a_text_is_taken_as_it_stands(name):
    assert parse_words(Words, [f"study={name}"]) == Words(study=name)


def test_null_is_no_text_and_other_values_have_their_types():
    assert parse_words(Words, ["study=null", "images=12", "watch=true"]) == Words(None, 12, True)


@pytest.mark.parametrize(
    "word", ["images=[", "images=x", "watch=maybe", "images={", "imges=3", "images", "--images=3", "images=${x}"]
)
def test_a_word_that_means_nothing_is_one_message(word):
    with pytest.raises(ConfigError) as caught:
        parse_words(Words, [word])
    assert word.partition("=")[0] in str(caught.value)
