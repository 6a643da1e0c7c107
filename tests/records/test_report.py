import base64
import hashlib
import itertools
import json
import re
import statistics
import time
from html.parser import HTMLParser

import pytest

from records.studies import result, write_run
from vkd.records.grouping import build_table
from vkd.records.reading import Run, read_runs
from vkd.records.report import MOST_PAGE_BYTES, MOST_RUNS, to_html
from vkd.records.sweep_index import Job, Sweep, SweepIndex
from vkd.records.tables import to_markdown

VOID = {"meta", "link", "img", "br", "input", "hr", "base"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
ALPHAS, BETAS = (0.4, 0.7, 1.0), (0.0, 0.3, 0.6)


class Element:
    """A node of the page: its tag, attributes and children, texts among them."""

    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag=None, name=None, **attributes):
        """The elements below with this tag, class and attributes, in their order."""
        found = []
        for child in self.children:
            if isinstance(child, str):
                continue
            fits = (tag is None or child.tag == tag) and (name is None or name in child.classes)
            if fits and all(child.attributes.get(key) == value for key, value in attributes.items()):
                found.append(child)
            found += child.all(tag, name, **attributes)
        return found

    def one(self, *selector, **attributes):
        (found,) = self.all(*selector, **attributes)
        return found


class Parser(HTMLParser):
    """Builds the tree and insists on every element being closed in its order."""

    def __init__(self):
        super().__init__()
        self.root = self.current = Element("", {}, None)

    def handle_starttag(self, tag, attrs):
        made = Element(tag, attrs, self.current)
        self.current.children.append(made)
        if tag not in VOID:
            self.current = made

    def handle_startendtag(self, tag, attrs):
        self.current.children.append(Element(tag, attrs, self.current))

    def handle_endtag(self, tag):
        assert tag == self.current.tag, f"</{tag}> ends <{self.current.tag}>"
        self.current = self.current.parent

    def handle_data(self, data):
        self.current.children.append(data)


def parse(html):
    parser = Parser()
    parser.feed(html)
    parser.close()
    assert parser.current is parser.root
    return parser.root


def table_of(runs, metric="test/top1", study="quickstart", **keywords):
    command = f"python -m vkd.collect study={study}"
    return build_table(runs, study=study, metric=metric, command=command, **keywords)


def report(root, metric="test/top1", study="quickstart", figures=None, **keywords):
    """The page of a study whose runs lie below `root`, and its table."""
    runs = root / "runs"
    table = table_of(read_runs(runs / study, relative_to=runs), metric, study, **keywords)
    html = to_html(table, runs_root=runs, folder=root / "results" / study, figures=figures or {})
    return html, table


def top1(point, seed):
    """Made-up accuracies: val, then test."""
    base = 66 - 8 * (point[0] - 0.7) ** 2 - 6 * (point[1] - 0.3) ** 2 + seed / 7
    return base + 1, base - (0.5 if seed == 2 else 0.25)


def write_history(folder, seed, top, epochs=6):
    lines = []
    for epoch in range(1, epochs + 1):
        line = {"epoch": epoch, "train/loss": 4.0 / epoch + seed / 10}
        if epoch % 2 == 0:
            line |= {"val/top1": top - 10 / epoch, "test/top1": top - 11 / epoch, "test/entropy": 1 / epoch}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A 3 x 3 grid of abkd with forward and reverse KL and plain training, three seeds, and holes."""
    root = tmp_path_factory.mktemp("grid")
    runs = root / "runs"
    for seed in (1, 2, 3):
        for method, divergence, point in [
            ("none", None, None),
            ("kd", "fkld", None),
            ("kd", "rkld", None),
            *(("kd", "abkd", (alpha, beta)) for alpha in ALPHAS for beta in BETAS),
        ]:
            place = point or {"fkld": (1.0, 0.0), "rkld": (0.0, 1.0), None: (3.0, 3.0)}[divergence]
            val, test = (max(0.0, value) for value in top1(place, seed))
            content = result(method, divergence, point=point, seed=seed, val=val, top1=test)
            command = f"python -m vkd.train method={method} divergence={divergence} seed={seed} runs_root=/home/a/runs"
            content["environment"] |= {"command": command, "git": "0123456789ab", "cpu": {"name": "A processor"}}
            is_hole = point == (1.0, 0.6) or (point, seed) == ((0.4, 0.6), 3)
            status = {"state": "failed", "reason": "loss is not finite"} if is_hole else None
            folder = write_run(runs, content, status)
            write_history(folder, seed, test)
    notebook = root / "experiments" / "quickstart"
    notebook.mkdir(parents=True)
    (notebook / "README.md").write_text(
        "# quickstart: does a [teacher](x.md) help?\n\n"
        "**Setting.** Digits with `method=kd`,\n<b>two</b> lines & more.\n\n"
        "**Commands.**\n\n    python -m vkd.train\n"
    )
    return root


@pytest.fixture(scope="module")
def page(study):
    html, table = report(study, figures={"curves": SVG, "accuracy": SVG + b" "})
    return parse(html), table, html


def spread(values):
    """Mean and standard deviation as the page shows them, by the standard library."""
    std = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{std}"


def by_row(study):
    """val/top1, test/top1 and paths of the finished runs, by method, divergence, alpha and beta: read once more."""
    found = {}
    for path in sorted((study / "runs").rglob("result.json")):
        content = json.loads(path.read_text())
        divergence = content["divergence"] or {}
        key = ("kd" if content["method"] else "plain student", divergence.get("name", "-"))
        key += (divergence.get("alpha"), divergence.get("beta"))
        entry = found.setdefault(key, {"val": [], "test": [], "paths": [], "seeds": []})
        entry["val"].append(content["metrics"]["val/top1"])
        entry["test"].append(content["metrics"]["test/top1"])
        entry["paths"].append(path.parent.relative_to(study / "runs").as_posix())
        entry["seeds"].append(content["seed"])
    return found


def rows_of(page):
    return page.one("table", "sortable").one("tbody", "rows").all("tr")


def test_the_table_has_the_figures_that_the_runs_give_by_another_way(study, page):
    expected = by_row(study)
    seen = set()
    for line in rows_of(page[0]):
        cells = line.all("td")
        alpha, beta = (float(cell.text) if cell.text != "-" else None for cell in cells[2:4])
        key = (cells[0].text, cells[1].text, alpha, beta)
        if key not in expected:
            assert key == ("kd", "abkd", 1.0, 0.6)
            assert cells[4].text == "hole (0 of 3)"
            assert "data-value" not in cells[4].attributes
            continue
        seen.add(key)
        values = expected[key]["test"]
        assert cells[4].text.startswith(spread(values))
        assert float(cells[4].attributes["data-value"]) == pytest.approx(statistics.mean(values), abs=1e-12)
        plain = expected["plain student", "-", None, None]["test"]
        if key[0] == "kd":
            gained = statistics.mean(a - b for a, b in zip(values, plain, strict=False))
            assert float(cells[5].attributes["data-value"]) == pytest.approx(gained, abs=1e-9)
            assert cells[5].text.startswith(f"{gained:+.2f}")
    assert seen == set(expected)


def test_the_table_has_the_rows_and_columns_of_the_markdown_table(page):
    lines = [line for line in to_markdown(page[1]).splitlines() if line.startswith("| ")]
    markdown = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    header, body = markdown[0], markdown[2:]
    table = page[0].one("table", "sortable")
    names = [cell.text for cell in table.all("th") if "data-index" in cell.attributes]
    assert names[:4] == header[:4]
    assert names[4:] == ["test top-1 (%)", *header[5:]]
    assert table.one("th", "column").text == header[4].replace("->", "→")
    assert [[cell.text for cell in line.all("td")] for line in table.all("tr") if line.all("td")] == body
    assert [int(cell.attributes["data-index"]) for cell in table.all("th") if "data-index" in cell.attributes] == list(
        range(len(header))
    )


def test_the_best_row_and_the_choice_by_val_are_marked_and_explained(study, page):
    expected = by_row(study)
    best = max(expected, key=lambda key: statistics.mean(expected[key]["val"]))
    (marked,) = [line for line in rows_of(page[0]) if line.all("td", "chosen") or line.all("td", "best")]
    assert [cell.text for cell in marked.all("td")[1:4]] == ["abkd", f"{best[2]:g}", f"{best[3]:g}"]
    assert "chosen from its grid by val" in page[0].text


def test_the_map_shows_every_point_of_the_grid_with_its_figures_seeds_and_runs(study, page):
    expected = by_row(study)
    figures = page[0].one("div", "panels").all("figure")
    assert [figure.one("figcaption").text for figure in figures] == ["val top-1 (%)", "test top-1 (%)"]
    for figure, split in zip(figures, ("val", "test"), strict=True):
        marks = figure.all("g", "point")
        assert len(marks) == 11
        levels = []
        for mark in marks:
            lines = mark.one("title").text.split("\n")
            alpha, beta = map(float, re.match(r"alpha (\S+), beta (\S+):", lines[0]).groups())
            name = re.search(r"kd (\w+)", lines[0])[1]
            key = ("kd", name, alpha, beta) if name == "abkd" else ("kd", name, None, None)
            if key not in expected:
                assert (alpha, beta) == (1.0, 0.6)
                assert mark.all("rect", "none")
                assert sum("failed: loss is not finite" in line for line in lines) == 3
                continue
            entry = expected[key]
            n = len(entry["val"])
            assert lines[1] == f"val top-1 (%): {spread(entry['val'])}, n = {n}"
            assert lines[2] == f"test top-1 (%): {spread(entry['test'])}, n = {n}"
            assert lines[3] == f"seeds {', '.join(map(str, entry['seeds']))}"
            assert lines[4 : 4 + n] == entry["paths"]
            if name == "abkd":
                assert f"{statistics.mean(entry[split]):.2f}" in [text.text for text in mark.all("text")]
            (shape,) = mark.all("rect", "shape")
            level = int(next(name for name in shape.classes if re.fullmatch(r"level-\d", name))[6:])
            levels.append((statistics.mean(entry[split]), level))
        assert [level for _, level in sorted(levels)] == sorted(level for _, level in levels)
        assert {0, 9} <= {level for _, level in levels}
        (chosen,) = [mark for mark in marks if "chosen" in mark.classes]
        assert "chosen by val" in chosen.one("title").text
        assert "2 of 3" in [text.text for mark in marks for text in mark.all("text")]


def test_points_lie_where_alpha_and_beta_are(page):
    figure = page[0].one("div", "panels").all("figure")[0]
    centres = {}
    for mark in figure.all("g", "point"):
        alpha, beta = map(float, re.match(r"alpha (\S+), beta (\S+):", mark.one("title").text).groups())
        if "abkd" in mark.one("title").text:
            box = {name: float(mark.one("rect", "shape").attributes[name]) for name in ("x", "y", "width", "height")}
            centres[alpha, beta] = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    steps = [centres[0.7, beta][0] - centres[0.4, beta][0] for beta in BETAS]
    steps += [centres[1.0, beta][0] - centres[0.7, beta][0] for beta in BETAS]
    assert max(steps) == pytest.approx(min(steps), abs=0.2)
    assert min(steps) > 20
    assert centres[0.4, 0.0][1] > centres[0.4, 0.3][1] > centres[0.4, 0.6][1]
    ticks = {text.text: float(text.attributes["x"]) for text in figure.all("text", **{"text-anchor": "middle"})}
    for alpha in ALPHAS:
        assert ticks[f"{alpha:g}"] == pytest.approx(centres[alpha, 0.0][0], abs=0.2)
    names = {mark.one("title").text for mark in figure.all("g", "place")}
    assert names == {
        "Hellinger: alpha 0.5, beta 0.5",
        "squared Euclidean: alpha 1, beta 1",
        "log-Euclidean: alpha 0, beta 0",
    }


def test_the_neighbours_of_the_choice_have_their_range_stated(study, page):
    expected = by_row(study)
    grid = {key[2:]: statistics.mean(entry["val"]) for key, entry in expected.items() if key[1] == "abkd"}
    alpha, beta = max(grid, key=grid.get)
    around = [
        value
        for (a, b), value in grid.items()
        if (a, b) != (alpha, beta) and abs(a - alpha) < 0.31 and abs(b - beta) < 0.31
    ]
    assert f"{len(around)} points have {min(around):.2f} to {max(around):.2f}." in page[0].text


def test_the_map_is_a_table_as_well(page):
    (table,) = [table for table in page[0].all("table") if table.all("th")[0].text == "point"]
    assert len(table.one("tbody").all("tr")) == 11
    (hole,) = [line for line in table.all("tr") if line.all("td") and line.all("td")[0].text == "kd abkd (1, 0.6)"]
    assert hole.all("td")[3].text == "no run"
    assert hole.text.count("failed: loss is not finite") == 3


def test_parallel_coordinates_have_a_line_for_each_run_at_its_heights(study, page):
    contents = {
        path.parent.relative_to(study / "runs").as_posix(): json.loads(path.read_text())
        for path in (study / "runs").rglob("result.json")
    }
    expected = {}
    for path, content in contents.items():
        if content["divergence"] is not None:
            name = content["divergence"]["name"]
            point = {"fkld": (1.0, 0.0), "rkld": (0.0, 1.0)}.get(name) or (
                content["divergence"]["alpha"],
                content["divergence"]["beta"],
            )
            expected[path] = (*point, content["metrics"]["val/top1"], content["metrics"]["test/top1"])
    lines = page[0].all("g", "run-line")
    assert len(lines) == len(expected)
    drawn = {}
    for line in lines:
        path = line.one("title").text.split("\n")[-1]
        pairs = line.one("path", "casing").attributes["d"].removeprefix("M").split(" ")
        drawn[path] = [float(pair.split(",")[1]) for pair in pairs]
    assert drawn.keys() == expected.keys()
    for axis in range(4):
        values = [expected[path][axis] for path in expected]
        low, high = min(values), max(values)
        bottom = max(drawn[path][axis] for path in drawn)
        top = min(drawn[path][axis] for path in drawn)
        assert bottom - top > 100
        for path, heights in drawn.items():
            share = (expected[path][axis] - low) / (high - low)
            assert heights[axis] == pytest.approx(bottom - share * (bottom - top), abs=0.11)
    best = max(expected, key=lambda path: expected[path][2])
    assert lines[-1].one("title").text.endswith(best)


def test_the_curves_are_means_and_spreads_of_the_histories(study, page):
    (data,) = [element for element in page[0].all("script") if element.attributes.get("type")]
    (column,) = json.loads(data.text)
    assert column["rows"] == 11
    assert len(column["labels"]) == 8
    means = {key[2:]: statistics.mean(entry["val"]) for key, entry in by_row(study).items() if key[1] == "abkd"}
    best = sorted(sorted(means, key=means.get)[-5:])
    assert best != sorted(means)[:5]
    points = [f"kd abkd ({alpha:g}, {beta:g})" for alpha, beta in best]
    assert column["labels"] == ["plain student", "kd fkld", "kd rkld", *points]
    titles = [metric["title"] for metric in column["metrics"]]
    assert titles[:2] == ["val top-1 (%)", "test top-1 (%)"]
    assert "test agreement with the teacher (%)" not in titles
    (series,) = [one for one in column["metrics"][0]["series"] if column["labels"][one["row"]] == "kd fkld"]
    histories = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((study / "runs").rglob("kd-fkld-*/metrics.jsonl"))
    ]
    assert series["epochs"] == [2, 4, 6]
    assert series["n"] == [3, 3, 3]
    for place, epoch in enumerate(series["epochs"]):
        values = [line["val/top1"] for history in histories for line in history if line["epoch"] == epoch]
        mean, std = statistics.mean(values), statistics.stdev(values)
        assert series["mean"][place] == pytest.approx(mean, abs=6e-4)
        assert series["low"][place] == pytest.approx(mean - std, abs=6e-4)
        assert series["high"][place] == pytest.approx(mean + std, abs=6e-4)


def test_the_question_is_that_of_the_lab_notebook_and_its_marks_are_text(page, tmp_path):
    question = next(
        section for section in page[0].all("section") if section.attributes["aria-labelledby"] == "question"
    )
    assert "quickstart: does a teacher help?" in question.text
    assert "Setting. Digits with method=kd, <b>two</b> lines & more." in question.text
    assert "method=kd" in [code.text for code in question.all("code")]
    assert "Commands" not in question.text
    assert "Protocol: dataset.val_fraction 0.2" in question.text
    write_run(tmp_path / "runs", result())
    assert "The study quickstart, of which the lab notebook has no page." in parse(report(tmp_path)[0]).text


def test_a_study_inside_another_has_its_own_question(tmp_path):
    write_run(tmp_path / "runs", result(study="outer/inner"))
    (tmp_path / "experiments" / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "experiments" / "outer" / "inner" / "README.md").write_text("# inner\n\nWhat of it?\n\nNothing.\n")
    text = parse(report(tmp_path, study="outer/inner")[0]).text
    assert "What of it?" in text
    assert "Nothing." not in text


def test_figures_are_on_the_page_byte_for_byte_in_one_order(study, page, tmp_path):
    images = page[0].all("img")
    assert [image.parent.parent.one("figcaption").text for image in images] == [
        "Every seed, every mean and the teacher",
        "Training curves",
    ]
    data = [base64.b64decode(image.attributes["src"].removeprefix("data:image/svg+xml;base64,")) for image in images]
    assert data == [SVG + b" ", SVG]
    assert all(image.attributes["alt"] for image in images)
    folder = tmp_path / "results" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "mass_step.svg").write_bytes(SVG)
    (folder / "mass_training.svg").mkdir()
    write_run(tmp_path / "runs", result())
    analysed = {"grids": [{"rows": [{"runs": [result()["fingerprint"]]}]}]}
    (folder / "analysis.json").write_text(json.dumps(analysed))
    html, _ = report(tmp_path, figures={"accuracy": SVG})
    assert re.findall(r"\((\w+)\.svg beside", html) == ["accuracy", "mass_step"]
    assert "are of other runs" not in html


@pytest.mark.parametrize(
    "analysis",
    [None, "", "[]", '{"grids": [{"rows": [{"seeds": [1]}]}]}', '{"grids": [{"rows": [{"runs": ["another"]}]}]}'],
)
def test_figures_of_an_analysis_of_other_runs_are_left_out_and_the_page_says_so(tmp_path, analysis):
    folder = tmp_path / "results" / "quickstart"
    folder.mkdir(parents=True)
    write_run(tmp_path / "runs", result())
    (folder / "mass_step.svg").write_bytes(SVG)
    if analysis is not None:
        (folder / "analysis.json").write_text(analysis)
    html, _ = report(tmp_path, figures={"accuracy": SVG})
    assert re.findall(r"\((\w+)\.svg beside", html) == ["accuracy"]
    assert "are of other runs than these, and left out: python -m vkd.analyze study=quickstart" in parse(html).text


def test_figures_that_are_too_large_are_named_instead(tmp_path):
    write_run(tmp_path / "runs", result())
    html, _ = report(tmp_path, figures={"accuracy": b"x" * 2**23, "cost": SVG})
    assert "Too large for this page, and beside it: accuracy." in html
    assert len(parse(html).all("img")) == 1
    assert len(html.encode()) < MOST_PAGE_BYTES


def test_every_failure_has_its_seed_reason_and_path(study, page):
    section = next(one for one in page[0].all("section") if one.attributes["aria-labelledby"] == "failures")
    lines = section.all("li")
    failed = [path.parent for path in (study / "runs").rglob("status.json") if "failed" in path.read_text()]
    assert len(lines) == len(failed) == 4
    for folder in failed:
        (line,) = [line for line in lines if folder.name in line.text]
        assert folder.relative_to(study / "runs").as_posix() in [code.text for code in line.all("code")]
        seed = re.search(r"-s(\d)-", folder.name)[1]
        assert f"seed {seed}: failed: loss is not finite" in line.text


def test_without_a_failure_the_page_says_so(tmp_path):
    write_run(tmp_path / "runs", result())
    assert "None: every run that should be there is there and done." in report(tmp_path)[0]


def test_versions_commits_and_devices_stand_with_their_numbers_of_runs(tmp_path):
    for seed in (1, 2, 3):
        environment = {"torch": "2.9.0"} if seed == 3 else {}
        environment |= {"git": "feedbeef", "gpu": {"name": "A <GPU>"}}
        write_run(tmp_path / "runs", result(seed=seed, environment=environment))
    section = next(
        one for one in parse(report(tmp_path)[0]).all("section") if one.attributes["aria-labelledby"] == "environment"
    )
    lines = [[cell.text for cell in line.all("td")] for line in section.one("tbody").all("tr")]
    common = ["0.1.0", "feedbeef"]
    assert lines == [
        [*common, "2.14.1", "1.0.31", "3.11.7", "cpu (2 threads)", "A <GPU>", "2"],
        [*common, "2.9.0", "1.0.31", "3.11.7", "cpu (2 threads)", "A <GPU>", "1"],
    ]


def test_every_run_is_listed_with_state_figures_and_a_command_without_folders_of_its_machine(study, page):
    items = page[0].one("ul", "runs").all("li")
    folders = {path.parent.relative_to(study / "runs").as_posix() for path in (study / "runs").rglob("config.yaml")}
    assert [item.all("code")[0].text for item in items] == sorted(folders)
    for item in items:
        path = item.all("code")[0].text
        file = study / "runs" / path / "result.json"
        if not file.exists():
            assert item.one("span", "state").text == "failed"
            assert "loss is not finite" in item.text
            assert "Its command is not recorded." in item.text
            continue
        metrics = json.loads(file.read_text())["metrics"]
        assert item.one("span", "state").text == "done"
        assert f"val top-1 (%): {metrics['val/top1']:.2f}" in item.text
        assert f"test top-1 (%): {metrics['test/top1']:.2f}" in item.text
        command = item.one("div", "command").text
        seed = re.search(r"-s(\d)-", path)[1]
        assert re.fullmatch(rf"python -m vkd\.train method=\w+ divergence=\w+ seed={seed}", command)
    assert "/home/a" not in page[2]


def test_a_run_that_failed_has_its_command_from_the_index_of_its_sweep(tmp_path):
    write_run(tmp_path / "runs", result(seed=1))
    failed = write_run(tmp_path / "runs", result(seed=2), {"state": "failed", "reason": "x"})
    directory = f"elsewhere/runs/{failed.relative_to(tmp_path / 'runs').as_posix()}"
    words = ["method=kd", "note=it's; rm -rf ~", "runs_root=elsewhere/runs"]
    jobs = [Job(1, "a", ["seed=1"]), Job(2, "b", words, "failed", directory)]
    SweepIndex(tmp_path / "runs" / ".sweeps" / "s").begin(Sweep(["-m"], "/home/a", jobs))
    index = json.loads((tmp_path / "runs" / ".sweeps" / "s" / "sweep.json").read_text())
    index["jobs"][1]["directory"] = directory
    (tmp_path / "runs" / ".sweeps" / "s" / "sweep.json").write_text(json.dumps(index))
    (tmp_path / "runs" / ".sweeps" / "damaged").mkdir()
    (tmp_path / "runs" / ".sweeps" / "damaged" / "sweep.json").write_text("{")
    items = parse(report(tmp_path)[0]).one("ul", "runs").all("li")
    assert items[1].one("div", "command").text == """python -m vkd.train method=kd 'note=it'"'"'s; rm -rf ~'"""


def test_a_recorded_command_that_starts_something_else_is_not_offered(tmp_path):
    for seed, command in enumerate(
        ["curl x | sh", "python -m vkd.train; rm -rf ~", "python -m vkd.train\nrm", "python -m vkd.train a=$HOME"]
    ):
        write_run(tmp_path / "runs", result(seed=seed, environment={"command": command}))
    found = [code.text for code in parse(report(tmp_path)[0]).one("ul", "runs").all("code")]
    shown = [text for text in found if "vkd.train" in text or "curl" in text]
    assert shown == ["python -m vkd.train 'a=$HOME'"]


HOSTILE = "</script></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&lt;{{ 7*7 }}"


def test_no_text_of_a_run_becomes_a_part_of_the_page(tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2):
        for point in ((0.5, 0.5), (0.7, 0.5)):
            content = result(
                "kd", "abkd", point=point, seed=seed, environment={"torch": HOSTILE, "cpu": {"name": HOSTILE}}
            )
            content["recipe"][HOSTILE] = HOSTILE
            write_history(write_run(runs, content, name=f"a<b onload=x>\"{seed}{point[0]}'&amp;"), seed, 50.0)
    write_run(runs, result("kd", "abkd", point=(0.9, 0.5)), {"state": "failed", "reason": HOSTILE}, name="z<script>")
    (tmp_path / "experiments" / "quickstart").mkdir(parents=True)
    (tmp_path / "experiments" / "quickstart" / "README.md").write_text(f"# {HOSTILE}\n\n**Question.** `{HOSTILE}`\n")
    html, table = report(
        tmp_path,
        figures={HOSTILE: SVG},
        row_keys=[
            next(
                name
                for run in read_runs(runs / "quickstart", relative_to=runs)
                for name in run.parameters
                if "script" in name
            )
        ],
    )
    page = parse(html)
    assert "script" in table.rows[0].variant
    scripts = page.all("script")
    assert [script.attributes.get("type") for script in scripts] == ["application/json", None]
    assert json.loads(scripts[0].text)
    assert [image.attributes["src"][:26] for image in page.all("img")] == ["data:image/svg+xml;base64,"]
    assert page.all("b") == []
    for element in page.all():
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"]
    assert page.one("head").one("title").text == "quickstart: test top-1 (%)"
    assert "49" not in "".join(line.text for line in page.all("p")[:2])
    assert "onerror=alert(2)" in page.text


def test_the_policy_of_the_page_allows_its_own_script_and_style_and_nothing_from_elsewhere(page):
    (policy,) = [
        meta.attributes["content"]
        for meta in page[0].all("meta")
        if meta.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (text,) = [element.text for element in page[0].all(tag) if "type" not in element.attributes]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"


def test_nothing_is_loaded_from_anywhere(page):
    tree, _, html = page
    for element in tree.all():
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = element.attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/svg+xml;base64,")), (element.tag, name, value)
    (style,) = tree.all("style")
    assert "@import" not in style.text
    assert set(re.findall(r"url\(([^)]*)\)", style.text)) == {"#hatch"}
    assert "fetch(" not in html
    assert "XMLHttpRequest" not in html
    anchors = {element.attributes["id"] for element in tree.all() if "id" in element.attributes}
    assert {link.attributes["href"][1:] for link in tree.all("a")} <= anchors


def test_headings_are_in_order_and_pictures_and_controls_have_names(page):
    tree = page[0]
    assert tree.one("html").attributes["lang"] == "en"
    levels = [int(element.tag[1]) for element in tree.all() if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for svg in tree.all("svg"):
        assert svg.attributes.get("aria-label") or svg.attributes.get("aria-hidden") == "true"
    for control in [*tree.all("select"), *tree.all("input")]:
        assert control.parent.tag == "label"
        assert control.parent.text.strip()
    ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for picture in tree.all("svg", "roving"):
        assert [mark.attributes["tabindex"] for mark in picture.all("g", "tells")].count("0") == 1


def luminance(colour):
    """Relative luminance of "#rrggbb" (WCAG 2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them_in_light_and_dark(page, theme):
    style = page[0].one("style").text
    blocks = re.findall(r"([^{}]*)\{([^{}]*--page:[^{}]*)\}", style)
    assert len(blocks) == 4
    colours = dict(re.findall(r"(--[\w-]+):\s*(#\w+)", blocks[0][1]))
    dark = [dict(re.findall(r"(--[\w-]+):\s*(#\w+)", block)) for selector, block in blocks[1:3]]
    assert dark[0] == dark[1]  # as the system has it, and as the button says
    colours |= dark[0] if theme == "dark" else {}
    for text in ("--text", "--muted", "--accent", "--bad"):
        for ground in ("--page", "--card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["--text"], colours["--best"]) >= 4.5
    for row in range(8):
        assert contrast(colours[f"--series-{row}"], colours["--page"]) >= 3
    for level, on in re.findall(r"\.on-(\d) text \{ fill: var\((--on-\w+)\)", style):
        assert contrast(colours[f"--level-{level}"], colours[on]) >= 4.5
    grey = [luminance(colours[f"--level-{level}"]) for level in range(10)]
    assert grey == sorted(grey)  # printed without colour the order stays


def test_without_a_script_everything_but_the_curves_is_there_to_read(page):
    tree = page[0]
    for element in tree.all():
        if "hidden" in element.attributes:
            assert "needs-script" in element.classes or element.attributes.get("id") == "tooltip"
    assert "drawn by the page's script" in tree.one("noscript").text


def test_the_same_runs_give_the_same_bytes_in_any_order(study):
    runs = list(read_runs(study / "runs" / "quickstart", relative_to=study / "runs"))
    pages = {
        to_html(
            table_of(order), runs_root=study / "runs", folder=study / "results" / "quickstart", figures={"cost": SVG}
        )
        for order in (runs, runs[::-1], sorted(runs, key=lambda run: run.path[::-1]))
    }
    assert len(pages) == 1
    assert str(study) not in pages.pop()


def test_another_metric_has_its_map_and_lines(study):
    page = parse(report(study, metric="test/ece")[0])
    captions = [figure.one("figcaption").text for figure in page.one("div", "panels").all("figure")]
    assert captions == ["val top-1 (%)", "test ECE"]
    assert "0.0500" in page.one("table", "sortable").text
    assert "test ECE 0.0500" in page.all("g", "run-line")[0].one("title").text
    assert len(parse(report(study, metric="val/top1")[0]).one("div", "panels").all("figure")) == 1


def test_a_study_without_a_grid_without_val_and_without_a_finished_run_has_a_page(tmp_path):
    content = result(val=None)
    content["dataset"]["val_fraction"] = 0.0
    write_run(tmp_path / "a" / "runs", content)
    page = parse(report(tmp_path / "a")[0])
    assert page.all("div", "panels") == []
    assert "90.00 (1)" in page.text
    write_run(tmp_path / "b" / "runs", result(), {"state": "failed", "reason": "out of memory"})
    assert "failed: out of memory" in parse(report(tmp_path / "b")[0]).text
    table = table_of([Run("study/a/b", "damaged", "result.json lacks metrics")])
    text = parse(to_html(table, runs_root=tmp_path, folder=tmp_path, figures={})).text
    assert "damaged: result.json lacks metrics" in text
    assert "0 of 1 done" in text


def test_points_that_lie_on_no_lattice_are_drawn_in_order(tmp_path):
    for alpha in (0.1, 0.35, 0.5, 0.9):
        write_run(tmp_path / "runs", result("kd", "abkd", point=(alpha, round(1 - alpha, 2)), val=60 + alpha))
    figure = parse(report(tmp_path)[0]).one("div", "panels").all("figure")[0]
    places = []
    for mark in figure.all("g", "point"):
        alpha = float(re.match(r"alpha (\S+),", mark.one("title").text)[1])
        shape = mark.one("rect", "shape").attributes
        places.append((alpha, float(shape["x"]), -float(shape["y"])))
    places.sort()
    assert [place[1] for place in places] == sorted(place[1] for place in places)
    assert [place[2] for place in places] == sorted((place[2] for place in places), reverse=True)
    shares = [(x - places[0][1]) / (places[-1][1] - places[0][1]) for _, x, _ in places]
    assert shares == pytest.approx([(alpha - 0.1) / 0.8 for alpha, _, _ in places], abs=0.01)


def test_histories_that_are_damaged_or_lead_elsewhere_are_left_out(tmp_path):
    good = write_run(tmp_path / "runs", result(seed=1))
    write_history(good, 1, 80.0)
    bad = write_run(tmp_path / "runs", result(seed=2))
    (bad / "metrics.jsonl").write_text('{"epoch": 1, "val/top1": NaN}\n')
    page = parse(report(tmp_path)[0])
    (data,) = [json.loads(one.text) for one in page.all("script") if one.attributes.get("type")]
    assert data[0]["metrics"][0]["series"][0]["n"] == [1, 1, 1]
    assert f"Without the curves of quickstart/{bad.parent.name}/{bad.name}: " in page.text


def test_what_would_make_the_page_too_large_is_left_out_and_named(tmp_path, monkeypatch):
    for place in range(6):
        folder = write_run(tmp_path / "runs", result("kd", "abkd", point=(place / 10, 0.5), val=60.0 + place))
        write_history(folder, 1, 80.0)
    whole = report(tmp_path, figures={"cost": SVG})[0]
    assert "Too large" not in whole
    monkeypatch.setattr("vkd.records.report.MOST_PAGE_BYTES", len(whole) - 6000)
    html = report(tmp_path, figures={"cost": SVG})[0]
    assert len(html.encode()) <= len(whole) - 6000
    page = parse(html)
    assert "Too large for this page: figures, lines" in page.text
    assert page.all("img") == []
    assert page.all("g", "run-line") == []
    assert len(rows_of(page)) == 6


def test_ten_thousand_runs_take_seconds_and_no_more_than_eight_megabytes(tmp_path):
    name = "a_study/" + "cifar_resnet56-cifar_resnet20/" * 2
    runs = []
    for alpha in range(60):
        for beta in range(55):
            for seed in (1, 2, 3):
                content = result("kd", "abkd", point=(alpha / 50, beta / 50), seed=seed, top1=alpha / 2 + beta / 3)
                content["environment"]["command"] = "python -m vkd.train " + "'" + "a=&<>" * 60 + "'"
                runs.append(Run(f"{name}kd-abkd-s{seed}-{content['fingerprint'][:8]}", "done", "", content))
    runs += [Run(f"{name}z{index}", "damaged", "x" * 200) for index in range(100)]
    table = table_of(runs)
    started = time.process_time()
    html = to_html(
        table, runs_root=tmp_path, folder=tmp_path, figures={"accuracy": b"x" * 2_000_000, "cost": b"y" * 10**6}
    )
    assert time.process_time() - started < 8  # 2 on a free core
    assert len(html.encode()) < MOST_PAGE_BYTES
    listed = html.count('<div class="run-head">')
    assert 500 < listed <= MOST_RUNS
    assert f"{len(runs) - listed:,} further runs are not listed here." in html
    assert "further rows are in <code>table.md</code>" in html
    assert html.count("<img") == 1
