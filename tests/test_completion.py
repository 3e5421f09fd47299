"""Completion in a shell, as the script of `--show-completion` asks for it: quickly, without a model library."""

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "numpy"}
# What the console script does, and then which heavy libraries that has loaded.
PROGRAM = f"""
import atexit, sys
atexit.register(lambda: print("HEAVY", sorted(set(sys.modules) & {HEAVY!r}), file=sys.stderr))
sys.argv = ["dentalgemma"]
from dentalgemma.cli import main
main()
"""


def ask(line, *, shell="bash", instruction="complete", **variables):
    """What a shell would be told where the cursor stands at the end of `line`."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **asked, "_DENTALGEMMA_COMPLETE": f"{instruction}_{shell}", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "HEAVY []" in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        pytest.param("dentalgemma buil", {"build", "build-instruct", "build-probe"}, id="commands"),
        pytest.param("dentalgemma build --st", {"--strict"}, id="options"),
        pytest.param("dentalgemma evaluate --mode ", {"generate", "loglikelihood"}, id="values"),
        # Nothing of its own: `complete -o default` then offers the files, as bash does.
        pytest.param("dentalgemma audit sour", set(), id="paths"),
    ],
)
def test_bash_completes(line, offered):
    assert set(ask(line).split()) == offered


@pytest.mark.parametrize(
    ("shell", "line", "offered"),
    [
        pytest.param("zsh", "dentalgemma evaluate --mode ", "loglikelihood", id="zsh: values"),
        pytest.param("zsh", "dentalgemma audit sour", "_files", id="zsh: paths"),
        pytest.param("fish", "dentalgemma evaluate --mode ", "loglikelihood", id="fish: values"),
    ],
)
def test_other_shells_complete(shell, line, offered):
    assert offered in ask(line, shell=shell)


@pytest.mark.parametrize(
    ("shell", "hooked"),
    [
        pytest.param("bash", "complete -o default -F _dentalgemma_completion dentalgemma", id="bash"),
        pytest.param("zsh", "compdef _dentalgemma_completion dentalgemma", id="zsh"),
        pytest.param("fish", "complete --command dentalgemma", id="fish"),
    ],
)
def test_every_shell_gets_its_script(shell, hooked):
    assert hooked in ask("", shell=shell, instruction="source")
