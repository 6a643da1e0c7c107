import json
import sys

import pytest

from records.studies import result, write_run
from records.test_alpha_beta import grid_contents, make
from records.test_curve_plots import history
from records.test_map_plots import overlapping, spoken
from records.test_reliability_plots import bins_of, images_of
from vkd.records.figures import figures_of
from vkd.records.grouping import build_table
from vkd.records.plot_styles import choose_rows, cut, text_colour, wrap
from vkd.records.plots import draw, to_png, to_svg
from vkd.records.reading import read_runs

NAMES = ["accuracy", "alpha_beta", "alpha_beta_line", "curves", "reliability", "cost"]


def write_study(root, contents, lines=True):
    for place, content in enumerate(contents):
        content["reliability"] = {"test": bins_of(images_of(place, 50)), "val": None}
        folder = write_run(root, content)
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in history(place, teacher=bool(content["teacher"])))
            (folder / "metrics.jsonl").write_text(text)
    return table_of(root)


def table_of(root):
    runs = read_runs(root / "quickstart", relative_to=root)
    return build_table(runs, study="quickstart", metric="test/top1", command="c")


def test_a_study_of_a_grid_has_every_figure_and_they_need_no_global_state(tmp_path):
    table = write_study(tmp_path, grid_contents(seeds=(1, 2)))
    figures = figures_of(table, tmp_path)
    assert list(figures) == NAMES
    assert "matplotlib.pyplot" not in sys.modules
    assert "8 of 12 rows" in spoken(figures["curves"])
    for figure in figures.values():
        assert to_svg(figure).count(b"<svg") == 1
    assert to_png(figures["curves"]).startswith(b"\x89PNG")


def test_figures_that_have_nothing_to_show_are_left_out(tmp_path):
    contents = [result("none", seed=seed) for seed in (1, 2)]
    for content in contents:
        del content["student"]["parameters"]
        write_run(tmp_path, content)
    assert list(figures_of(table_of(tmp_path), tmp_path)) == ["accuracy"]
    assert list(figures_of(make([]), tmp_path)) == ["accuracy"]


def test_numbers_that_a_file_may_hold_but_no_training_has_do_not_stop_the_figures():
    points = [(1e308, 0), (-1e308, 1e308), (1e6, -1e6), (0.5, 0.5), (0.7, 0.3), (0.5 + 2e-9, 0.5), (1e-300, 1)]
    contents = [result("kd", "abkd", point=point) for point in points]
    for content in contents:
        content["metrics"]["test/ece"] = 1e40 if content["divergence"]["alpha"] == 0.5 else -3e-39
    for metric in ("test/top1", "test/ece"):
        figures = figures_of(make(contents, metric=metric), "nowhere")
        assert {"accuracy", "alpha_beta", "alpha_beta_line", "cost"} <= set(figures)
        for figure in figures.values():
            to_svg(figure)


def test_a_damaged_history_is_left_out_and_named(tmp_path):
    table = write_study(tmp_path, [result("kd", "fkld", seed=seed) for seed in (1, 2)])
    path = next(iter(tmp_path.glob("*/*/*-s2-*/metrics.jsonl")))
    path.write_text('{"epoch": 1')
    figure = figures_of(table, tmp_path)["curves"]
    assert "cannot be read" in spoken(figure)
    assert path.parent.name in spoken(figure).replace(" ", "")
    assert "n = 1 seed" in spoken(figure)


def test_panels_of_the_plot_of_all_rows_say_which_settings_tell_their_columns_apart():
    contents = [
        result(method, divergence, seed=seed, recipe={"epochs": epochs, "lr": 0.1})
        for method, divergence in (("none", None), ("kd", "fkld"))
        for epochs in (20, 240)
        for seed in (1, 2)
    ]
    figure = draw(make(contents, column_keys=["recipe.epochs", "recipe.lr", "recipe.batch_size"]))
    assert [axis.get_title() for axis in figure.axes] == [
        "digits\ncifar_resnet20 -> cifar_resnet8_width4\n"
        f"recipe.epochs={epochs}, recipe.lr=0.1, recipe.batch_size=64".replace("0.1, recipe.b", "0.1,\nrecipe.b")
        for epochs in (20, 240)
    ]
    assert overlapping(figure) == []
    assert [axis.get_title() for axis in draw(make(contents)).axes] == [
        "digits\ncifar_resnet20 -> cifar_resnet8_width4"
    ]


def test_few_rows_are_chosen_by_val_and_never_by_test():
    contents = []
    for place in range(20):
        point = (round(0.05 * place, 2), 0.3)
        contents.append(result("kd", "abkd", point=point, val=50.0 + place, top1=90.0 - place))
    contents += [result("none"), result("kd", "fkld"), result("kd", "rkld")]
    table = make(contents)
    labels = [row.label for row in choose_rows(table, 0)]
    assert labels[:3] == ["plain student", "kd fkld", "kd rkld"]
    assert labels[3:] == [f"kd abkd ({0.05 * place:g}, 0.3)" for place in range(15, 20)]
    for content in contents:
        content["metrics"]["test/top1"] = 1.0
    assert [row.label for row in choose_rows(make(contents), 0)] == labels


def test_baselines_leave_room_for_the_others():
    contents = [result("none", recipe={"lr": 0.1 + place}) for place in range(20)]
    contents += [result("kd", "abkd", point=(place / 10, 0.1), val=1.0 + place) for place in range(5)]
    rows = choose_rows(make(contents), 0)
    assert len(rows) == 8
    assert sum(row.key.divergence == "abkd" for row in rows) == 1 or "kd abkd (0.4, 0.1)" in [row.label for row in rows]


@pytest.mark.parametrize("text", ["a\\$b" * 30, "\\$" * 60, "x" * 300, "one two " * 40])
def test_pieces_of_a_text_are_no_formulas(text):
    for piece in [cut(text, most) for most in range(4, 40)] + [wrap(text, width) for width in range(10, 40)]:
        unescaped = piece.replace("\\$", "")
        assert "$" not in unescaped
    assert max(map(len, wrap(text, 30, 2).split("\n"))) <= 60
    assert cut(text, 1000) == text


def test_text_is_in_the_colour_of_the_higher_contrast():
    assert text_colour((0, 0, 0, 1)) == text_colour((0.2, 0.2, 0.5)) == "#ffffff"
    assert text_colour((1, 1, 1, 1)) == text_colour((0.9, 0.9, 0.2)) == "#000000"
