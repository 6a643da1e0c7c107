import statistics

import pytest

from records.studies import result
from records.test_alpha_beta import grid_contents, make
from records.test_map_plots import overlapping, spoken
from vkd.records.cost_plots import draw_cost
from vkd.records.plots import to_svg

STUDENTS = {"small": (5_000, 1_000_000), "middle": (80_000, 12_000_000), "large": (700_000, 100_000_000)}


def contents_of(students=STUDENTS, device="cpu (2 threads)", rate=True, macs=True):
    contents = []
    for place, (student, (parameters, multiplications)) in enumerate(students.items()):
        for method, divergence in (("none", None), ("kd", "fkld"), ("kd", "rkld")):
            for seed in (1, 2, 3):
                content = result(
                    method,
                    divergence,
                    seed=seed,
                    student=student,
                    top1=50 + 10 * place + seed / 2 + len(divergence or ""),
                    environment={"device": device},
                )
                content["student"] |= {"parameters": parameters, "macs": multiplications if macs else None}
                if content["teacher"]:
                    content["teacher"] |= {"parameters": 300_000, "macs": 41_000_000}
                if rate:
                    content["timing"]["evaluation_images_per_second"] = 9_000 / (place + 1) + seed * 10
                contents.append(content)
    return contents


def drawn(axis):
    """Cost, value and half of the vertical bar of each point, by marker."""
    found = {}
    for container in axis.containers:
        (x,), (y,) = container.lines[0].get_data()
        bars = [bar.get_segments()[0] for bar in container.lines[2]]
        upright = [bar for bar in bars if bar[0][0] == bar[1][0]]
        half = (upright[0][1][1] - upright[0][0][1]) / 2 if upright else None
        found.setdefault(container.lines[0].get_marker(), []).append((float(x), float(y), half))
    return found


def test_points_are_means_over_seeds_at_the_cost_of_their_student():
    contents = contents_of()
    figure = draw_cost(make(contents))
    parameters, macs, rate, _ = figure.axes
    assert [axis.get_xlabel() for axis in (parameters, macs, rate)] == [
        "parameters",
        "multiply-accumulates of one image",
        "images/s of evaluation",
    ]
    assert all(axis.get_xscale() == "log" for axis in (parameters, macs, rate))
    for axis, cost in ((parameters, 0), (macs, 1)):
        points = drawn(axis)
        assert set(points) == {"o", "s", "^", "*"}
        for marker, label in (("o", ""), ("s", "fkld"), ("^", "rkld")):
            for (x, y, half), (student, costs) in zip(
                sorted(points[marker]), sorted(STUDENTS.items(), key=lambda item: item[1]), strict=True
            ):
                own = [
                    content["metrics"]["test/top1"]
                    for content in contents
                    if content["student"]["arch"] == student
                    and (content["divergence"] or {"name": ""})["name"] == label
                ]
                assert x == pytest.approx(costs[cost], rel=0.35)  # set aside a little
                assert y == pytest.approx(statistics.mean(own))
                assert half == pytest.approx(statistics.stdev(own))
        assert {(x, y) for x, y, _ in points["*"]} == {((300_000, 41_000_000)[cost], 98.9)}
        low, high = axis.get_xlim()
        assert all(low < x < high for some in points.values() for x, _, _ in some)
    speeds = [x for x, _, _ in drawn(rate)["s"]]
    assert sorted(speeds) == pytest.approx(sorted(9_000 / (place + 1) + 20 for place in range(3)))
    assert "*" not in drawn(rate)
    assert "images/s on cpu (2 threads)," in spoken(figure)
    assert parameters.get_ylabel() == "test top-1 (%)"


def test_rows_of_one_student_stand_beside_each_other_around_the_true_cost():
    figure = draw_cost(make(contents_of({"small": (5_000, None)}, rate=False)))
    (xs,) = zip(*[[x for x, _, _ in drawn(figure.axes[0])[marker]] for marker in ("o", "s", "^")], strict=True)
    assert list(xs) == sorted(xs)
    assert xs[1] == pytest.approx(5_000)
    assert xs[0] * xs[2] == pytest.approx(5_000**2)


def test_speeds_of_several_devices_are_not_compared():
    contents = contents_of({"small": (5_000, 10)}) + contents_of({"large": (9_000, 20)}, device="cuda (H100)")
    figure = draw_cost(make(contents))
    assert [axis.get_xlabel() for axis in figure.axes[:-1]] == ["parameters", "multiply-accumulates of one image"]
    assert "runs come from 2 devices: cpu (2 threads), cuda (H100)" in spoken(figure)


def test_what_is_not_known_has_no_panel_and_one_student_is_enough():
    figure = draw_cost(make(contents_of({"small": (5_000, None)}, rate=False, macs=False)))
    assert [axis.get_xlabel() for axis in figure.axes[:-1]] == ["parameters"]
    assert "*" in drawn(figure.axes[0])
    contents = [{**content, "student": {"arch": "s"}, "teacher": None} for content in contents_of(rate=False)]
    assert draw_cost(make(contents)) is None
    for value in (0, -1, "9", True, float("inf"), 1e300):
        contents = contents_of({"small": (value, None)}, rate=False)
        assert draw_cost(make(contents)) is None
    assert draw_cost(make([])) is None


def test_a_metric_that_is_no_accuracy_has_no_teacher_beside_it():
    figure = draw_cost(make(contents_of(), metric="test/ece"))
    assert "*" not in drawn(figure.axes[0])
    assert figure.axes[0].get_ylabel() == "test ECE"


def test_no_text_covers_another_whatever_there_is():
    for students in (
        {"small": (5_000, 10**6)},
        STUDENTS,
        {f"a_long_name_of_a_student_{n}": (10**n, n) for n in range(3, 9)},
    ):
        assert overlapping(draw_cost(make(contents_of(students)))) == []
    figure = draw_cost(make(grid_contents(seeds=(1, 2))))
    assert "8 of 12 rows" in spoken(figure)
    assert overlapping(figure) == []


def test_the_same_table_gives_the_same_bytes():
    assert to_svg(draw_cost(make(contents_of()))) == to_svg(draw_cost(make(contents_of())))
