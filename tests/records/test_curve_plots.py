import itertools
import random
import statistics

import pytest

from records.studies import result
from records.test_alpha_beta import grid_contents, make
from records.test_map_plots import overlapping, spoken
from vkd.records.curve_plots import MEASURED, draw_curves, runs_of_curves
from vkd.records.plot_styles import MOST_SHOWN, choose_rows
from vkd.records.plots import to_svg


def history(place, *, teacher=True, epochs=8, every=2):
    """Lines of a run: losses in every epoch, and what is measured in some."""
    chance = random.Random(place)
    lines = []
    for epoch in range(1, epochs + 1):
        line = {
            "epoch": float(epoch),
            "train/loss": 9.0,
            "train/top1": 5.0,
            "train/cross_entropy": chance.uniform(2, 3),
        }
        line |= {"train/kd": chance.uniform(1, 4)} if teacher else {}
        if epoch % every == 0:
            line |= {name: chance.uniform(1, 90) for name in MEASURED if teacher or name != "test/agreement"}
        lines.append(line)
    return lines


def study(contents=None, **settings):
    contents = grid_contents() if contents is None else contents
    histories = {
        f"{place:05}": history(place, teacher=bool(content["teacher"]), **settings)
        for place, content in enumerate(contents)
    }
    return make(contents), histories


def panel(figure, title):
    (found,) = [axis for axis in figure.axes if axis.get_title() == title]
    return found


def colour_of(figure, label):
    """The colour and marker of a row in the legend."""
    legend = figure.axes[-1].get_legend()
    for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
        if text.get_text() == label:
            return handle.get_color(), handle.get_marker()
    raise AssertionError(label)


def lines_of(axis, style):
    return [line for line in axis.lines if (line.get_color(), line.get_marker()) == style]


def test_lines_are_means_of_the_seeds_and_bands_one_sample_standard_deviation():
    table, histories = study()
    figure = draw_curves(table, histories)
    paths = {f"{place:05}": content for place, content in enumerate(grid_contents())}
    seeds = [path for path, c in paths.items() if c["divergence"] and c["divergence"]["name"] == "rkld"]
    axis = panel(figure, "val top-1")
    (line,) = lines_of(axis, colour_of(figure, "kd rkld"))
    measured = {
        epoch: [next(line["val/top1"] for line in histories[path] if line["epoch"] == epoch) for path in seeds]
        for epoch in (2, 4, 6, 8)
    }
    assert line.get_xdata().tolist() == [2, 4, 6, 8]
    assert line.get_ydata().tolist() == pytest.approx([statistics.mean(values) for values in measured.values()])
    assert line.get_linestyle() == "-"
    edges = {
        (epoch, round(statistics.mean(values) + side * statistics.stdev(values), 6))
        for epoch, values in measured.items()
        for side in (-1, 1)
    }
    bands = [{(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices} for band in axis.collections]
    assert edges in bands
    assert axis.get_ylabel() == "%"
    assert panel(figure, "test entropy").get_ylabel() == "nats"


def test_each_term_of_the_loss_has_a_line_style_and_the_sum_and_accuracy_have_none():
    table, histories = study()
    figure = draw_curves(table, histories)
    axis = panel(figure, "terms of the training loss")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["cross entropy", "kd"]
    styles = [line.get_linestyle() for line in lines_of(axis, colour_of(figure, "kd fkld"))]
    assert styles == ["-", "--"]
    (plain,) = lines_of(axis, colour_of(figure, "plain student"))
    assert (plain.get_linestyle(), plain.get_color()) == ("-", "#000000")
    assert plain.get_xdata().tolist() == list(range(1, 9))


def test_losses_of_very_different_size_stand_on_a_logarithmic_axis():
    table, histories = study()
    assert panel(draw_curves(table, histories), "terms of the training loss").get_yscale() == "linear"
    for lines in histories.values():
        for line in lines:
            if "train/kd" in line:
                line["train/kd"] *= 100
    axis = panel(draw_curves(table, histories), "terms of the training loss")
    assert axis.get_yscale() == "log"
    assert "logarithmic" in axis.get_ylabel()


def test_at_most_eight_rows_are_shown_baselines_and_the_choice_among_them():
    table, histories = study()
    figure = draw_curves(table, histories)
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert len(labels) == MOST_SHOWN == 8
    assert {"plain student", "kd fkld", "kd rkld"} <= set(labels)
    abkd = [row for row in table.rows if row.key.divergence == "abkd"]
    best = sorted(abkd, key=lambda row: -row.cells[0].val.mean)[:5]
    assert {row.label for row in best} == set(labels) - {"plain student", "kd fkld", "kd rkld"}
    assert any(row.cells[0].chosen for row in best)
    assert "8 of 12 rows" in spoken(figure)
    assert "mean of n = 3 seeds" in spoken(figure)
    styles = {colour_of(figure, label) for label in labels}
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == 8
    read = {run.path for run in runs_of_curves(table)}
    assert read == {run.path for row in choose_rows(table, 0) for run in row.cells[0].group.runs.values()}
    assert len(read) == 24


def test_epochs_without_evaluation_leave_no_gap_and_runs_may_have_other_epochs():
    contents = [result("kd", "fkld", seed=seed) for seed in (1, 2)]
    table, histories = study(contents)
    histories["00001"] = histories["00001"][:5]
    figure = draw_curves(table, histories)
    (line,) = panel(figure, "test top-1").lines
    assert line.get_xdata().tolist() == [2, 4, 6, 8]
    assert [marker is not None for marker in [line.get_marker()]] == [True]
    assert "n = 1 to 2 seeds" in spoken(figure)
    assert overlapping(figure) == []


def test_panels_without_anything_to_show_are_left_out():
    contents = [result("none", seed=1)]
    table, histories = study(contents)
    figure = draw_curves(table, histories)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["terms of the training loss", "val top-1", "test top-1", "test entropy", ""]
    assert "n = 1 seed, so that there is no band" in spoken(figure)
    assert draw_curves(table, {}) is None
    assert draw_curves(make([]), {}) is None


def test_of_many_epochs_some_are_drawn_the_last_among_them_and_the_figure_says_so():
    contents = [result("kd", "fkld", seed=1)]
    table, histories = study(contents, epochs=240, every=1)
    figure = draw_curves(table, histories)
    (line,) = panel(figure, "val top-1").lines
    epochs = line.get_xdata().tolist()
    assert epochs[-1] == 240
    assert 60 <= len(epochs) <= 100
    assert {b - a for a, b in itertools.pairwise(epochs)} == {3}
    by_epoch = {row["epoch"]: row["val/top1"] for row in histories["00000"]}
    assert line.get_ydata().tolist() == pytest.approx([by_epoch[epoch] for epoch in epochs])
    assert "80 of 240 measured epochs are drawn" in spoken(figure)


def test_no_text_covers_another_and_what_could_not_be_read_is_said():
    contents = grid_contents() + [
        result("kd", "fkld", seed=seed, dataset="other" * 20, student="s" * 60) for seed in (1, 2)
    ]
    table, histories = study(contents)
    table.study = "$x_$ " * 9
    figure = draw_curves(table, histories, unread=["a/b: metrics.jsonl is no plain file", "c"])
    assert overlapping(figure) == []
    assert "not shown, since it cannot be read: a/b: metrics.jsonl is no plain file and 1 others" in spoken(figure)


def test_the_same_histories_give_the_same_bytes():
    contents = [result("kd", "fkld", seed=seed) for seed in (1, 2)]
    (first, one), (second, other) = study(contents), study(contents)
    assert to_svg(draw_curves(first, one)) == to_svg(draw_curves(second, other))
