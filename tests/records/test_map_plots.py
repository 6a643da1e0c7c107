import io
import statistics
import time

import pytest
from PIL import Image

from records.studies import result
from records.test_alpha_beta import ALPHAS, BETAS, grid_contents, make, with_setting
from vkd.records.map_plots import MOST_GRIDS, draw_line, draw_map
from vkd.records.plots import to_png, to_svg


def boxes_of(figure):
    """Every text that is drawn, with its rectangle in dots."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = list(figure.texts)
    for axis in figure.axes:
        texts += [*axis.texts, axis.title]
        if axis.axison:
            texts += [axis.xaxis.label, axis.yaxis.label]
            for side, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
                inside = [tick for tick in side.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
                texts += [label for tick in inside for label in (tick.label1, tick.label2)]
        if axis.get_legend():
            texts += axis.get_legend().get_texts()
    shown = [text for text in texts if text.get_text().strip() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown]


def overlapping(figure):
    """Pairs of texts of a figure that cover each other, and the texts that are cut off at its edge."""
    boxes = boxes_of(figure)
    width, height = figure.bbox.width, figure.bbox.height
    pairs = [(a[0], b[0]) for place, a in enumerate(boxes) for b in boxes[:place] if a[1].overlaps(b[1])]
    return pairs + [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


def spoken(figure):
    """Everything that is written below and above the panels, in one line."""
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def panels(figure):
    """The axes with cells, in pairs of val and test."""
    return [axis for axis in figure.axes if axis.get_xlabel() == "alpha"]


def cells(axis):
    """The colours' values of a panel by (alpha, beta) of an evenly spaced grid; None where a cell has none."""
    mesh = axis.collections[0]
    corners, values = mesh.get_coordinates(), mesh.get_array()
    found = {}
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            middle = (corners[row, column] + corners[row + 1, column + 1]) / 2
            value = None if values.mask[row, column] else float(values[row, column])
            found[tuple(round(float(x), 6) + 0.0 for x in middle)] = value
    return found


def luminance(colour):
    """The relative luminance of WCAG 2.2, written down once more."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def failing(content):
    """One point without a finished run, and one with two of three."""
    point = content["divergence"] and (content["divergence"].get("alpha"), content["divergence"].get("beta"))
    return point == (0.4, 0.6) or (point == (1.0, 0.3) and content["seed"] == 2)


def means_of(contents, name):
    """Mean and sample standard deviation by point of the runs that are done."""
    values = {}
    for content in contents:
        if content["divergence"] and content["divergence"]["name"] == "abkd" and not failing(content):
            point = (content["divergence"]["alpha"], content["divergence"]["beta"])
            values.setdefault(point, []).append(content["metrics"][name])
    return {point: (statistics.mean(some), statistics.stdev(some), len(some)) for point, some in values.items()}


def test_cells_lie_at_their_points_and_have_the_mean_as_their_colour():
    contents = grid_contents()
    val, test = panels(draw_map(make(contents, failed=failing)))
    for axis, name in ((val, "val/top1"), (test, "test/top1")):
        expected = {point: mean for point, (mean, _, _) in means_of(contents, name).items()}
        drawn = cells(axis)
        assert set(drawn) == {(alpha, beta) for alpha in ALPHAS for beta in BETAS}
        assert drawn.pop((0.4, 0.6)) is None
        assert drawn == pytest.approx(expected)
    assert (val.get_title(), test.get_title()) == ("val top-1 (%): chosen on", "test top-1 (%): reported")


def test_numbers_say_mean_spread_and_n_and_a_hole_says_why():
    contents = grid_contents()
    val, test = panels(draw_map(make(contents, failed=failing)))
    for axis, name in ((val, "val/top1"), (test, "test/top1")):
        written = {text.get_text() for text in axis.texts}
        for point, (mean, std, n) in means_of(contents, name).items():
            count = "n=2 of 3" if n == 2 else "n=3"
            name_of = "FKLD\n" if point == (1.0, 0.0) else ""
            assert f"{name_of}{mean:.2f} ± {std:.2f}\n{count}" in written
        assert "3 failed" in written
        (hatched,) = [collection for collection in axis.collections if collection.get_hatch()]
        (outline,) = hatched.get_paths()
        assert outline.vertices.min(axis=0).tolist() == pytest.approx([0.25, 0.45])
        assert outline.vertices.max(axis=0).tolist() == pytest.approx([0.55, 0.75])


def test_small_cells_have_the_rounded_mean_alone_and_the_caption_says_what_is_missing():
    alphas, betas = tuple(n / 10 for n in range(1, 11)), tuple(n / 10 for n in range(10))
    contents = grid_contents(alphas=alphas, betas=betas, seeds=(1, 2), own=())
    figure = draw_map(make(contents, failed=failing))
    _, axis = panels(figure)
    found = {point: f"{mean:.1f}" for point, (mean, _, _) in means_of_all(contents).items() if point != (0.4, 0.6)}
    written = {}
    for text in axis.texts:
        x, y = text.get_position()
        written[round(x, 1), round(y, 1)] = text.get_text().split("\n")[-1]
    missing = {point: mean for point, mean in found.items() if written.get(point) != mean}
    assert set(missing) <= {(1.0, 0.3)}
    assert "no finished run: (0.4, 0.6) 2 failed" in spoken(figure)
    assert "n = 1 to 2 seeds a point" in spoken(figure)


def means_of_all(contents):
    """Mean test top-1 by point, as if no run had failed."""
    values = {}
    for content in contents:
        if content["divergence"]:
            point = (content["divergence"]["alpha"], content["divergence"]["beta"])
            values.setdefault(point, []).append(content["metrics"]["test/top1"])
    return {point: (statistics.mean(some), 0.0, len(some)) for point, some in values.items()}


def test_a_place_without_any_run_is_hatched_and_missing():
    contents = [
        content
        for content in grid_contents()
        if not (
            content["divergence"] and content["divergence"].get("alpha") == 0.7 and content["divergence"]["beta"] == 0.3
        )
    ]
    for axis in panels(draw_map(make(contents))):
        assert cells(axis)[0.7, 0.3] is None
        assert "missing" in {text.get_text() for text in axis.texts}


@pytest.mark.parametrize("metric", ["test/top1", "test/ece", "val/top1"])
def test_the_frame_is_around_what_val_chose_whatever_is_shown(metric):
    contents = grid_contents()
    for place, content in enumerate(contents):
        content["metrics"]["test/ece"] = 0.01 + 0.002 * (place % 7)
    figure = draw_map(make(contents, metric=metric))
    by_val = means_of(contents, "val/top1")
    expected = max(
        (point for point in by_val if not failing({"divergence": {"alpha": point[0], "beta": point[1]}, "seed": 0})),
        key=lambda point: by_val[point][0],
    )
    axes = panels(figure)
    assert len(axes) == (1 if metric == "val/top1" else 2)
    for axis in axes:
        frames = [patch for patch in axis.patches if not patch.get_fill()]
        middles = {(round(f.get_x() + f.get_width() / 2, 6), round(f.get_y() + f.get_height() / 2, 6)) for f in frames}
        assert middles == {expected}
    assert f"chosen by mean val/top1: ({expected[0]:g}, {expected[1]:g})" in spoken(figure)


def test_the_caption_has_mean_and_range_of_the_neighbours():
    contents = grid_contents()
    for content in contents:
        if content["divergence"] and content["divergence"].get("alpha") == 0.4 and content["divergence"]["beta"] == 0.0:
            content["metrics"]["val/top1"] = 80.0 + content["seed"]
    said = spoken(draw_map(make(contents, failed=failing)))
    for name in ("val/top1", "test/top1"):
        found = means_of(contents, name)
        around = [found[point][0] for point in ((0.4, 0.3), (0.7, 0.0), (0.7, 0.3))]
        own = found[0.4, 0.0][0]
        assert (
            f"{statistics.mean(around):.2f} on average, {min(around):.2f} to {max(around):.2f} "
            f"({min(around) - own:+.2f} to {max(around) - own:+.2f} points from it)"
        ) in said
    assert "its 3 neighbours" in said


def test_forward_and_reverse_kl_by_their_own_names_are_discs_beside_the_cells():
    contents = grid_contents(alphas=(0.4, 0.6, 0.8), betas=(0.2, 0.4, 0.6))
    for axis, name in zip(panels(draw_map(make(contents))), ("val/top1", "test/top1"), strict=True):
        (discs,) = [collection for collection in axis.collections if len(collection.get_offsets()) == 2]
        values = dict(zip(map(tuple, discs.get_offsets().tolist()), discs.get_array().tolist(), strict=True))
        for divergence, place in (("fkld", (1.0, 0.0)), ("rkld", (0.0, 1.0))):
            own = [c["metrics"][name] for c in contents if c["divergence"] and c["divergence"]["name"] == divergence]
            assert values[place] == pytest.approx(statistics.mean(own))
        low, high = axis.get_xlim()
        assert low < 0
        assert high > 1
        labels = [text.get_text().split("\n")[0] for text in axis.texts]
        assert {"FKLD", "RKLD", "Hellinger", "squared Euclidean", "log-Euclidean"} <= set(labels)


def test_a_disc_so_far_away_that_cells_would_be_tiny_is_in_the_caption_alone():
    contents = grid_contents(alphas=(0.98, 0.99, 1.0), betas=(0.0, 0.01, 0.02))
    figure = draw_map(make(contents))
    rkld = [c["metrics"]["test/top1"] for c in contents if c["divergence"] and c["divergence"]["name"] == "rkld"]
    assert panels(figure)[0].get_xlim()[0] > 0.9
    assert "kd rkld, at (0, 1), beyond the map" in spoken(figure)
    assert f"test top-1 {statistics.mean(rkld):.2f}" in spoken(figure)


def test_marks_of_named_divergences_lie_at_their_points():
    contents = grid_contents(alphas=(0.4, 0.7, 1.0), betas=(0.2, 0.6, 1.0), own=())
    for axis in panels(draw_map(make(contents))):
        marks = {(float(x), float(y)) for line in axis.lines if line.get_marker() == "D" for x, y in line.get_xydata()}
        assert {(0.5, 0.5), (1.0, 0.0)} < marks
        ((x, y),) = marks - {(0.5, 0.5), (1.0, 0.0)}  # where its cell has room beside the number
        assert abs(x - 1) < 0.15
        assert abs(y - 1) < 0.2
        assert [text.get_text().split("\n")[0] for text in axis.texts].count("squared Euclidean") == 1


def test_cells_of_uneven_values_are_equally_large_and_ticks_say_the_true_values():
    contents = grid_contents(alphas=(0.1, 0.2, 0.9), betas=(0.0, 0.5), own=())
    figure = draw_map(make(contents))
    axis, _ = panels(figure)
    sizes = {
        round(float(b - a), 9)
        for row in axis.collections[0].get_coordinates()
        for a, b in zip(row[:-1, 0], row[1:, 0], strict=True)
    }
    assert sizes == {1.0}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "0.2", "0.9"]
    assert list(axis.get_xticks()) == [0, 1, 2]
    assert "not to scale" in spoken(figure)
    line = next(line for line in axis.lines if len(line.get_xdata()) > 2)
    places = dict(zip([0.1, 0.2, 0.9], [0, 1, 2], strict=True))
    by_x = {round(float(x), 6): float(y) for x, y in line.get_xydata()}
    for alpha, place in places.items():
        assert by_x[place] == pytest.approx(1 - alpha)


@pytest.mark.parametrize(
    ("alphas", "betas"),
    [
        (ALPHAS, BETAS),
        (tuple(n / 10 for n in range(1, 11)), tuple(n / 10 for n in range(10))),
        (tuple(n / 20 for n in range(1, 21)), tuple(n / 20 for n in range(20))),
        ((0.1, 0.2, 0.5, 0.9, 1.0), (0.0, 0.05, 0.3, 0.5)),
    ],
)
def test_no_text_covers_another_none_is_cut_and_all_stand_out_from_their_cells(alphas, betas):
    contents = grid_contents(alphas=alphas, betas=betas, seeds=(1, 2) if len(alphas) > 9 else (1, 2, 3))
    figure = draw_map(make(contents, failed=failing))
    assert overlapping(figure) == []
    for axis in panels(figure):
        renderer = figure.canvas.get_renderer()
        mesh = axis.collections[0]
        colours = dict(zip(cells_by_place(mesh), mesh.get_facecolors().tolist(), strict=True))
        checked = 0
        for text in axis.texts:
            box = text.get_window_extent(renderer).transformed(axis.transData.inverted())
            if text.get_bbox_patch() is None or text.get_zorder() == 3:
                middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
                (place,) = [key for key in colours if key[0] < middle[0] < key[2] and key[1] < middle[1] < key[3]]
                assert box.x0 > place[0]
                assert box.x1 < place[2]
                from matplotlib.colors import to_rgb

                colour = to_rgb(text.get_color())
                background = (1, 1, 1) if colours[place][3] == 0 else colours[place]
                light, dark = sorted((luminance(colour) + 0.05, luminance(background) + 0.05), reverse=True)
                assert light / dark >= 3
                checked += 1
        assert checked >= (0 if len(alphas) == 20 else len(alphas) * len(betas) - 1)


def cells_by_place(mesh):
    """Left, bottom, right and top of each cell, in the order of its colours."""
    corners = mesh.get_coordinates()
    return [
        (*corners[row, column].tolist(), *corners[row + 1, column + 1].tolist())
        for row in range(corners.shape[0] - 1)
        for column in range(corners.shape[1] - 1)
    ]


def test_colours_grow_lighter_with_accuracy_so_that_a_grey_printer_shows_them():
    figure = draw_map(make(grid_contents()))
    figure.draw(figure.canvas.get_renderer())
    mesh = panels(figure)[1].collections[0]
    ranked = sorted(zip(mesh.get_array().ravel().tolist(), map(luminance, mesh.get_facecolors()), strict=True))
    lights = [light for _, light in ranked]
    assert lights == sorted(lights)
    assert lights[-1] - lights[0] > 0.5


def test_one_failed_training_does_not_take_the_colours_from_the_others():
    contents = grid_contents(own=())
    for content in contents:
        if content["divergence"] and (content["divergence"]["alpha"], content["divergence"]["beta"]) == (1.0, 0.6):
            content["metrics"] |= {"val/top1": 1.0, "test/top1": 1.0}
    figure = draw_map(make(contents))
    low, high = panels(figure)[1].collections[0].norm.vmin, panels(figure)[1].collections[0].norm.vmax
    found = {point: mean for point, (mean, _, _) in means_of(contents, "test/top1").items() if point != (1.0, 0.6)}
    assert 50 < low <= min(found.values()) + 1
    assert high == pytest.approx(means_of(contents, "test/top1")[max(found, key=found.get)][0])


def test_without_a_validation_split_nothing_is_chosen():
    contents = [with_setting(content, "dataset", "val_fraction", 0) for content in grid_contents()]
    for content in contents:
        content["metrics"] = {**content["metrics"], "val/top1": None}
    figure = draw_map(make(contents))
    val, test = panels(figure)
    assert [text.get_text() for text in val.texts] == ["no validation split,\nnothing is chosen"]
    assert len(cells(test)) == 9
    assert not [patch for patch in test.patches if not patch.get_fill()]
    assert "chosen by" not in spoken(figure)


def test_there_are_at_most_six_grids_and_the_figure_says_so():
    contents = [
        with_setting(content, "divergence", "temperature", float(degree))
        for degree in range(1, 9)
        for content in grid_contents(seeds=(1,), plain=False)
    ]
    for content in contents:
        content["metrics"] = {**content["metrics"], "val/top1": 50 + content["divergence"]["temperature"]}
    table = make(contents)
    figure = draw_map(table)
    assert len(panels(figure)) == 2 * MOST_GRIDS
    assert "6 of 8 grids" in spoken(figure)
    assert "temperature=8" in spoken(figure)
    assert spoken(figure).count("chosen by mean val/top1:") == 1
    assert "6 of 8 grids" in spoken(draw_line(table))


def test_along_the_line_means_bars_and_n_are_those_of_the_runs():
    contents = grid_contents()
    figure = draw_line(make(contents, failed=failing))
    (axis,) = figure.axes
    drawn = {}
    for container in axis.containers:
        x, y = (float(values[0]) for values in container.lines[0].get_data())
        (segment,) = container.lines[2][0].get_segments()
        filled = container.lines[0].get_markerfacecolor() != "#ffffff"
        drawn[round(x, 1), filled, round(y, 6)] = (segment[1][1] - segment[0][1]) / 2
    expected = {}
    for name in ("val/top1", "test/top1"):
        found = means_of(contents, name)
        for point in ((0.7, 0.3), (1.0, 0.0)):
            expected[point[0], True, round(found[point][0], 6)] = found[point][1]
        for divergence, alpha in (("fkld", 1.0), ("rkld", 0.0)):
            own = [c["metrics"][name] for c in contents if c["divergence"] and c["divergence"]["name"] == divergence]
            expected[alpha, False, round(statistics.mean(own), 6)] = statistics.stdev(own)
    assert drawn == pytest.approx(expected)
    assert {text.get_text() for text in axis.texts} == {
        "RKLD\nn=3",
        "(0.4, 0.6)\n3 failed",
        "(0.7, 0.3)\nn=3",
        "FKLD\nn=3+3",
    }
    assert axis.get_xlabel() == "alpha  (beta = 1 - alpha)"
    assert overlapping(figure) == []


def test_a_metric_of_another_unit_has_axes_of_its_own_along_the_line():
    figure = draw_line(make(grid_contents(), metric="test/ece"))
    assert [axis.get_ylabel() for axis in figure.axes] == ["val top-1 (%)", "test ECE"]
    assert overlapping(figure) == []


def test_a_grid_with_one_point_on_the_line_has_no_section_and_no_grid_no_map():
    assert draw_line(make(grid_contents(alphas=(0.4, 0.5), betas=(0.6, 0.9), own=()))) is None
    nothing = make([result("kd", "fkld")])
    assert (draw_map(nothing), draw_line(nothing)) == (None, None)


def test_the_same_table_gives_the_same_bytes():
    first, second = (make(grid_contents(), failed=failing) for _ in range(2))
    assert to_svg(draw_map(first)) == to_svg(draw_map(second))
    assert to_svg(draw_line(first)) == to_svg(draw_line(second))
    image = Image.open(io.BytesIO(to_png(draw_map(first))))
    assert image.convert("L").crop((0, 0, image.width, 3)).getextrema() == (255, 255)


def test_names_of_a_study_are_text_and_no_formula():
    contents = grid_contents(dataset="a" * 90, teacher="b" * 90)
    table = make(contents)
    table.study = "$\\frac{1}{0}$ \x1b[31m" * 3
    assert overlapping(draw_map(table)) == []
    to_svg(draw_line(table))


def test_thousands_of_points_are_drawn_in_time():
    contents = grid_contents(
        alphas=tuple(n / 50 for n in range(1, 51)), betas=tuple(n / 50 for n in range(60)), seeds=(1,)
    )
    table = make(contents)
    start = time.process_time()
    to_svg(draw_map(table))
    assert time.process_time() - start < 10
