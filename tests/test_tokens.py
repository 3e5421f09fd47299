"""A token typed into a settings file by mistake is refused where it stands, and nothing shows or keeps it."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_builders.records import InputError
from data_builders.secrets import find_secret
from data_builders.sources import SourcesError, load_sources, load_vocabulary
from dentalgemma.evaluation.plan import PlanError, load_plan
from dentalgemma.training.config import read_stage

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "stage1_vqa.yaml"
TOKENS = {
    "the Hub": "hf_" + "Quetzal0Ximena7Xolotl".ljust(34, "q"),
    "a user's key of GitHub": "ghp_" + "Quetzal0Ximena7" * 3,
    "an API": "sk-proj-Quetzal0Ximena7-Xolotl_19612",
}
CANARY = TOKENS["the Hub"]


def shows(text: str, token: str = CANARY) -> bool:
    """Whether a text has any part of a token that would tell something of it."""
    return any(token[place : place + 8] in text for place in range(4, len(token) - 8))


def test_a_part_of_a_token_would_be_seen():
    assert shows(f"bad value {CANARY[:14]}…")
    assert not shows("this looks like a token")


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(
    ("read", "text"),
    [
        pytest.param(load_sources, 'sources:\n- {name: s, url: "https://x.org/?t=TOKEN"}\n', id="URL"),
        pytest.param(load_sources, "sources:\n- {name: TOKEN, reader: yolo}\n", id="name"),
        pytest.param(load_sources, "sources:\n- {TOKEN: 1}\n", id="key"),
        pytest.param(load_sources, "a: 1\n# export HF_TOKEN=TOKEN\n", id="comment"),
        pytest.param(load_sources, "a: 1\nb: [TOKEN\n", id="YAML that is broken there"),
        pytest.param(load_sources, "a: 1\nb: *TOKEN\n", id="name that YAML does not know"),
        pytest.param(load_vocabulary, "caries:\n  icd10cm: TOKEN\n", id="vocabulary"),
        pytest.param(load_plan, "title: a\ncandidates: [TOKEN, b]\n", id="plan"),
        pytest.param(lambda path: read_stage(path, []), "stage: a\nrun_name: TOKEN\n", id="recipe"),
        pytest.param(lambda path: read_stage(path, []), "stage: a\nhub_token: TOKEN\n", id="TRL's own option"),
        pytest.param(lambda path: read_stage(path, []), "a: 1\nb: [TOKEN\n", id="broken recipe"),
    ],
)
def test_a_token_in_a_settings_file_is_refused_by_its_line_alone(tmp_path, read, text, token):
    path = tmp_path / "settings.yaml"
    path.write_text(text.replace("TOKEN", token))

    with pytest.raises(InputError, match=r"settings\.yaml:2: this looks like a token or a key; take it out") as caught:
        read(path)
    assert caught.type in (SourcesError, PlanError, InputError)
    assert not shows(str(caught.value), token)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--run_name", CANARY], " after --run_name"),
        ([f"--run_name={CANARY}"], " after --run_name"),
        (["--run_name", "x", CANARY], ""),
        ([f"--{CANARY}"], ""),
        (["--config", str(RECIPE), "--dataset_name", f"https://x.org/{CANARY}"], " after --dataset_name"),
    ],
)
def test_a_token_on_a_recipes_command_line_is_refused_by_its_option(options, where, capsys):
    with pytest.raises(InputError) as caught:
        read_stage(RECIPE, options)

    assert str(caught.value).startswith(f"the command line holds what looks like a token or a key{where}; take it out")
    assert not shows(str(caught.value) + "".join(capsys.readouterr()))


@pytest.mark.parametrize("word", ["hf_hub", "hf_token", "task-2024-panoramic-views-of-teeth", "gemma", "sk-learn"])
def test_words_that_are_no_tokens_are_taken(word):
    assert find_secret(word.encode()) is None


def test_a_build_and_an_audit_leave_no_trace_of_a_token(phantoms, tmp_path):
    """The commands themselves, in a process: what they print, and every file that they leave."""
    text = (phantoms / "sources_yolo.yaml").read_text()
    sources = tmp_path / "sources.yaml"
    sources.write_text(text.replace("license:", f"url: https://x.org/?t={CANARY}\n    license:", 1))
    assert CANARY in sources.read_text()
    script = (
        "import sys; from dentalgemma.cli import main\n"
        f"for line in (['build', {str(sources)!r}, '--out', {str(tmp_path / 'vqa')!r}], ['audit', {str(sources)!r}]):\n"
        "    sys.argv = ['dentalgemma', *line]\n"
        "    try: main()\n"
        "    except SystemExit as stop: print('ended with', stop.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)

    assert done.stdout.splitlines() == ["ended with 2", "ended with 2"], done.stderr
    assert done.stderr.count("this looks like a token or a key") == 2
    assert not shows(done.stdout + done.stderr)
    assert [path.name for path in tmp_path.rglob("*")] == ["sources.yaml"]
    load_sources(phantoms / "sources_yolo.yaml")  # without the token it is a good one
