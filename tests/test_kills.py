"""A fused sweep that is killed at random moments ends with the bits of the one that nobody touched.

The script that kills two hundred times is `experiments/trust/kills.py`; here it kills five times.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import vkd

REPOSITORY = Path(vkd.__file__).parents[1]
SCRIPT = REPOSITORY / "experiments" / "trust" / "kills.py"


def test_after_five_kills_every_student_of_a_fused_sweep_is_what_it_would_have_been(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = ["kills=5", "variants=1", f"output={tmp_path / 'kills.json'}"]
    # A process of its own: it forks, which threads of the tests would not survive.
    code = os.spawnve(os.P_WAIT, sys.executable, [sys.executable, str(SCRIPT), *words], environment)
    report = json.loads((tmp_path / "kills.json").read_text())
    assert code == 0
    assert report["kills"] == 5
    assert report["students_equal"] == report["students_compared"] >= 6
    assert report["failures_said"] == 0
    assert report["resumed_within_an_epoch"] > 0


def test_the_committed_report_is_of_two_hundred_kills_and_no_student_is_another(tmp_path):
    report = json.loads((REPOSITORY / "results" / "trust" / "kills.json").read_text())
    assert report["kills"] >= 200
    assert sum(sweep["kills"] for sweep in report["sweeps"]) == report["kills"]
    assert report["students_equal"] == report["students_compared"] == 6 * len(report["sweeps"])
    assert all(sweep["equal"] == 6 for sweep in report["sweeps"])


def test_a_student_that_is_another_is_noticed(tmp_path):
    specification = importlib.util.spec_from_file_location("kills", SCRIPT)
    kills = importlib.util.module_from_spec(specification)
    sys.modules["kills"] = kills
    specification.loader.exec_module(kills)
    import torch
    from safetensors.torch import save_file

    run = tmp_path / "runs" / "digits" / "pair" / "kd-fkld-s1-00000000"
    run.mkdir(parents=True)
    weights = {"weight": torch.arange(4.0)}

    def write(epoch: float, seconds: float) -> dict[str, str]:
        save_file(weights, run / "student.safetensors")
        (run / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "loss": epoch, "seconds": seconds}) + "\n")
        (run / "result.json").write_text(json.dumps({"metrics": {}, "timing": {"seconds": seconds}}))
        return kills._students(tmp_path)

    before = write(1.5, 2.0)
    assert write(1.5, 3.0) == before
    assert write(1.25, 2.0) != before
    weights["weight"][3] = torch.nextafter(weights["weight"][3], torch.tensor(9.0))
    assert write(1.5, 2.0) != before
