import csv
import io
import re
import shutil
import subprocess

import pytest

from records.studies import digest, result
from vkd.records.grouping import build_table
from vkd.records.latex import escape, shown_rows, to_latex
from vkd.records.published import ClassificationFigure
from vkd.records.reading import Run
from vkd.records.tables import to_csv

PAIR = {"dataset": "digits", "teacher": "cifar_resnet20", "student": "cifar_resnet8_width4"}
STRANGE = '&%$#_{}~^\\<>|`"[*±§é\u4e2d--\x07 ÅçñŽ'


def make(*contents, metric="test/top1", study="quickstart", command="the command", **settings):
    runs = [Run(f"quickstart/pair/{index:03}", "done", "", content) for index, content in enumerate(contents)]
    return build_table(runs, study=study, metric=metric, command=command, **settings)


def seeds(method="kd", divergence="fkld", tops=(90.0, 91.0, 92.5), **settings):
    return [result(method, divergence, seed=seed, top1=top, **settings) for seed, top in enumerate(tops, 1)]


def study():
    """Plain, KD with two divergences and a grid of two points, of which one was trained again without a val split."""
    contents = [*seeds("none", None, (92.0, 93.4, 94.8)), *seeds(tops=(95.0, 96.0, 97.2))]
    contents += seeds("kd", "rkld", (94.0, 95.2, 96.4))
    contents += seeds("kd", "abkd", (94.9, 95.4, 96.1), point=(0.8, 0.3), val=93.0)
    contents += seeds("kd", "abkd", (98.0, 98.5, 99.0), point=(0.8, 0.5), val=90.0)
    for content in seeds("kd", "abkd", (99.0, 99.0, 99.0), point=(0.8, 0.3), val=None):
        content["dataset"] |= {"val_fraction": 0, "train": 1297}
        contents.append(content | {"group": digest("again"), "fingerprint": digest("again", content["seed"])})
    return contents


def body(text):
    """The cells of the lines below the header, as text without commands but `textbf` and `underline`."""
    inner = text.partition("\\midrule")[2].partition("\\bottomrule")[0].replace("\\midrule", "")
    lines = [line.strip().removesuffix("\\\\").strip() for line in inner.splitlines() if line.strip()]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in lines]


def figure(cell):
    """The first number of a cell."""
    return float(re.search(r"-?\d+\.\d+", cell.replace("$-$", "-"))[0])


def assert_balanced(text):
    """Braces that are not escaped open and close, and so do environments and mathematics."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        assert depth >= 0
    assert depth == 0
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    assert re.findall(r"\\begin{(.*?)}", text) == re.findall(r"\\end{(.*?)}", text)[::-1]


def test_the_figures_are_those_of_the_csv():
    table = make(*study())
    stated = {
        (line["divergence"], line["beta"], line["variant"][-3:]): line
        for line in csv.DictReader(io.StringIO(to_csv(table)))
    }
    lines = body(to_latex(table))
    assert lines[0] == ["teacher (test)", "", "98.90", ""]
    assert lines[1][3].startswith("$-$2.67 {\\small [$-$3.43, $-$1.91], $p = 0.25$}")
    assert lines[4][3].startswith("$-$0.60 {\\small [$-$1.84, $+$0.64], ")
    rows = [("", "", ""), ("fkld", "", ""), ("rkld", "", ""), ("abkd", "0.3", "0.2"), ("abkd", "0.3", "n=0")]
    assert len(lines) == 1 + len(rows)
    for cells, row in zip(lines[1:], rows, strict=True):
        line = stated[row]
        assert figure(cells[2]) == pytest.approx(float(line["mean"]), abs=0.005001)
        assert f"$\\pm$ {float(line['std']):.2f}" in cells[2]
        if not line["difference_to_kd"]:
            assert cells[3] == "--"
            continue
        names = ("difference_to_kd", "difference_to_kd_low", "difference_to_kd_high", "difference_to_kd_p")
        numbers = re.findall(r"-?\d+\.\d+", cells[3].replace("$-$", "-"))
        assert list(map(float, numbers)) == [pytest.approx(float(line[name]), abs=0.005001) for name in names]


def test_the_best_comparable_mean_is_bold_the_second_underlined_and_ties_share():
    lines = body(to_latex(make(*study())))
    assert [re.findall(r"textbf|underline", cells[2]) for cells in lines[1:]] == [
        [],
        ["textbf"],
        [],
        ["underline"],
        [],  # trained on other images than the rest, though its figure is the highest
    ]
    table = make(*seeds(tops=(90.0, 90.001)), *seeds("dkd", "fkld", (90.001, 90.002)), *seeds("at", None, (1.0, 2.0)))
    assert [re.findall(r"textbf|underline", cells[2]) for cells in body(to_latex(table))[1:]] == [
        ["textbf"],
        ["underline"],
        ["textbf"],
    ]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("test/nll", [["underline"], ["textbf"]]), ("test/top1", [["textbf"], ["underline"]]), ("test/entropy", [[], []])],
)
def test_the_best_is_the_lowest_where_less_is_better_and_none_where_neither_is(metric, expected):
    contents = [*seeds(tops=(95.0,)), *seeds("kd", "rkld", (90.0,))]
    for content, value in zip(contents, (0.4, 0.2), strict=True):
        content["metrics"] |= {"test/nll": value, "test/entropy": value}
    lines = body(to_latex(make(*contents, metric=metric)))
    assert [re.findall(r"textbf|underline", cells[2]) for cells in lines[1:]] == expected


def test_students_of_another_teacher_recipe_or_number_of_images_are_not_ranked_and_a_note_names_them():
    other = seeds("dkd", "fkld", (99.0, 99.0, 99.0), recipe={"epochs": 40})
    text = to_latex(make(*seeds("none", None, (1.0, 2.0, 3.0)), *seeds(), *other))
    assert [re.findall(r"textbf|underline", cells[2]) for cells in body(text)[1:]] == [["underline"], ["textbf"], []]
    assert "Not ranked in digits" in text
    assert re.search(r"their protocol is another: dkd fkld\.", text)


def test_of_a_grid_the_choice_alone_is_a_row_and_a_note_says_what_test_would_have_gained():
    table = make(*study())
    assert len(table.rows) == 6
    assert [row.key.beta for row in shown_rows(table)] == [None, None, None, 0.3, 0.3]
    text = to_latex(table)
    assert "0.8, 0.5" not in text
    assert "was chosen from 2 points" in text
    assert "selecting on test would have gained +3.03" in text


def test_the_caption_names_data_set_teacher_student_protocol_number_of_seeds_and_spread():
    caption = re.search(r"\\caption{(.*)}", to_latex(make(*seeds(), *seeds("kd", "rkld"))))[1]
    for words in (
        "Test top-1 (\\%) on digits, teacher cifar\\_resnet20, student cifar\\_resnet8\\_width4, last epoch.",
        "dataset.val\\_fraction 0.2, recipe.epochs 20",
        "Mean $\\pm$ sample standard deviation over n = 3 seeds.",
        "bold, the second underlined",
    ):
        assert words in caption
    assert "epoch of the best val" in to_latex(make(*seeds(), metric="test/top1_at_best_val"))


def test_where_cells_have_different_numbers_of_seeds_each_states_its_own():
    lines = body(to_latex(make(*seeds(), *seeds("kd", "rkld", (90.0, 91.0)), *seeds("dkd"))))
    assert [re.findall(r"\(.*?\)", cells[2]) for cells in lines[1:]] == [["(3)"], ["(2 of 3)"], ["(3)"]]


def test_several_columns_have_a_header_of_their_networks_and_leave_the_differences_to_the_csv():
    table = make(*seeds("none", None), *seeds(), *seeds(dataset="cifar10"), *seeds("kd", "rkld", dataset="cifar10"))
    text = to_latex(table)
    assert "Data set &  & cifar10 & digits" in text
    assert "Teacher &  & cifar\\_resnet20 & cifar\\_resnet20" in text
    assert {len(cells) for cells in body(text)} == {4}
    assert [cells[2] for cells in body(text) if cells[0] == "plain student"] == ["--"]
    assert "stand in \\texttt{table.csv}" in text


def test_keys_that_make_columns_stand_in_the_header_and_in_the_caption():
    table = make(*seeds(), *seeds(recipe={"epochs": 40}), column_keys=["recipe.epochs"])
    text = to_latex(table)
    assert "    recipe.epochs &  & 20 & 40 \\\\" in text
    assert "width4, recipe.epochs 40, last epoch" in text


def test_published_figures_stand_beside_those_of_a_single_column_with_the_mark_of_what_does_not_compare():
    figures = [
        ClassificationFigure(
            **PAIR, label="KD", method="kd", divergence="fkld", top1=89.5, source="a_paper", epochs=20
        ),
        ClassificationFigure(**PAIR, label="X & Y", method="", top1=88.0, source="b", epochs=20),
    ]
    contents = seeds()
    text = to_latex(make(*contents, published=figures, published_rows=True))
    assert body(text)[1][-1] == "89.50\\textsuperscript{\\S}"
    assert body(text)[2] == ["X \\& Y (published)", "", "", "", "88.00"]
    assert "a\\_paper" in text
    assert "dataset.val\\_fraction 0.2 here" in text
    for content in contents:
        content["dataset"]["val_fraction"] = 0.0
    assert body(to_latex(make(*contents, published=figures)))[1][-1] == "89.50"


@pytest.mark.parametrize("character", sorted(set(STRANGE)))
def test_every_special_character_becomes_ascii_that_latex_takes_for_text(character):
    made = escape(f"a{character}b")
    assert made.isascii()
    assert made.isprintable()
    assert made.startswith("a")
    assert made.endswith("b")
    assert_balanced(made)
    if character in "&%$#_{}":
        assert made == f"a\\{character}b"


def test_code_is_typewriter_dashes_do_not_join_and_unknown_letters_are_named_by_their_code():
    assert escape("in `table.csv`, a_b") == "in \\texttt{table.csv}, a\\_b"
    assert escape("a ` b") == "a \\textasciigrave{} b"
    assert escape("--flag ---") == "-{}-flag -{}-{}-"
    assert escape("1\N{EN DASH}2") == "1--2"
    assert escape("\u4e2d") == "{[}U+4E2D]"
    assert escape("[a]*") == "{[}a]{*}"  # after the end of a line, [ and * would be its arguments
    assert escape("é Å ç i\u0308") == "\\'{e} \\r{A} \\c{c} i{[}U+0308]"


def strange():
    """A table whose every free text holds every special character."""
    figures = [
        ClassificationFigure(**PAIR, label=STRANGE, method="kd", divergence="fkld", top1=89.5, source=STRANGE),
        ClassificationFigure(**PAIR, label=STRANGE, method="", top1=88.0, source=STRANGE),
    ]
    contents = [
        *seeds(recipe={"note": STRANGE}),
        *seeds("kd", "rkld", recipe={"note": "x"}),
        *seeds(recipe={"note": "y"}),
    ]
    return make(*contents, study=STRANGE, command=STRANGE + "\n\\evil", published=figures, published_rows=True)


@pytest.mark.parametrize("baseline", ["kd", "none"])
def test_braces_mathematics_and_environments_are_balanced_and_every_line_has_as_many_cells(baseline):
    several = [*study(), *seeds(dataset="cifar10"), *seeds("none", None, dataset="cifar10")]
    for table in (make(*study(), baseline=baseline), make(*several, baseline=baseline), strange(), make()):
        text = to_latex(table)
        assert_balanced("\n".join(line for line in text.splitlines() if not line.startswith("%")))
        columns = re.search(r"@{}(l+r*)@{}", text)[1]
        assert {len(cells) for cells in body(text)} <= {len(columns)}
        assert "\n\\evil" not in text
    assert to_latex(strange()).partition("\\begin")[2].isascii()


def test_the_same_runs_in_another_order_give_the_same_bytes():
    contents = study()
    assert to_latex(make(*contents)) == to_latex(make(*contents[::-1]))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_pdflatex_compiles_it_with_booktabs_alone(tmp_path):
    several = [content for name in "abcdefgh" for content in seeds(dataset=f"data_{name}")]
    tables = [make(*study()), strange(), make(*study(), *seeds(dataset="cifar10")), make(*several), make(*study()[:3])]
    for index, table in enumerate(tables):
        (tmp_path / f"table{index}.tex").write_text(to_latex(table))
    inputs = "\n".join(f"\\input{{table{index}}}" for index in range(len(tables)))
    document = (
        f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )
    (tmp_path / "paper.tex").write_text(document)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000
