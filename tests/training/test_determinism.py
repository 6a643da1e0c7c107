"""`deterministic=true`: the same bits each time, and torch as it was before afterwards."""

import dataclasses
import logging
import os
import re
import warnings

import pytest
import torch
from commands import PAIR, TINY, only_run, untimed, weights
from rich.console import Console

from vkd.composition import compose_config
from vkd.config import parse
from vkd.errors import ConfigError
from vkd.training import environment as facts
from vkd.training.determinism import CUBLAS_WORKSPACE, determinism
from vkd.training.environment import environment
from vkd.training.run import run

QUIET = Console(quiet=True)


def config(*words, deterministic=True):
    return parse(compose_config([*TINY, f"deterministic={str(deterministic).lower()}", *words]))


def state():
    """Everything process-wide that could slow the next run, or hide its warnings."""
    backends = torch.backends
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": backends.cudnn.benchmark,
        "tf32": (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "attention": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.cudnn_sdp_enabled(),
        ),
        "workspace": os.environ.get(CUBLAS_WORKSPACE),
        "filters": list(warnings.filters),
        "show": warnings.showwarning,
    }


@pytest.fixture(params=[False, True], ids=["fast", "chosen"])
def before(request, monkeypatch):
    """The state before a run: torch's defaults, or one in which somebody has chosen otherwise."""
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    if request.param:
        monkeypatch.setenv(CUBLAS_WORKSPACE, ":0:0")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        torch.use_deterministic_algorithms(True)
    yield state()
    torch.use_deterministic_algorithms(False)


def put(values):
    """An operation that torch has no deterministic form of, on a CPU either."""
    return torch.zeros(4).put_(torch.tensor([0, 1]), torch.tensor(values))


def test_within_it_torch_takes_deterministic_algorithms_and_nothing_else_changes(before):
    with determinism(config()):
        within = state()
    expected = {"deterministic": True, "warn_only": True, "fill": False, "benchmark": False, "workspace": ":4096:8"}
    assert within == {**before, **expected, "filters": within["filters"], "show": within["show"]}


def test_afterwards_everything_is_as_it_was(before):
    with determinism(config()):
        pass
    assert state() == before


def test_after_an_error_everything_is_as_it_was_too(before):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), determinism(config()):
            raise error
        assert state() == before


def test_a_run_that_does_not_ask_for_it_changes_nothing(before):
    with determinism(config(deterministic=False)) as found:
        assert state() == before
    assert found.as_record() == {"asked": False, "exceptions": []}


def test_a_workspace_that_repeats_itself_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    with determinism(config()):
        assert os.environ[CUBLAS_WORKSPACE] == ":16:8"
    assert os.environ[CUBLAS_WORKSPACE] == ":16:8"


def test_attention_on_cuda_is_computed_the_plain_way_for_as_long_as_the_run_lasts(monkeypatch):
    monkeypatch.setattr("vkd.training.determinism.choose_device", lambda name: torch.device("cuda"))
    before = state()
    assert before["attention"] == (True, True, True)
    with determinism(config()):
        assert state()["attention"] == (False, False, False)
        assert torch.backends.cuda.math_sdp_enabled()
    assert state() == before


def test_an_operation_without_a_deterministic_form_is_said_once_and_recorded(caplog):
    with caplog.at_level(logging.INFO, logger="vkd"), warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with determinism(config()) as found:
            for _ in range(3):
                assert put([1.0, 2.0]).tolist() == [1, 2, 0, 0]
    assert caplog.messages == ["not deterministic: put_"]
    assert found.as_record() == {"asked": True, "exceptions": ["put_"]}
    assert shown == []


@pytest.mark.parametrize("wish", ["ignore", "error", "once"])
def test_an_operation_is_noted_whatever_python_was_told_to_do_with_warnings(wish):
    with warnings.catch_warnings():
        warnings.simplefilter(wish)
        with determinism(config()) as found:
            put([1.0, 2.0])
    assert found.exceptions == ["put_"]


def test_each_run_is_told_of_an_operation_though_python_warns_once_a_line(caplog):
    records = []
    for _ in range(2):
        with determinism(config()) as found:
            put([3.0, 4.0])
        records.append(found.as_record()["exceptions"])
    assert records == [["put_"], ["put_"]]


def test_within_a_run_that_trains_its_teacher_each_has_its_own_exceptions():
    with determinism(config()) as student:
        with determinism(config()) as teacher:
            put([1.0, 1.0])
        assert (student.exceptions, teacher.exceptions) == ([], ["put_"])
        put([2.0, 2.0])
    assert student.exceptions == ["put_"]


class Doubled(torch.autograd.Function):
    """2 x, whose backward pass warns as one of torch's on CUDA does."""

    @staticmethod
    def forward(ctx, values):
        return 2 * values

    @staticmethod
    def backward(ctx, gradient):
        warnings.warn(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True, warn_only=True)'. You can file an issue at ...",
            stacklevel=1,
        )
        return 2 * gradient


def test_operations_of_the_backward_pass_are_reported_too():
    with determinism(config()) as found:
        Doubled.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert found.exceptions == ["adaptive_avg_pool2d_backward_cuda"]


@pytest.mark.parametrize(
    ("words", "operation"),
    [
        ("Flash Attention defaults to a non-deterministic algorithm. To explicitly enable ...", "Flash Attention"),
        (
            "Deterministic behavior was enabled with `torch.use_deterministic_algorithms(True)` or ..., but this "
            "operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable ...",
            "cuBLAS, which was in use before CUBLAS_WORKSPACE_CONFIG was set",
        ),
    ],
)
def test_what_torch_says_in_other_words_is_understood(words, operation):
    with determinism(config()) as found:
        warnings.warn(words, stacklevel=1)
    assert found.exceptions == [operation]


def test_other_warnings_are_shown_as_ever():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with determinism(config()) as found:
            warnings.warn("the rate never drops", stacklevel=1)
    assert [str(entry.message) for entry in shown] == ["the rate never drops"]
    assert found.exceptions == []


def test_a_device_that_is_not_there_is_refused_before_anything_is_switched():
    before = state()
    with (
        pytest.raises(ConfigError, match="device=cuda:99"),
        determinism(dataclasses.replace(config(), device="cuda:99")),
    ):
        pass
    assert state() == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_give_equal_bits(deterministic, tmp_path):
    found = []
    for root in ("first", "second"):
        own = config(f"runs_root={tmp_path / root}", "method=[kd,sp]", deterministic=deterministic)
        with determinism(own):
            run(own, console=QUIET)
        directory = only_run(tmp_path / root / PAIR)
        found.append((weights(directory), untimed(directory)))
    assert found[0] == found[1]


# The record of what a run depends on


def test_the_record_names_versions_machine_and_commit(monkeypatch):
    record = environment(torch.device("cpu"))
    versions = ("torch", "torchvision", "timm", "numpy", "hydra", "omegaconf", "wandb", "safetensors", "python")
    for name in versions:
        assert re.match(r"\d+\.\d+", record[name]), name
    assert record["cpu"]["count"] == os.cpu_count()
    assert record["cpu"]["threads"] == torch.get_num_threads()
    assert record["cpu"]["name"]
    assert record["host"] == os.uname().nodename
    assert record["platform"].startswith(os.uname().sysname)
    assert record["gpu"] is None
    assert record["git"] is None or re.fullmatch(r"[0-9a-f]{12,}\+?", record["git"])
    assert record["command"].startswith("python -m vkd.train")


def test_the_record_holds_no_secret_of_the_environment(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"secret-of-{name}")
    assert "secret-of" not in repr(environment(torch.device("cpu")))


def test_a_gpu_is_recorded_with_its_driver_and_the_devices_that_the_process_sees(monkeypatch, tmp_path):
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0)\n"
    )
    real = facts.Path
    monkeypatch.setattr(facts, "Path", lambda path: version if path == "/proc/driver/nvidia/version" else real(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    facts._driver_version.cache_clear()
    try:
        gpu = environment(torch.device("cuda", 0))["gpu"]
    finally:
        facts._driver_version.cache_clear()
    assert gpu == {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": [9, 0],
        "driver": "570.86.15",
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": 91002,
        "count": 2,
        "visible": "2,3",
    }


def test_without_a_driver_there_is_no_version_of_one(monkeypatch, tmp_path):
    real = facts.Path
    monkeypatch.setattr(facts, "Path", lambda path: tmp_path / "none" if "nvidia" in str(path) else real(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts._driver_version.__wrapped__() is None
