import csv
import io
import itertools
import random
import statistics

import pytest
import scipy.stats

from records.studies import digest, result
from vkd.errors import ConfigError
from vkd.records.grouping import build_table
from vkd.records.published import ClassificationFigure
from vkd.records.reading import Run
from vkd.records.tables import grid, holes, metric_title, notes, show_p_value, to_csv, to_markdown


def done(*contents):
    return [Run(f"quickstart/pair/{index:03}", "done", "", content) for index, content in enumerate(contents)]


def make(*contents, metric="test/top1", more=(), **settings):
    runs = [*done(*contents), *more]
    return build_table(runs, study="quickstart", metric=metric, command="the command", **settings)


def seeds(method="kd", divergence="fkld", tops=(90.0, 91.0, 92.5), start=1, **settings):
    return [result(method, divergence, seed=start + i, top1=top, **settings) for i, top in enumerate(tops)]


def lines(table):
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def text(table):
    return "\n".join(notes(table))


def test_a_cell_holds_mean_spread_and_number_of_its_seeds():
    table = make(*seeds())
    assert grid(table)[1][-1][4].startswith("91.17 ± 1.26 (3)")
    (line,) = lines(table)
    assert float(line["mean"]) == pytest.approx(statistics.mean([90.0, 91.0, 92.5]), rel=1e-15)
    assert float(line["std"]) == pytest.approx(statistics.stdev([90.0, 91.0, 92.5]), rel=1e-12)
    assert (line["n"], line["seeds"], line["holes"]) == ("3", "1 2 3", "")


def test_differences_to_the_plain_student_and_to_kd_are_paired_by_seed():
    table = make(
        *seeds("none", None, (90.0, 91.0)), *seeds(tops=(91.0, 91.5)), *seeds("dkd", "abkd", (93.0, 92.0), point=(1, 0))
    )
    plain, kd, dkd = lines(table)
    assert (plain["method"], kd["method"], dkd["method"]) == ("none", "kd", "dkd")
    assert float(kd["difference_to_plain"]) == 0.75
    assert float(kd["difference_to_plain_std"]) == pytest.approx(statistics.stdev([1.0, 0.5]))
    assert (kd["difference_to_kd"], plain["difference_to_plain"]) == ("", "")
    assert float(dkd["difference_to_kd"]) == 1.25
    assert float(plain["difference_to_kd"]) == -0.75
    assert (dkd["difference_to_kd_pairs"], dkd["difference_to_plain_pairs"]) == ("2", "2")
    # The spreads are 2 / 2^0.5 and 1.5 / 2^0.5, t(0.975, 1) is 12.7062; two signs give no p below 1/2.
    assert grid(table)[1][-1][5:] == ["+2.00 [-10.71, +14.71] p=0.5", "+1.25 [-8.28, +10.78] p=0.5"]


def test_where_seeds_do_not_coincide_the_difference_is_marked_as_one_of_means():
    table = make(*seeds("none", None, (90.0, 91.0), start=5), *seeds(tops=(91.0, 91.5)))
    assert grid(table)[1][-1][5] == "+0.75†"
    assert "`†`: difference of the two means" in text(table)


def test_one_and_one_point_zero_are_the_same_point():
    runs = [
        result("kd", "abkd", point=point, seed=seed, top1=90.0) for seed, point in enumerate([(1, 0), (1.0, 0.0)], 1)
    ]
    assert runs[0]["group"] == runs[1]["group"]
    (line,) = lines(make(*runs))
    assert (line["n"], line["alpha"], line["beta"], line["variant"]) == ("2", "1.0", "0.0", "")


def test_runs_with_another_recipe_are_never_averaged_and_the_variant_names_what_differs():
    table = make(*seeds(recipe={"epochs": 2}), *seeds(tops=(95.0,), recipe={"epochs": 20}))
    assert [(line["variant"], line["n"]) for line in lines(table)] == [
        ("recipe.epochs=2", "3"),
        ("recipe.epochs=20", "1"),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run["recipe"].update(lr=0.2),
        lambda run: run["recipe"].update(new=True),
        lambda run: run.update(precision="bf16"),
        lambda run: run.update(cross_entropy_weight=0.5),
        lambda run: run["method"]["kd"].update(weight=0.5),
        lambda run: run["divergence"].update(temperature=2),
        lambda run: run["dataset"].update(val_fraction=0),
        lambda run: run["dataset"].update(identity="other"),
        lambda run: run["teacher"].update(sha256="other"),
        lambda run: run.update(world_size=8),
        lambda run: run.update(group="0" * 64),
    ],
)
@pytest.mark.parametrize("same_group", [False, True])
def test_whatever_differs_but_the_seed_splits_the_row(change, same_group):
    a, b = result(seed=1, top1=80.0), result(seed=2, top1=90.0)
    change(b)
    if not same_group and b["group"] == a["group"]:
        b["group"] = "1" * 64
    found = lines(make(a, b))
    assert sorted(line["mean"] for line in found) == ["80.0", "90.0"]
    assert len({line["variant"] for line in found}) == 2


def test_settings_that_differ_between_columns_alone_make_no_variant():
    table = make(*seeds(recipe={"epochs": 2}), *seeds(dataset="cifar10", recipe={"epochs": 200}))
    assert "variant" not in grid(table)[0]
    assert len(table.rows) == 1


def test_another_temperature_is_another_row_and_compares_with_the_kd_of_its_own_recipe():
    cold = seeds(tops=(91.0, 91.0))
    for run in cold:
        run["divergence"]["temperature"] = 1
        run["group"] = "2" * 64
        run["fingerprint"] = f"cold {run['seed']}"
    warm = seeds(tops=(92.0, 92.0))
    other = seeds("kd", "rkld", (93.0, 93.0))
    table = make(*cold, *warm, *other)
    rows = {(line["divergence"], line["variant"]): line for line in lines(table)}
    assert rows.keys() == {("fkld", "divergence.temperature=1"), ("fkld", "divergence.temperature=4"), ("rkld", "")}
    assert float(rows["rkld", ""]["difference_to_kd"]) == 1.0


def test_there_is_no_difference_where_several_baselines_fit_equally_well():
    table = make(*seeds("none", None, recipe={"epochs": 2}), *seeds(), *seeds("dkd", "fkld"))
    kd = next(line for line in lines(table) if line["method"] == "kd")
    assert kd["difference_to_plain"] == ""
    assert "no difference to plain student: none has the same recipe.epochs" in text(table)
    both = [result(seed=seed, top1=90.0) for seed in (1, 2)]
    for weight, run in zip((0.5, 0.7), both, strict=True):
        run["method"]["kd"]["weight"] = weight
        run["group"] = f"{weight}"
    table = make(*both, result("dkd", "fkld"))
    assert lines(table)[-1]["difference_to_kd"] == ""
    assert "2 rows of it fit equally well" in text(table)


def test_plain_training_stands_in_every_column_of_its_data_and_student():
    table = make(
        *seeds("none", None, (90.0, 91.0)),
        *seeds(teacher="a", tops=(92.0, 92.0)),
        *seeds(teacher="b", tops=(93.0, 93.0)),
        *seeds("none", None, (50.0, 51.0), dataset="cifar10"),
    )
    header, body = grid(table)
    assert [column.title for column in table.columns] == [
        "cifar10: cifar_resnet8_width4",
        "digits: a -> cifar_resnet8_width4",
        "digits: b -> cifar_resnet8_width4",
    ]
    plain, kd = body[1:]
    assert [plain[index].split(" (")[0] for index in (4, 7, 10)] == ["50.50 ± 0.71", "90.50 ± 0.71", "90.50 ± 0.71"]
    assert [kd[index].split(" [")[0] for index in (5, 8, 11)] == ["-", "+1.50", "+2.50"]
    assert len(header) == len(plain) == 13


def test_the_teachers_accuracy_stands_on_top_and_what_it_saw_is_flagged():
    contents = seeds()
    table = make(*contents, metric="val/top1")
    assert grid(table)[1][0][:5] == ["teacher (val)", "", "", "", "99.20"]
    for content in contents:
        content["teacher"]["saw_val"] = "unknown"
    assert grid(make(*contents))[1][0][4] == "98.90 (saw val: unknown)"
    contents[1]["teacher"] = {**contents[1]["teacher"], "sha256": "other", "accuracy": {"val": 98.0, "test": 96.9}}
    assert grid(make(*contents))[1][0][5] == "97.90 ± 1.41 (saw val: unknown)"


def test_a_run_that_is_found_twice_is_counted_once():
    a, b = seeds(tops=(90.0, 92.0))
    table = make(a, b, a)
    assert lines(table)[0]["n"] == "2"
    assert "is the same run as" in text(table)
    twin = {**a, "fingerprint": "another"}
    table = make(a, b, twin)
    assert lines(table)[0]["mean"] == "91.0"
    assert "has the group and seed of" in text(table)


def test_runs_of_one_cell_from_different_machines_are_flagged():
    a, b = result(seed=1), result(seed=2, environment={"torch": "2.9.0"})
    table = make(a, b)
    assert "(2)‡" in grid(table)[1][-1][4]
    assert "`‡`: runs of one cell were made with different versions or hardware: kd fkld" in text(table)
    assert "Made with torch 2.9.0, timm 1.0.31, python 3.11.7, device cpu (2 threads), vkd 0.1.0: 1 run." in notes(
        table
    )


def hole(state="failed", reason="loss not finite", **settings):
    content = result(**settings)
    config = {name: content[name] for name in ("method", "divergence", "seed", "student", "recipe")}
    config |= {"dataset": {"name": content["dataset"]["name"]}, "teacher": {"arch": "cifar_resnet20", "seed": 0}}
    return Run(f"quickstart/pair/{state}-{settings.get('seed', 1)}", state, reason, config)


def test_a_failed_run_is_a_hole_with_its_reason_and_place():
    table = make(*seeds(tops=(90.0, 91.0)), more=[hole(seed=3)])
    assert "(2 of 3)" in grid(table)[1][-1][4]
    assert holes(table) == [
        "kd fkld, digits: cifar_resnet20 -> cifar_resnet8_width4, seed 3: failed: loss not finite "
        "(`quickstart/pair/failed-3`)"
    ]
    assert lines(table)[0]["holes"] == "seed 3: failed: loss not finite (`quickstart/pair/failed-3`)"


def test_a_row_of_holes_alone_is_shown():
    table = make(*seeds("none", None), more=[hole(seed=seed) for seed in (1, 2, 3)])
    assert grid(table)[1][-1] == ["kd", "fkld", "-", "-", "hole (0 of 3)", "-", "-"]


def test_a_hole_with_another_recipe_is_a_row_of_its_own():
    table = make(*seeds(), more=[hole(seed=4, recipe={"epochs": 2})])
    assert [row.variant for row in table.rows] == ["recipe.epochs=2", "recipe.epochs=20"]


def test_null_in_a_result_and_a_value_in_a_config_are_not_the_same():
    table = make(*seeds(recipe={"mixup": None}), more=[hole(seed=4, recipe={"mixup": 0.2})])
    assert [row.variant for row in table.rows] == ["recipe.mixup=0.2", "recipe.mixup=not set"]


def test_a_hole_that_may_belong_to_several_rows_is_listed_and_counted_in_none():
    bare = hole(seed=4)
    del bare.content["recipe"]
    table = make(*seeds(recipe={"epochs": 2}), *seeds(), more=[bare])
    assert [line["n"] for line in lines(table)] == ["3", "3"]
    assert [line["holes"] for line in lines(table)] == ["", ""]
    assert holes(table) == [
        "in no row: seed 4: failed: loss not finite (may belong to several rows) (`quickstart/pair/failed-4`)"
    ]


def test_a_hole_whose_seed_is_there_from_elsewhere_is_none():
    table = make(*seeds(), more=[hole(seed=2)])
    assert holes(table) == []
    assert "its seed is there from elsewhere: failed: loss not finite" in text(table)


def test_a_run_that_says_nothing_of_itself_is_listed():
    table = make(*seeds(), more=[Run("quickstart/pair/x", "damaged", "no config.yaml")])
    assert holes(table) == ["in no row: damaged: no config.yaml (`quickstart/pair/x`)"]


def test_a_done_run_without_the_metric_is_a_hole():
    table = make(*seeds(tops=(90.0, None, 92.0)))
    assert "(2 of 3)" in grid(table)[1][-1][4]
    assert "seed 2: done, but has no test/top1" in holes(table)[0]


def test_a_seed_that_half_of_the_rows_have_is_missed_elsewhere_but_one_rows_extra_seeds_are_not():
    table = make(*seeds("none", None, (1.0,) * 9), *seeds(), *seeds("kd", "rkld", (90.0, 91.0)), *seeds("dkd", "rkld"))
    assert [line["holes"] for line in lines(table)] == ["", "", "seed 3: missing: no such run", ""]


def test_a_row_without_runs_in_a_column_says_so():
    table = make(*seeds(), *seeds(dataset="cifar10"), *seeds("dkd", "rkld"))
    assert holes(table) == ["dkd rkld: no runs in cifar10: cifar_resnet20 -> cifar_resnet8_width4"]


def test_the_best_row_is_marked_by_val_whatever_test_says():
    table = make(*seeds(tops=(99.0, 99.0), val=80.0), *seeds("dkd", "fkld", (90.0, 90.0), val=81.0))
    assert [line["best_by_val"] for line in lines(table)] == ["0", "1"]
    assert grid(table)[1][-1][4] == "90.00 ± 0.00 (2)*"
    assert "best mean val/top1" in text(table)


def test_no_row_is_marked_where_validation_sets_differ_or_are_empty():
    other = seeds("dkd", "fkld", val=95.0)
    for run in other:
        run["dataset"]["val_fraction"] = 0.1
    assert {line["best_by_val"] for line in lines(make(*seeds(), *other))} == {"0"}
    assert "validation sets differ" in text(make(*seeds(), *other))
    assert {line["best_by_val"] for line in lines(make(*seeds(val=None)))} == {"0"}


def test_rows_are_ordered_plain_first_then_kd_then_the_rest_by_alpha_and_beta():
    contents = [
        *seeds("dkd", "fkld"),
        *seeds("at", None),
        *itertools.chain(*(seeds("kd", "abkd", point=point) for point in [(1, 0), (0.2, 10), (0.2, 9)])),
        *seeds("kd", "rkld"),
        *seeds(),
        *seeds("none", None),
    ]
    assert [line[:4] for line in grid(make(*contents))[1][1:]] == [
        ["plain student", "-", "-", "-"],
        ["kd", "fkld", "-", "-"],
        ["kd", "rkld", "-", "-"],
        ["kd", "abkd", "0.2", "9"],
        ["kd", "abkd", "0.2", "10"],
        ["kd", "abkd", "1", "0"],
        ["at", "-", "-", "-"],
        ["dkd", "fkld", "-", "-"],
    ]


def test_the_scale_of_alpha_beta_divergences_is_always_stated():
    contents = seeds("kd", "abkd", point=(1, 0))
    assert "divergence scale: not matched to KL's" in text(make(*contents))
    for content in contents:
        content["divergence"]["match_kl_scale"] = True
    assert "divergence scale: matched to KL's" in text(make(*contents))
    for content in contents:
        del content["divergence"]["match_kl_scale"]
    assert "divergence scale: not stated" in text(make(*contents))


def test_a_maximum_over_epochs_is_called_one():
    table = make(*seeds(), metric="test/top1_max_over_epochs")
    assert to_markdown(table).startswith("# quickstart: test top-1, maximum over epochs (%)\n\n    the command\n")
    assert "picks each run's epoch on test itself" in text(table)
    assert metric_title("test/ece") == "test ECE"
    assert grid(make(*seeds(), metric="test/ece"))[1][0][0] == "teacher (test top-1)"
    assert grid(make(*seeds(), metric="test/top1"))[1][0][0] == "teacher (test)"
    assert grid(make(*seeds(), metric="test/ece"))[1][-1][4].startswith("0.0500 ± 0.0000 (3)")


def test_the_same_runs_in_another_order_give_the_same_bytes():
    runs = done(*seeds("none", None), *seeds(), *seeds("kd", "abkd", point=(1, 0)), *seeds(recipe={"epochs": 2}))
    tables = [
        build_table(order, study="q", metric="test/top1", command="c")
        for order in (runs, runs[::-1], runs[5:] + runs[:5])
    ]
    assert len({to_markdown(table) for table in tables}) == 1
    assert len({to_csv(table) for table in tables}) == 1


def test_every_line_of_the_markdown_table_is_aligned():
    content = seeds(student="a|b<script>")
    table = [line for line in to_markdown(make(*content, *seeds("dkd", None))).splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1
    assert "a\\|b&lt;script>" in table[0]


def test_numbers_in_the_csv_are_not_rounded():
    (line,) = lines(make(*seeds(tops=(1 / 3,))))
    assert float(line["mean"]) == 1 / 3
    assert line["std"] == ""


def test_intervals_and_p_values_of_differences_are_those_of_scipy():
    generator = random.Random(3)
    for n in (3, 10, 11):
        ours, theirs = ([generator.gauss(90, 1) for _ in range(n)] for _ in range(2))
        table = make(*seeds(tops=theirs), *seeds("dkd", "fkld", ours))
        line = lines(table)[-1]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        scale = scipy.stats.sem(differences)
        low, high = scipy.stats.t.interval(0.95, n - 1, loc=statistics.mean(differences), scale=scale)
        assert float(line["difference_to_kd_low"]) == pytest.approx(low, abs=1e-9)
        assert float(line["difference_to_kd_high"]) == pytest.approx(high, abs=1e-9)
        if n > 10:
            expected, test = scipy.stats.ttest_rel(ours, theirs).pvalue, "paired t"
        else:
            signs = itertools.product((-1, 1), repeat=n)
            sums = [abs(sum(s * d for s, d in zip(choice, differences, strict=True))) for choice in signs]
            expected = sum(total >= abs(sum(differences)) - 1e-9 for total in sums) / 2**n
            test = "sign-flip permutation"
        assert float(line["difference_to_kd_p"]) == pytest.approx(expected, abs=1e-9)
        assert line["difference_to_kd_test"] == test
        assert f"of {'a' if n > 10 else 'an exact'} {test} test over" in text(table)


def test_one_seed_has_a_difference_and_neither_interval_nor_p_value():
    table = make(*seeds(tops=(91.0,)), *seeds("dkd", "fkld", (92.0,)))
    line = lines(table)[-1]
    assert (line["difference_to_kd"], line["difference_to_kd_pairs"]) == ("1.0", "1")
    assert [line[f"difference_to_kd_{name}"] for name in ("std", "low", "high", "p", "test")] == [""] * 5
    assert grid(table)[1][-1][-1] == "+1.00"
    assert "p is two-sided" not in text(table)


def test_a_small_p_value_is_never_shown_as_nothing():
    assert (show_p_value(0.25), show_p_value(0.0078125), show_p_value(1.0)) == ("p=0.25", "p=0.0078", "p=1")
    assert show_p_value(0.0) == show_p_value(0.00099) == "p<0.001"


def test_any_row_can_be_the_baseline_by_its_name_with_or_without_its_variant():
    contents = [*seeds(tops=(91.0, 91.0)), *seeds("kd", "abkd", (93.0, 94.0), point=(0.8, 0.3))]
    contents += seeds("kd", "abkd", (97.0, 98.0), point=(0.8, 0.3), recipe={"epochs": 2})
    for name in ("kd abkd (0.8, 0.3)", " kd  abkd (0.8, 0.3) [recipe.epochs=20] "):
        table = make(*contents, baseline=name)
        kd, *others = lines(table)
        assert kd["difference_to_baseline"] == "-2.5"
        assert "difference_to_kd" not in kd
    assert [line["difference_to_baseline"] for line in others] == ["", ""]
    assert "none has the same recipe.epochs" in text(table)


def test_where_the_plain_student_is_the_only_baseline_a_column_has_two_texts():
    contents = [*seeds("none", None), *seeds(), *seeds(teacher="another")]
    header, body = grid(make(*contents, baseline="none"))
    assert header[5::2] == ["to plain", "to plain"]
    assert {len(line) for line in body} == {len(header)} == {8}


def test_a_baseline_that_no_row_has_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no row is called 'kd abkd \(8, 3\)'") as caught:
        make(*seeds(), *seeds("kd", "abkd", point=(0.8, 0.3)), baseline="kd abkd (8, 3)")
    assert "'baseline=kd abkd (0.8, 0.3)'" in caught.value.hint


def points(*values, **settings):
    """Runs of kd abkd at (0.1, 0), (0.2, 0), ..., each with its mean val and test top-1."""
    return [
        run
        for index, (val, top1) in enumerate(values, 1)
        for run in seeds("kd", "abkd", (top1 - 1, top1 + 1), val=val, point=(index / 10, 0), **settings)
    ]


def again(*contents, tops):
    """The same runs without a validation split, at these accuracies."""
    made = []
    for content, top1 in zip(contents, tops, strict=True):
        dataset = content["dataset"] | {"val_fraction": 0.0, "train": 1297}
        metrics = content["metrics"] | {"val/top1": None, "test/top1": top1}
        content = {**content, "dataset": dataset, "metrics": metrics}
        content |= {"group": digest(content["group"]), "fingerprint": digest(content["fingerprint"])}
        made.append(content)
    return made


def test_the_point_of_a_grid_with_the_best_val_is_chosen_and_what_test_would_have_gained_is_stated():
    table = make(*seeds(), *points((80.0, 95.0), (82.0, 91.5), (81.0, 96.25)))
    assert [line["chosen_from_grid"] for line in lines(table)] == ["", "0", "1", "0"]
    assert [line["test_selection_gain"] for line in lines(table)] == ["", "", "4.75", ""]
    assert grid(table)[1][3][4] == "91.50 ± 1.41 (2)¶"
    assert (
        "kd abkd (0.2, 0) (digits: cifar_resnet20 -> cifar_resnet8_width4) was chosen from 3 points: test top-1 (%) "
        "91.50 ± 1.41; selecting on test would have gained +4.75; it was not run at dataset.val_fraction=0."
        in text(table)
    )


def test_of_points_with_equal_val_the_first_is_chosen_though_their_sums_round_otherwise():
    contents = points((80.0, 90.0), (80.0, 95.0))
    for content, val in zip(contents, (80.1, 80.3, 80.0, 80.4), strict=True):
        content["metrics"]["val/top1"] = val
    assert [line["chosen_from_grid"] for line in lines(make(*contents))] == ["1", "0"]


def test_points_of_other_methods_divergences_recipes_or_teachers_are_no_points_of_a_grid():
    table = make(
        *points((80.0, 95.0)), *points((90.0, 95.0), recipe={"epochs": 2}), *seeds("kd", "rkld"), *seeds("dkd", "abkd")
    )
    assert {line["chosen_from_grid"] for line in lines(table)} == {""}
    assert "¶" not in to_markdown(table)


def test_weights_and_temperatures_make_a_grid_as_well():
    contents = [*seeds(val=80.0), *seeds(val=85.0)]
    for run in contents[3:]:
        run["divergence"]["temperature"] = 2.0
        run["group"], run["fingerprint"] = digest("warm"), digest("warm", run["seed"])
    table = make(*contents)
    assert [(line["variant"], line["chosen_from_grid"]) for line in lines(table)] == [
        ("divergence.temperature=2", "1"),
        ("divergence.temperature=4", "0"),
    ]


def test_what_selecting_on_test_gains_goes_down_where_less_is_better_and_is_not_said_of_val():
    contents = points((80.0, 95.0), (82.0, 91.5))
    for content, nll in zip(contents, (0.2, 0.2, 0.7, 0.7), strict=True):
        content["metrics"]["test/nll"] = nll
    (gain,) = {line["test_selection_gain"] for line in lines(make(*contents, metric="test/nll"))} - {""}
    assert float(gain) == pytest.approx(-0.5)
    assert {line["test_selection_gain"] for line in lines(make(*contents, metric="val/top1"))} == {""}


def test_a_grid_whose_points_have_other_seeds_is_warned_of():
    assert "different seeds" not in text(make(*points((80.0, 95.0), (82.0, 91.5))))
    assert "different seeds" in text(make(*points((80.0, 95.0), (82.0, 91.5))[1:]))


def test_of_a_grid_the_choice_without_a_val_split_alone_stands_beside_published_figures():
    pair = {"dataset": "digits", "teacher": "cifar_resnet20", "student": "cifar_resnet8_width4"}
    figures = [
        ClassificationFigure(
            **pair, label="ABKD", method="kd", divergence="abkd", alpha=a, beta=0.0, top1=94.0, source="x", epochs=20
        )
        for a in (0.1, 0.2)
    ]
    grid_runs = points((80.0, 95.0), (82.0, 91.5))
    table = make(*grid_runs, published=figures)
    assert [line["published_top1"] for line in lines(table)] == ["94.0", "94.0"]
    assert all("val_fraction" in line["not_comparable"] for line in lines(table))
    table = make(*grid_runs, *again(*grid_runs, tops=(99.0, 99.0, 93.0, 94.0)), published=figures)
    stated = {(line["alpha"], line["variant"][-1]): line["published_top1"] for line in lines(table)}
    assert stated == {("0.1", "2"): "", ("0.1", "0"): "", ("0.2", "2"): "", ("0.2", "0"): "94.0"}
    assert {line["difference_to_published"] for line in lines(table)} == {"", "-0.5"}
    assert "at dataset.val_fraction=0 it has 93.50 ± 0.71 (2), the only figure of its grid" in text(table)


def test_a_row_with_another_recipe_and_no_val_split_is_not_the_choice_trained_again():
    grid_runs = points((80.0, 95.0), (82.0, 91.5))
    others = again(*points((80.0, 95.0), (82.0, 91.5), recipe={"epochs": 2}), tops=(1.0, 1.0, 2.0, 2.0))
    assert "it was not run at dataset.val_fraction=0" in text(make(*grid_runs, *others))


def test_a_key_that_makes_columns_splits_no_row_and_plain_students_stand_where_they_do_not_contradict_it():
    contents = [*seeds("none", None), *seeds(recipe={"epochs": 2}), *seeds(tops=(95.0,))]
    table = make(*contents, column_keys=["recipe.epochs"])
    assert [column.title for column in table.columns] == [
        f"digits: cifar_resnet20 -> cifar_resnet8_width4, recipe.epochs={epochs}" for epochs in (2, 20)
    ]
    plain, kd = grid(table)[1][1:]
    assert (plain[4], plain[7]) == ("-", "91.17 ± 1.26 (3)*")
    assert (kd[4], kd[7]) == ("91.17 ± 1.26 (3)", "95.00 (1 of 3)*")
    table = make(*contents, column_keys=["divergence.temperature"])
    assert len(table.columns) == 1  # plain training has no temperature, and stands beside whatever the others have


def test_a_setting_in_the_csv_is_no_formula_in_a_spreadsheet():
    content = result(recipe={"note": "=1+1"})
    (line,) = lines(make(content, column_keys=["recipe.note", "recipe.epochs"]))
    assert (line["recipe.note"], line["recipe.epochs"]) == ("'=1+1", "20.0")


def test_columns_are_ordered_by_number():
    contents = [*seeds(recipe={"epochs": 100}), *seeds(recipe={"epochs": 20}), *seeds(recipe={"epochs": None})]
    table = make(*contents, column_keys=["recipe.epochs"])
    assert [column.settings[0][1] for column in table.columns] == [20.0, 100.0, None]


def test_a_key_that_makes_rows_is_named_though_no_two_rows_differ_in_it_alone():
    contents = [*seeds("none", None), *seeds(), *seeds("kd", "rkld")]
    table = make(*contents, row_keys=["method", "recipe.epochs", "divergence.temperature"])
    assert [row.variant for row in table.rows] == ["recipe.epochs=20"] + [
        "recipe.epochs=20, divergence.temperature=4"
    ] * 2


@pytest.mark.parametrize(
    ("settings", "problem", "hint"),
    [
        ({"row_keys": ["recipe.epoch"]}, "rows: no run has the key 'recipe.epoch'", "rows=recipe.epochs"),
        ({"column_keys": ["datset"]}, "columns: no run has the key 'datset'", "columns=dataset"),
        ({"column_keys": ["divergence.alpha"]}, "divergence.alpha makes rows and cannot make columns", ""),
        ({"row_keys": ["student"]}, "student makes columns and cannot make rows", ""),
        (
            {"row_keys": ["precision"], "column_keys": ["precision"]},
            "precision makes columns and cannot make rows",
            "",
        ),
    ],
)
def test_a_key_that_no_run_has_or_that_is_elsewhere_is_answered(settings, problem, hint):
    with pytest.raises(ConfigError) as caught:
        make(*seeds(), **settings)
    assert problem in caught.value.problem
    assert hint in caught.value.hint
