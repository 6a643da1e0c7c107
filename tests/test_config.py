"""The schema: what it converts and refuses, what a saved config gives back, and what makes two runs the same."""

import copy
import dataclasses
import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vkd.composition import compose_config
from vkd.config import (
    OPEN_KEYS,
    Config,
    RecipeConfig,
    TrackerConfig,
    as_typed,
    explain_key,
    fingerprint,
    parameters_of,
    parse,
    run_identity,
    typed_parameters,
)
from vkd.data import Normalization
from vkd.errors import ConfigError
from vkd.methods import METHODS
from vkd.training.run import teacher_training_config
from vkd.training.teacher import teacher_identity


@pytest.fixture(scope="module")
def composed():
    """The default config as plain data."""
    return parse(compose_config([])).as_dict()


@pytest.fixture
def changed(composed):
    """A function that gives the default config with values at dotted paths replaced."""

    def change(**values):
        config = copy.deepcopy(composed)
        for path, value in values.items():
            *parents, last = path.split("__")
            node = config
            for parent in parents:
                node = node[parent]
            node[last] = value
        return config

    return change


def identity(*words):
    """The fingerprint of the run that the words ask for, on some data."""
    config = parse(compose_config(words))
    taught_by = None
    if not config.is_plain:
        own = fingerprint(run_identity(teacher_training_config(config), data="pixels", teacher=None))
        given = config.teacher.mean is not None
        values = config.teacher if given else config.dataset
        normalization = Normalization(values.mean, values.std, 1)
        taught_by = teacher_identity(config.teacher.arch, normalization, {"fingerprint": own})
    return fingerprint(run_identity(config, data="pixels", teacher=taught_by))


# Types


def test_every_number_gets_its_declared_type(changed):
    config = parse(changed(divergence={"name": "abkd", "alpha": 1, "beta": "0.5", "temperature": 4}, seed="3"))
    assert config.divergence == {
        "name": "abkd",
        "temperature": 4.0,
        "alpha": 1.0,
        "beta": 0.5,
        "match_kl_scale": False,
    }
    assert all(isinstance(config.divergence[name], float) for name in ("alpha", "beta", "temperature"))
    assert config.seed == 3
    assert isinstance(config.seed, int)
    config = parse(changed(recipe__learning_rate=1, recipe__milestones=["1", 2], method={"kd": {"weight": 1, **KD}}))
    assert isinstance(config.recipe.learning_rate, float)
    assert config.recipe.milestones == [1, 2]
    assert isinstance(config.method["kd"]["weight"], float)


KD = {"temperature_squared": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1.5}, "seed = 1.5 is not what this key takes\n  expected: a whole number"),
        ({"compile": "perhaps"}, 'compile = "perhaps" is not what this key takes\n  expected: true or false'),
        ({"dataset__mean": "x"}, "dataset.mean"),
        ({"dataset__mean": ["x"]}, "dataset.mean"),
        ({"recipe__clip_grad_norm": "x"}, "expected: a number, or null"),
        ({"recipe": 3}, "recipe = 3 is not what this key takes\n  expected: a group of keys: epochs"),
        ({"recipe__epochs": "???"}, "recipe.epochs has no value\n  try: recipe.epochs=..."),
        ({"recipe__epoch": 1}, "there is no key recipe.epoch"),
        ({"divergence": {"temperature": 4}}, "divergence.name has no value"),
        ({"divergence": {"name": "abkd", "alpha": 1}}, "divergence.beta has no value\n  try: divergence.beta=..."),
        ({"divergence": {"name": "abkd", "alpha": [1], "beta": 1}}, "divergence.alpha"),
        ({"divergence": {"name": "nokl"}}, "there is no divergence 'nokl'"),
        ({"divergence": {"name": "skew_fkld", "skew": 1.5}}, "skew"),
        ({"divergence": None}, "divergence.name has no value"),
        ({"method": {"kdd": {}}}, "there is no method 'kdd'"),
        ({"method": {"kd": {"weight": 1}}}, "method.kd.temperature_squared has no value"),
        ({"method": {"kd": None}}, "method.kd.weight has no value"),
        ({"method": {"kd": {"weight": math.nan, **KD}}}, "method.kd.weight = nan is not a finite number"),
        ({"teacher": None}, "teacher is null"),
        ({"study": ".hidden"}, "cannot name a folder"),
        ({"study": "-m"}, "cannot name a folder"),
        ({"study": "a b"}, "cannot name a folder"),
        ({"dataset__name": "../x"}, "dataset.name"),
        ({"recipe__milestones": [3, 2]}, "recipe.milestones = [3, 2]\n  expected: rising epochs from 1"),
        ({"recipe__scheduler": "multistep"}, "recipe.scheduler=multistep needs milestones"),
        ({"recipe__label_smoothing": 1.0}, "recipe.label_smoothing = 1.0"),
        ({"recipe__ema_decay": 1.0}, "recipe.ema_decay = 1.0"),
        ({"recipe__clip_grad_norm": 0.0}, "recipe.clip_grad_norm = 0.0"),
        ({"teacher__recipe__epochs": 0}, "teacher.recipe.epochs = 0"),
        ({"workers": -1}, "workers = -1 is negative"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size is too small"),
        ({"tracker__name": "wandbb"}, "tracker.name=wandbb is not a choice"),
    ],
)
def test_an_impossible_config_is_one_message(changed, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(changed(**change))


def test_plain_training_takes_no_teacher_and_no_divergence_and_the_labels_in_full(changed):
    config = parse(changed(method={}, cross_entropy_weight=0.1))
    assert config.is_plain
    assert (config.teacher, config.divergence, config.cross_entropy_weight) == (None, {}, 1.0)


def test_the_parameters_of_a_function_are_typed_by_its_signature():
    def function(first, *, rate: float, steps: int = 3, scales: tuple[float, float] | None = None):
        pass

    assert list(parameters_of(function)) == ["rate", "steps", "scales"]
    assert parameters_of(function)["rate"] == (float, dataclasses.MISSING)
    assert parameters_of(function)["steps"] == (int, 3)
    typed = typed_parameters(function, {"rate": 1}, where="here", leave_out=("scales",))
    assert typed == {"rate": 1.0, "steps": 3}
    with pytest.raises(ConfigError, match=r"there is no key here\.stesp") as caught:
        typed_parameters(function, {"rate": 1, "stesp": 1}, where="here", leave_out=("scales",))
    assert "try: here.steps" in str(caught.value)


@pytest.mark.parametrize("recipe", [{"epochs": 1}, {}])
def test_a_missing_value_is_named_with_its_place(recipe):
    with pytest.raises(ConfigError, match=r"there\.(epochs|batch_size) has no value"):
        as_typed(RecipeConfig, recipe, where="there")


# What a saved config gives back


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["method=none"],
        ["divergence=abkd", "divergence.alpha=1", "seed=7", "study=mine"],
        ["dataset=cifar100", "divergence=skew_rkld", "teacher.checkpoint=a.pth", "precision=bf16"],
        ["dataset=imagefolder", "dataset.root=here", "recipe.optimizer_options={nesterov:true}", "tracker=wandb"],
    ],
)
def test_a_saved_config_parses_to_itself(words):
    config = parse(compose_config(words))
    saved = yaml.safe_load(yaml.safe_dump(config.as_dict(), sort_keys=False))
    assert parse(saved) == config
    assert parse(saved).as_dict() == config.as_dict()


# The fingerprint

PLAIN_DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value, draw):
    """The same data with the keys of every mapping in another order."""
    if isinstance(value, dict):
        keys = draw(st.permutations(sorted(value)))
        return {key: shuffled(value[key], draw) for key in keys}
    return [shuffled(entry, draw) for entry in value] if isinstance(value, list) else value


def as_floats(value):
    """The same data with every whole number as a float."""
    if isinstance(value, dict):
        return {key: as_floats(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_floats(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@given(st.dictionaries(st.text(max_size=4), PLAIN_DATA, max_size=4), st.data())
def test_neither_the_order_of_keys_nor_the_form_of_a_number_changes_the_fingerprint(value, data):
    assert fingerprint(shuffled(value, data.draw)) == fingerprint(value)
    assert fingerprint(as_floats(value)) == fingerprint(value)


@given(PLAIN_DATA, PLAIN_DATA)
def test_fingerprints_are_equal_for_equal_content_alone(one, other):
    def shape(value):
        """Equal for what counts as equal; true is not 1."""
        if isinstance(value, dict):
            return ("dict", tuple((key, shape(value[key])) for key in sorted(value)))
        if isinstance(value, list):
            return ("list", tuple(shape(entry) for entry in value))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return ("number", repr(float(value)))
        return (type(value).__name__, value)

    equal = shape(one) == shape(other)
    assert (fingerprint({"value": one}) == fingerprint({"value": other})) == equal


def test_a_fingerprint_is_sha256_in_hex_and_does_not_change_from_version_to_version():
    # Of {"a": [true, null, "x"], "b": 1.0}. Another value here makes every finished run one that is not found again.
    expected = "4a1f7a3df5a04ab29cb6e8f59123a76811d81b0f23e5b6767726ec0755ef084c"
    assert fingerprint({"b": 1, "a": [True, None, "x"]}) == expected


@pytest.fixture(scope="module")
def reference():
    """The fingerprint of the default run."""
    return identity()


@pytest.mark.parametrize(
    "words",
    [
        "device=cuda:3",
        "study=other",
        "runs_root=a results_root=b data_root=c dataset.root=d",
        "tracker=none",
        "tracker=wandb tracker.project=p tracker.entity=e tracker.tags=[t]",
        "workers=7 evaluation_batch_size=9 compile=true channels_last=true keep_checkpoint=false",
        "fused_optimizer=false graphs=false students_at_once=2 keep_freed_memory=false snapshot_every=3",
        "teacher.fold=false teacher.compile=true teacher.cache=views teacher.cache_dtype=float32",
        "teacher.allow_chance_accuracy=true",
        "dataset.view_augmentation.flip={}",
        "seed=1 divergence.temperature=4 recipe.learning_rate=5e-2 method.kd.weight=0.90",
        "recipe=quick dataset=digits divergence=fkld method=[kd]",
    ],
)
def test_what_decides_no_number_is_not_in_the_fingerprint(reference, words):
    assert identity(*words.split()) == reference


@pytest.mark.parametrize(
    "words",
    [
        "seed=2",
        "student.arch=cifar_resnet8",
        "method=none",
        "method.kd.weight=0.8",
        "method.kd.temperature_squared=false",
        "divergence=rkld",
        "divergence.temperature=2",
        "cross_entropy_weight=0.2",
        "precision=bf16",
        "dataset.val_fraction=0.1",
        "dataset.split_seed=1",
        "dataset.mean=[0.3]",
        "dataset.augmentation.flip={}",
        "teacher.arch=cifar_resnet32",
        "teacher.seed=1",
        "teacher.recipe.epochs=31",
        "teacher.mean=[0.5] teacher.std=[0.5] teacher.checkpoint=x.pth",
    ],
)
def test_what_decides_a_number_is_in_the_fingerprint(reference, words):
    assert identity(*words.split()) != reference


@pytest.mark.parametrize("name", [entry.name for entry in dataclasses.fields(RecipeConfig)])
def test_every_key_of_the_recipe_is_in_the_fingerprint(composed, name):
    config = parse(composed)
    other = copy.deepcopy(config)
    value = getattr(config.recipe, name)
    changes = {bool: lambda: not value, dict: lambda: {"x": 1}, list: lambda: [1], str: lambda: value + "x"}
    setattr(other.recipe, name, changes.get(type(value), lambda: (value or 0) + 1)())
    one, two = (fingerprint(run_identity(entry, data="d", teacher=None)) for entry in (config, other))
    assert one != two


@pytest.mark.parametrize(
    "change", [{"data": "other"}, {"teacher": {"sha256": "other"}}, {"teacher": None}, {"world_size": 2}]
)
def test_content_of_the_data_weights_of_the_teacher_and_the_world_size_count(composed, change):
    config, usual = parse(composed), {"data": "pixels", "teacher": {"sha256": "weights"}, "world_size": 1}
    assert fingerprint(run_identity(config, **usual)) != fingerprint(run_identity(config, **{**usual, **change}))


def test_equal_points_of_a_sweep_have_equal_fingerprints_whatever_is_written():
    point = ["divergence=abkd", "divergence.beta=0"]
    assert identity(*point, "divergence.alpha=1") == identity(*point, "divergence.alpha=1.0")
    assert identity("method=none", "divergence=abkd", "divergence.alpha=3") == identity("method=none")
    assert identity("method=none", "cross_entropy_weight=0.3", "teacher.seed=9") == identity("method=none")


# Explanations


def test_every_key_is_known_to_the_one_who_explains_keys():
    def paths(schema, prefix=""):
        for entry in dataclasses.fields(schema):
            yield prefix + entry.name

    for key in [*paths(Config), *paths(RecipeConfig, "teacher.recipe."), *paths(TrackerConfig, "tracker.")]:
        assert "there is no key" not in str(explain_key(key))
        misspelt = explain_key(key + "x")
        assert f"there is no key {key}x" in str(misspelt)
        assert f"{key}=..." in misspelt.hint
    assert OPEN_KEYS[0] == "divergence"


@pytest.mark.parametrize(
    ("method", "weight"),
    [("kd", 0.1), ("lsd", 0.1), ("ctkd", 0.1), ("mlkd", 0.1), ("dkd", 1), ("at", 1), ("[kd,at]", 1), ("[kd,lsd]", 0.1)],
)
def test_the_cross_entropy_has_the_weight_that_the_literature_gives_it_beside_the_method(method, weight):
    assert parse(compose_config([f"method={method}"])).cross_entropy_weight == weight
    assert parse(compose_config([f"method={method}", "cross_entropy_weight=0.4"])).cross_entropy_weight == 0.4


@pytest.mark.parametrize(
    "word", ["method.at.weight=-3", "method.dkd.warmup_epochs=-3", "method.dkd.nontarget_weight=-0.5"]
)
def test_a_negative_weight_or_warm_up_of_a_method_is_refused(word):
    key, _, value = word.partition("=")
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} = {value}(\.0)? is negative"):
        parse(compose_config([f"method={key.split('.')[1]}", word]))


@pytest.fixture
def two_views(monkeypatch):
    """Knowledge distillation as a method that wants two views of each image."""
    monkeypatch.setattr(METHODS["kd"], "views", 2)


def test_the_augmentation_of_further_views_is_not_in_the_fingerprint_where_no_method_wants_them():
    for words in (["dataset=cifar100"], ["dataset=cifar100", "method=none"]):
        config = parse(compose_config(words))
        assert config.dataset.view_augmentation
        known = run_identity(config, data="x", teacher=None)
        config.dataset.view_augmentation = {}
        assert run_identity(config, data="x", teacher=None) == known
        assert "view_augmentation" not in known["dataset"]


def test_a_share_of_the_training_images_is_in_the_fingerprint_and_all_of_them_is_not():
    def known(*words):
        return run_identity(parse(compose_config(list(words))), data="x", teacher=None)["dataset"]

    assert "train_fraction" not in known()
    assert known("dataset.train_fraction=1.0") == known()
    assert known("dataset.train_fraction=0.5")["train_fraction"] == 0.5


def test_it_is_in_the_fingerprint_with_its_order_where_a_method_wants_them(two_views):
    crop, flip = ("crop", {"padding": 4}), ("flip", {})
    config = parse(compose_config(["dataset=cifar100"]))
    identities = []
    for augmentation in (dict([crop, flip]), dict([flip, crop]), dict([crop, flip]), dict([crop])):
        config.dataset.view_augmentation = augmentation
        identities.append(fingerprint(run_identity(config, data="x", teacher=None)))
    assert identities[0] == identities[2]
    assert len(set(identities)) == 3
    plain = teacher_training_config(config)
    assert "view_augmentation" not in run_identity(plain, data="x", teacher=None)["dataset"]


@pytest.mark.parametrize("empty", [{}, {"flip": None}, {"flip": False, "crop": None}])
def test_a_method_of_several_views_needs_an_augmentation_that_makes_them(changed, two_views, empty):
    with pytest.raises(ConfigError, match=r"method=kd learns from 2 views .* dataset\.view_augmentation") as caught:
        parse(changed(dataset__view_augmentation=empty))
    assert parse(changed(dataset__view_augmentation={"flip": {}})).dataset.view_augmentation == {"flip": {}}
    hinted = parse(compose_config([caught.value.hint])).dataset.view_augmentation
    assert hinted["auto_augment"] == {"policy": "cifar10"}
    assert parse(changed(dataset__view_augmentation=empty, method={})).is_plain


def test_the_order_of_augmentations_decides_the_pixels_and_so_the_fingerprint():
    crop, flip = ("crop", {"padding": 4}), ("flip", {})
    config = parse(compose_config(["dataset=cifar100"]))
    identities = []
    for augmentation in (dict([crop, flip]), dict([flip, crop]), dict([crop, flip])):
        config.dataset.augmentation = augmentation
        identities.append(fingerprint(run_identity(config, data="x", teacher=None)))
    assert identities[0] == identities[2] != identities[1]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["teacher.mean=[0.9]", "teacher.std=[0.1]"], "vkd trains this teacher"),
        (["teacher.recipe.scheduler=plateau", "dataset.val_fraction=0"], "teacher.recipe.scheduler=plateau"),
        (["study=teachers"], "study=teachers is the folder of the teachers"),
    ],
)
def test_what_would_spoil_a_trained_teacher_is_refused(words, fragment):
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        parse(compose_config(words))


@pytest.mark.parametrize("method", ["at", "mlkd", "[kd,crd]"])
def test_a_cache_of_views_is_refused_for_methods_that_want_more_than_the_logits_of_one_view(method):
    with pytest.raises(ConfigError, match=r"teacher\.cache=views") as error:
        identity(f"method={method}", "teacher.cache=views")
    assert "teacher.cache=none" in str(error.value)
