"""`dentalgemma env`: what a bug report needs, and nothing that belongs to somebody."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

CANARY = "hf_CanaryOfTheEnvironment0123456789"
CANARIES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "USER", "LOGNAME", "HOSTNAME", "SECRET", "PS1")


def env(*options, **variables):
    """Output and errors of the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dentalgemma", "env", *options],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a login and an `accelerate config`, whose very name is a canary."""
    folder = tmp_path_factory.mktemp("canaryhome")
    (folder / "accelerate").mkdir()
    (folder / "token").write_text(CANARY)
    (folder / "accelerate" / "default_config.yaml").write_text(f"# {CANARY}\n")
    return folder


def test_it_tells_versions_hardware_and_settings_without_secrets_paths_or_names(home):
    variables = dict.fromkeys(CANARIES, CANARY) | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    shown, errors = env("--json", **variables)
    facts = json.loads(shown)

    assert facts["torch"] == version("torch")
    assert facts["transformers"] == version("transformers")
    assert facts["ultralytics"] == "not installed" or facts["ultralytics"] == version("ultralytics")
    assert (facts["hub_token"], facts["accelerate_config"]) == ("yes", "yes")
    assert "HF_HUB_OFFLINE" in facts["offline"]
    assert set(facts) >= {"dentalgemma", "python", "system", "cpus", "memory", "device", "torch_build", "bf16"}
    assert CANARY.lower() not in (shown + errors).lower()
    assert "canaryhome" not in shown + errors
    assert os.uname().nodename not in shown
    assert not any("/" in value for value in facts.values())


def test_a_broken_torch_is_told_and_stops_nothing(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('/home/somebody/libcudart.so: cannot open')")
    variables = {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "none")}
    variables |= dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), "")
    shown, errors = env(**variables)

    assert "torch_build: does not load: OSError" in shown
    assert "hub_token: no" in shown
    assert "accelerate_config: no" in shown
    assert "somebody" not in shown + errors
