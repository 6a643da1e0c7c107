import math
import random

import pytest

from records.studies import config_of, digest, result
from vkd.records.alpha_beta import NAMED, grids_of
from vkd.records.grouping import build_table
from vkd.records.reading import Run

ALPHAS, BETAS = (0.4, 0.7, 1.0), (0.0, 0.3, 0.6)


def make(contents, metric="test/top1", failed=lambda content: False, **settings):
    """The table of runs that are done, but for those that `failed` says have a config alone."""
    runs = [
        Run(f"{place:05}", "failed", "loss not finite", config_of(content))
        if failed(content)
        else Run(f"{place:05}", "done", "", content)
        for place, content in enumerate(contents)
    ]
    return build_table(runs, study="s", metric=metric, command="c", **settings)


def grid_contents(alphas=ALPHAS, betas=BETAS, seeds=(1, 2, 3), own=("fkld", "rkld"), plain=True, **settings):
    """Results of a grid with forward and reverse KL by their own names and plain training; val and test differ."""
    chance = random.Random(7)
    contents = [
        result(
            "kd", "abkd", point=(alpha, beta), seed=seed, top1=chance.gauss(60, 2), val=chance.gauss(61, 2), **settings
        )
        for alpha in alphas
        for beta in betas
        for seed in seeds
    ]
    contents += [
        result("kd", name, seed=seed, top1=chance.gauss(58, 1), val=chance.gauss(59, 1), **settings)
        for name in own
        for seed in seeds
    ]
    return contents + [result("none", seed=seed, top1=50.0 + seed, val=51.0 + seed) for seed in seeds if plain]


def with_setting(content, section, name, value):
    """The content with another setting, as another group of runs."""
    changed = {**content[section], name: value}
    prints = {key: digest(content[key], section, name, value) for key in ("fingerprint", "group")}
    return {**content, section: changed, **prints}


def places(grid):
    return [(point.alpha, point.beta, point.row.key.divergence) for point in grid.points]


def test_a_grid_holds_its_points_and_forward_and_reverse_kl_by_their_own_names():
    (grid,) = grids_of(make(grid_contents()))
    assert (grid.alphas, grid.betas) == (list(ALPHAS), list(BETAS))
    expected = [(alpha, beta, "abkd") for alpha in ALPHAS for beta in BETAS]
    assert sorted(places(grid)) == sorted([*expected, (1.0, 0.0, "fkld"), (0.0, 1.0, "rkld")])
    labels = {place: point.label for place, point in zip(places(grid), grid.points, strict=True)}
    assert labels[0.4, 0.3, "abkd"] == "(0.4, 0.3)"
    assert labels[1.0, 0.0, "abkd"] == "(1, 0) FKLD"
    assert (labels[1.0, 0.0, "fkld"], labels[0.0, 1.0, "rkld"]) == ("FKLD", "RKLD")
    assert grid.method == "kd"
    assert grid.title == "digits: cifar_resnet20 -> cifar_resnet8_width4: kd"


def test_the_values_of_a_point_are_the_means_over_its_seeds_and_what_val_chose_is_chosen():
    contents = grid_contents()
    (grid,) = grids_of(make(contents))
    means = {}
    for alpha in ALPHAS:
        for beta in BETAS:
            same = [
                c for c in contents if (c["divergence"] or {}).get("alpha") == alpha and c["divergence"]["beta"] == beta
            ]
            means[alpha, beta] = [sum(c["metrics"][name] for c in same) / 3 for name in ("val/top1", "test/top1")]
    for point in grid.points:
        if point.row.key.divergence == "abkd":
            assert [point.val.mean, point.value.mean] == pytest.approx(means[point.alpha, point.beta])
            assert point.val.n == point.value.n == 3
    by_val = max(means, key=lambda place: means[place][0])
    assert by_val != max(means, key=lambda place: means[place][1])
    assert [(point.alpha, point.beta) for point in grid.points if point.chosen] == [by_val]
    assert (grid.chosen.alpha, grid.chosen.beta) == by_val


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("divergence", "temperature", 2.0),
        ("method", "kd", {"weight": 0.5}),
        ("recipe", "epochs", 99),
        ("teacher", "sha256", digest("another")),
        ("dataset", "val_fraction", 0.1),
    ],
)
def test_forward_kl_with_any_other_setting_is_no_point_of_a_grid(section, name, value):
    contents = grid_contents(own=())
    other = [with_setting(result("kd", "fkld", seed=seed), section, name, value) for seed in (1, 2)]
    (grid,) = grids_of(make(contents + other))
    assert "fkld" not in {divergence for _, _, divergence in places(grid)}
    (grid,) = grids_of(make(contents + [result("kd", "fkld", seed=seed) for seed in (1, 2)]))
    assert (1.0, 0.0, "fkld") in places(grid)


def test_the_scale_of_the_divergence_makes_two_grids_and_forward_kl_stands_in_both():
    contents = grid_contents(plain=False)
    matched = [
        with_setting(content, "divergence", "match_kl_scale", True)
        for content in contents
        if content["divergence"]["name"] == "abkd"
    ]
    grids = grids_of(make(contents + matched))
    assert [grid.title.partition(": kd")[2] for grid in grids] == [", match_kl_scale=false", ", match_kl_scale=true"]
    assert all((1.0, 0.0, "fkld") in places(grid) and (0.0, 1.0, "rkld") in places(grid) for grid in grids)


def test_each_temperature_is_a_grid_of_its_own_and_one_of_them_has_the_choice():
    contents = grid_contents(plain=False)
    cold = [with_setting(content, "divergence", "temperature", 1.0) for content in contents]
    for content in cold:
        content["metrics"] = {name: value + 30 for name, value in content["metrics"].items()}
    grids = grids_of(make(contents + cold))
    assert [grid.title.rpartition(", ")[2] for grid in grids] == ["temperature=1", "temperature=4"]
    assert [grid.chosen is not None for grid in grids] == [True, False]
    assert [len(grid.points) for grid in grids] == [11, 11]


def test_a_run_without_a_result_is_a_hole_of_the_grid_that_its_config_fits():
    contents = grid_contents()

    def failed(content):
        return (content["divergence"] or {}).get("alpha") == 0.7 and content["divergence"]["beta"] == 0.6

    (grid,) = grids_of(make(contents, failed=failed))
    assert grid.alphas == list(ALPHAS)
    point = grid.at(0.7, 0.6)
    assert point.val is None
    assert point.value is None
    assert [(hole.seeds, hole.reason) for hole in point.holes] == [((s,), "failed: loss not finite") for s in (1, 2, 3)]
    cold = [with_setting(content, "divergence", "temperature", 1.0) for content in contents if content["divergence"]]
    grids = grids_of(make(cold + contents, failed=failed))
    assert [grid.at(0.7, 0.6) is not None for grid in grids] == [True, True]
    assert all(len(grid.points) == 11 for grid in grids)


def test_a_grid_of_which_no_run_is_done_is_still_there():
    (grid,) = grids_of(make(grid_contents(plain=False), failed=lambda content: True))
    assert (len(grid.points), grid.chosen) == (11, None)


def test_less_than_two_points_of_the_divergence_are_no_grid():
    assert grids_of(make(grid_contents(alphas=(0.4,), betas=(0.3,)))) == []
    assert len(grids_of(make(grid_contents(alphas=(0.4, 0.7), betas=(0.3,))))) == 1
    assert grids_of(make([])) == []


def test_a_grid_is_of_one_column_and_one_method():
    contents = [
        content
        for dataset in ("a", "b")
        for method in ("kd", "dkd")
        for content in (
            result(method, "abkd", point=(alpha, 0.3), dataset=dataset, teacher="cifar_resnet20")
            for alpha in (0.5, 1.0)
        )
    ]
    grids = grids_of(make(contents))
    assert [(grid.column.dataset, grid.index, grid.method) for grid in grids] == [
        ("a", 0, "kd"),
        ("a", 0, "dkd"),
        ("b", 1, "kd"),
        ("b", 1, "dkd"),
    ]


def test_runs_that_differ_in_their_group_alone_are_points_of_two_grids():
    contents = grid_contents(own=(), plain=False, seeds=(1,))
    again = [{**content, "group": digest(content["group"]), "fingerprint": digest(content)} for content in contents]
    grids = grids_of(make(contents + again))
    assert [len(grid.points) for grid in grids] == [9, 9]
    assert [grid.title.rpartition(", ")[2] for grid in grids] == ["set 1 of runs", "set 2 of runs"]


def test_what_sums_of_decimals_round_to_makes_no_place_of_its_own():
    betas = [1 - alpha for alpha in (0.1 + 0.2, 0.7)]
    contents = [result("kd", "abkd", point=(a, b)) for a, b in zip((0.1 + 0.2, 0.7), betas, strict=True)]
    contents += [
        result("kd", "abkd", point=(0.2 + 0.2 + 0.1, 1 - 0.2 - 0.2 - 0.1)),
        result("kd", "abkd", point=(1, -0.0)),
    ]
    (grid,) = grids_of(make(contents))
    assert [(point.alpha, point.beta, point.name) for point in grid.points] == [
        (0.3, 0.7, ""),
        (0.5, 0.5, "Hellinger"),
        (0.7, 0.3, ""),
        (1.0, 0.0, "FKLD"),
    ]
    assert math.copysign(1, grid.points[-1].beta) == 1


def slow_neighbours(points, alphas, betas, alpha, beta):
    """Those whose alpha and beta lie at most one step of the axes away."""
    if alpha not in alphas or beta not in betas:
        return []
    found = []
    for other in points:
        steps = [sum(low < value <= high for value in axis) for axis, low, high in (
            (alphas, min(alpha, other[0]), max(alpha, other[0])), (betas, min(beta, other[1]), max(beta, other[1]))
        )]  # fmt: skip
        if other != (alpha, beta) and max(steps) <= 1 and other[0] in alphas and other[1] in betas:
            found.append(other)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_regular_part_and_neighbours_are_those_of_a_slow_search(seed):
    chance = random.Random(seed)
    alphas = sorted(chance.sample(range(-5, 15), chance.randint(1, 6)))
    betas = sorted(chance.sample(range(-5, 15), chance.randint(2, 6)))
    points = [(a / 10, b / 10) for a in alphas for b in betas if chance.random() < 0.85]
    points += [(1.7 + chance.random(), 1.7 + chance.random()) for _ in range(chance.randint(0, 3))]
    if len(points) < 2:
        points += [(0.0, 3.0), (0.0, 4.0)]
    points = [(round(a, 9), round(b, 9)) for a, b in points]
    (grid,) = grids_of(make([result("kd", "abkd", point=point) for point in points]))
    on = [(a, b) for a, b in points if a in grid.alphas and b in grid.betas]
    for alpha in grid.alphas:
        assert 2 * sum(a == alpha for a, _ in on) >= len(grid.betas)
    for beta in grid.betas:
        assert 2 * sum(b == beta for _, b in on) >= len(grid.alphas)
    assert not grid.alphas or 2 * len(on) > len(grid.alphas) * len(grid.betas)
    for point in grid.points:
        expected = slow_neighbours(points, grid.alphas, grid.betas, point.alpha, point.beta)
        found = [(other.alpha, other.beta) for other in grid.neighbours(point)]
        assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("points", "axes"),
    [
        ([(0.1 * n, 1 - 0.1 * n) for n in range(1, 9)], ([], [])),
        ([(0.8, 0.3), (0.5, 0.5)], ([], [])),
        ([(1.0, 0.0), (1.0, 0.2), (1.0, 0.4)], ([1.0], [0.0, 0.2, 0.4])),
        ([(a, b) for a in ALPHAS for b in BETAS] + [(0.8, 0.25)], (list(ALPHAS), list(BETAS))),
        ([(a, b) for a in ALPHAS for b in BETAS if (a, b) != (0.7, 0.3)], (list(ALPHAS), list(BETAS))),
    ],
)
def test_scattered_points_do_not_make_cells(points, axes):
    (grid,) = grids_of(make([result("kd", "abkd", point=point) for point in points]))
    assert (grid.alphas, grid.betas) == axes
    assert len(grid.points) == len(points)


def divergence(p, q, alpha, beta):
    """The definition, where alpha, beta and their sum are not 0."""
    total = alpha + beta
    return -sum(
        a**alpha * b**beta - alpha / total * a**total - beta / total * b**total for a, b in zip(p, q, strict=True)
    ) / (alpha * beta)


def test_the_named_divergences_are_what_the_definition_tends_to_there():
    p, q = [0.7, 0.2, 0.1], [0.5, 0.1, 0.4]
    both = list(zip(p, q, strict=True))
    own = {
        "FKLD": sum(a * math.log(a / b) for a, b in both),
        "RKLD": sum(b * math.log(b / a) for a, b in both),
        "Hellinger": 2 * sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in both),
        "squared Euclidean": sum((a - b) ** 2 for a, b in both) / 2,
        "log-Euclidean": sum((math.log(a) - math.log(b)) ** 2 for a, b in both) / 2,
    }
    for (alpha, beta), name in NAMED.items():
        assert divergence(p, q, alpha + 1e-5, beta + 2e-5) == pytest.approx(own[name], rel=1e-3), name
    assert set(own) == set(NAMED.values())
