"""The check for a GPU, on the small model: all that it does but the comparison of memory."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.slow
def test_both_stages_train_and_merge(tmp_path):
    out = tmp_path / "figures.json"
    script = REPOSITORY / "benchmarks" / "gpu_check.py"

    subprocess.run([sys.executable, script, "--size", "small", "--steps", "6", "--out", out], check=True, timeout=600)

    figures = json.loads(out.read_text())["results"]
    assert figures["certificate"]["passed"]
    assert all(stage["proof"]["passed"] and stage["estimated_peak"] > 0 for stage in figures["stages"].values())
