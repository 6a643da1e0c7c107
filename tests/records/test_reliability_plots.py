import math
import random

import pytest

from records.studies import result
from records.test_alpha_beta import grid_contents, make
from records.test_map_plots import overlapping, spoken
from vkd.records.plots import to_svg
from vkd.records.reading import Run
from vkd.records.reliability_plots import draw_reliability, pool, reliability_of


def images_of(seed, count=400):
    """Confidence of each image, and whether the student is right."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        confidence = chance.betavariate(2, 1.5)
        found.append((confidence, chance.random() < confidence - 0.1))
    return found


def bins_of(images):
    """What a result says of the images: bin k of 15 is (k/15, (k+1)/15]."""
    content = {"counts": [0] * 15, "confidence": [0.0] * 15, "correct": [0] * 15}
    for confidence, right in images:
        place = next(place for place in range(15) if confidence <= (place + 1) / 15 or place == 14)
        content["counts"][place] += 1
        content["confidence"][place] += confidence
        content["correct"][place] += right
    return content


def slow_ece(images):
    """The expected calibration error from the images themselves."""
    total = 0.0
    for place in range(15):
        here = [(sure, right) for sure, right in images if place / 15 < sure <= (place + 1) / 15]
        if here:
            accuracy = sum(right for _, right in here) / len(here)
            confidence = sum(sure for sure, _ in here) / len(here)
            total += len(here) / len(images) * abs(accuracy - confidence)
    return total


def with_images(content, seed):
    images = images_of(seed)
    content["reliability"] = {"test": bins_of(images), "val": None}
    content["metrics"]["test/ece"] = slow_ece(images)
    return content


def study(contents=None):
    contents = [result("kd", "fkld", seed=seed) for seed in (1, 2, 3)] if contents is None else contents
    return make([with_images(content, place) for place, content in enumerate(contents)])


def done(content):
    return Run("a", "done", "", content)


def test_the_calibration_error_of_one_run_is_its_metric_and_of_several_that_of_all_images():
    contents = [with_images(result("kd", "fkld", seed=seed), seed) for seed in range(4)]
    some = [reliability_of(done(content), "test") for content in contents]
    for one, content in zip(some, contents, strict=True):
        assert one.ece == pytest.approx(content["metrics"]["test/ece"], abs=1e-9)
        assert (one.images, one.runs) == (400, 1)
    every = [image for seed in range(4) for image in images_of(seed)]
    together = pool(some)
    assert together.ece == pytest.approx(slow_ece(every), abs=1e-9)
    assert (together.images, together.runs) == (1600, 4)
    assert pool([]) is None


def test_bars_are_accuracies_gaps_reach_to_the_confidence_and_the_strip_has_the_shares():
    figure = draw_reliability(study())
    diagram, strip = figure.axes
    images = [image for place in range(3) for image in images_of(place)]
    by_bin = [[i for i in images if place / 15 < i[0] <= (place + 1) / 15] for place in range(15)]
    filled = [place for place in range(15) if by_bin[place]]
    accuracy = [sum(right for _, right in by_bin[place]) / len(by_bin[place]) for place in filled]
    confidence = [math.fsum(sure for sure, _ in by_bin[place]) / len(by_bin[place]) for place in filled]
    bars, gaps = diagram.containers
    assert [bar.get_height() for bar in bars] == pytest.approx(accuracy)
    assert [bar.get_x() for bar in bars] == pytest.approx([place / 15 for place in filled])
    assert [gap.get_y() + gap.get_height() for gap in gaps] == pytest.approx(confidence)
    assert all(gap.get_hatch() for gap in gaps)
    assert [bar.get_height() for bar in strip.containers[0]] == pytest.approx(
        [len(by_bin[place]) / len(images) for place in filled]
    )
    assert [line.get_xydata().tolist() for line in diagram.lines] == [[[0, 0], [1, 1]]]
    (text,) = diagram.texts
    own = sum(slow_ece(images_of(place)) for place in range(3)) / 3
    assert text.get_text() == f"ECE {slow_ece(images):.4f} ({own:.4f})\nn=1,200, 3 seeds"
    assert "test split, digits: cifar_resnet20 -> cifar_resnet8_width4" in spoken(figure)


@pytest.mark.parametrize(
    "damage",
    [
        lambda bins: bins.pop("counts"),
        lambda bins: bins.update(counts=bins["counts"][:14]),
        lambda bins: bins.update(counts=["1"] * 15),
        lambda bins: bins.update(counts=[1.5] * 15),
        lambda bins: bins.update(counts=[0] * 15),
        lambda bins: bins.update(correct=[-1] * 15),
        lambda bins: bins.update(correct=[10**30] * 15),
        lambda bins: bins.update(correct=[n + 1 for n in bins["counts"]]),
        lambda bins: bins.update(confidence=[float("nan")] * 15),
        lambda bins: bins.update(confidence=[2.0 * n + 1 for n in bins["counts"]]),
        lambda bins: bins.update(confidence={"0": 1}),
    ],
)
def test_what_cannot_have_been_counted_is_not_shown(damage):
    bins = bins_of(images_of(1))
    content = {**result(), "reliability": {"test": bins}}
    assert reliability_of(done(content), "test") is not None
    damage(bins)
    assert reliability_of(done(content), "test") is None
    assert draw_reliability(make([content])) is None


def test_results_of_older_versions_have_no_diagram():
    for reliability in ({}, None, [], {"test": None}, {"test": 3}, "x"):
        assert draw_reliability(make([{**result(), "reliability": reliability}])) is None
    assert draw_reliability(make([result()])) is None
    assert draw_reliability(make([])) is None


def test_where_nothing_is_known_of_test_that_of_val_is_shown():
    content = {**result(), "reliability": {"val": bins_of(images_of(1)), "test": None}}
    assert "val split" in spoken(draw_reliability(make([content])))


def test_a_few_rows_of_each_column_are_shown_and_no_text_covers_another():
    contents = grid_contents(seeds=(1,)) + grid_contents(seeds=(1,), dataset="another_data_set_" * 3, plain=False)
    figure = draw_reliability(study(contents))
    assert len(figure.axes) == 2 * 8
    assert "4 of 12 rows" in spoken(figure)
    assert "4 of 11 rows" in spoken(figure)
    assert overlapping(figure) == []
    figure = draw_reliability(study(grid_contents(seeds=(1,))))
    assert "8 of 12 rows" in spoken(figure)
    assert overlapping(figure) == []


def test_the_same_images_give_the_same_bytes():
    assert to_svg(draw_reliability(study())) == to_svg(draw_reliability(study()))
