import io

import pytest
from PIL import Image

from records.studies import result
from vkd.records.grouping import build_table
from vkd.records.plots import MOST_ROWS, draw, to_png, to_svg
from vkd.records.reading import Run


def make(contents, metric="test/top1"):
    runs = [Run(f"{index:05}", "done", "", content) for index, content in enumerate(contents)]
    return build_table(runs, study="s", metric=metric, command="c")


def study(dataset="digits", teacher="cifar_resnet20"):
    rows = [("none", None, None), ("kd", "fkld", None), ("kd", "abkd", (0.8, 0.3)), ("dkd", "rkld", None)]
    return [
        result(method, divergence, point=point, seed=seed, top1=90 + line + seed / 7, dataset=dataset, teacher=teacher)
        for line, (method, divergence, point) in enumerate(rows)
        for seed in (1, 2, 3)
    ]


def overlapping(figure):
    """Pairs of texts of the figure that cover each other."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label, *axis.texts)]
    texts += [label for axis in figure.axes for label in axis.get_xticklabels() + axis.get_yticklabels()]
    texts += [text for legend in figure.legends for text in legend.get_texts()] + figure.texts
    boxes = [
        (text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text() and text.get_visible()
    ]
    return [(a[0], b[0]) for index, a in enumerate(boxes) for b in boxes[:index] if a[1].overlaps(b[1])]


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_no_text_of_a_plot_covers_another_and_none_is_cut(columns):
    contents = [run for index in range(columns) for run in study(dataset=f"set{index}", teacher="a_teacher_of_" * 2)]
    figure = draw(make(contents))
    assert overlapping(figure) == []
    image = Image.open(io.BytesIO(to_png(figure)))
    assert image.width > 300
    border = [image.convert("L").crop(box).getextrema()[0] for box in ((0, 0, image.width, 2), (0, 0, 2, image.height))]
    assert border == [255, 255]


def test_every_seed_every_mean_and_the_teacher_are_drawn():
    contents = study()
    for content in contents:
        if content["teacher"]:
            content["teacher"]["accuracy"]["test"] = 95.0
    figure = draw(make(contents))
    (axis,) = figure.axes
    drawn = [
        list(line.get_xdata()) for line in axis.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 3
    ]
    tops = [content["metrics"]["test/top1"] for content in contents]
    assert drawn == [tops[start : start + 3] for start in (0, 3, 6, 9)]
    assert [95.0, 95.0] in [list(line.get_xdata()) for line in axis.lines]
    assert axis.get_xlabel() == "test top-1 (%)"
    assert [text.get_text() for text in axis.texts].count("n=3") == 4


def test_a_far_teacher_is_named_at_the_edge_rather_than_squeezing_the_students():
    figure = draw(make([content for content in study() if content["method"]]))
    (axis,) = figure.axes
    assert axis.get_xlim()[1] < 98
    assert "teacher (test) 98.90 →" in [text.get_text() for text in axis.texts]


def test_the_same_table_gives_the_same_bytes():
    assert to_png(draw(make(study()))) == to_png(draw(make(study())))
    first, second = to_svg(draw(make(study()))), to_svg(draw(make(study())))
    assert first == second
    assert b"<svg" in first


def test_a_table_without_values_and_one_with_equal_values_are_drawn():
    holes = [Run("a", "failed", "x", {**result(), "metrics": {}})]
    table = build_table(holes, study="s", metric="test/top1", command="c")
    assert [text.get_text() for text in draw(table).axes[0].texts] == ["hole"]
    draw(make([result(seed=seed) for seed in (1, 2)], metric="test/ece"))
    draw(build_table([Run("a", "damaged", "x")], study="s", metric="test/top1", command="c"))


def test_of_very_many_rows_the_best_by_val_are_drawn_and_the_figure_says_so():
    contents = [result("kd", "abkd", point=(index, 0), val=float(index)) for index in range(2 * MOST_ROWS)]
    figure = draw(make(contents))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == MOST_ROWS
    assert labels[0] == "kd abkd (0, 0)"
    assert labels[-1] == "kd abkd (119, 0)"
    assert figure.texts[0].get_text().startswith("60 of 120 rows")
