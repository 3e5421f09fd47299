"""The quickstart: the whole path in small, its verdicts, and that its controls can fail."""

import json
import re

import pytest
from datasets import Image, List, load_dataset, load_from_disk

from data_builders.records import InputError
from dentalgemma import quickstart
from dentalgemma.models.rehearsal import teach_tower
from dentalgemma.models.tiny import make_tiny_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quickstart of a few steps, whose model learns next to nothing."""
    patch = pytest.MonkeyPatch()
    few = {"--max_steps": 4, "--eval_steps": 2, "--save_steps": 2, "--per_device_train_batch_size": 4}
    patch.setattr(quickstart, "IMAGES", 60)
    patch.setattr(quickstart, "CASES", 60)
    patch.setattr(quickstart, "STAGE1", quickstart.STAGE1 | few)
    patch.setattr(quickstart, "STAGE2", quickstart.STAGE2 | few)
    patch.setattr(quickstart, "TOWER", {"phantoms": 64, "steps": 5})
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    page = quickstart.run_quickstart(folder, seed=2)
    patch.undo()
    return folder, page.read_text(encoding="utf-8"), json.loads((folder / "quickstart.json").read_text())


def test_every_step_leaves_what_the_next_one_needs(finished):
    folder, _, summary = finished

    for name in ("audit.json", "data/vqa/README.md", "data/instruct/README.md", "runs/stage1_vqa/run_facts.json",
                 "models/dentalgemma/merge_certificate.json", "models/dentalgemma/README.md",
                 "evaluation/probe.jsonl", "evaluation/tuned_other.jsonl", "evaluation/report.html"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert summary["finished"]
    assert len(summary["verdicts"]) == 4
    assert set(summary["scores"]) == {"base", "tuned", "tuned_blank", "tuned_other", "stage1"}


def test_a_model_that_learned_nothing_is_not_said_to_have_learned(finished):
    _, page, summary = finished
    beats = "the tuned model beats the base (exact McNemar p < 0.001)"

    assert summary["scores"]["tuned"]["closed"]["n"] <= 10  # so few that luck alone cannot reach that p
    assert not summary["verdicts"][beats]
    assert 'class="no">the tuned model beats the base' in page


def test_the_page_is_self_contained(finished):
    _, page, summary = finished

    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<dt>After stage 1</dt>") == min(10, page.count("<dt>Annotated</dt>"))
    assert f"{100 * summary['scores']['base']['closed']['accuracy']:.1f} %" in page


def test_the_card_tells_both_stages(finished):
    folder, _, _ = finished
    card = (folder / "models" / "dentalgemma" / "README.md").read_text(encoding="utf-8")

    assert "adapted to dentistry in 2 stages" in card
    assert "exact McNemar p" in card
    assert str(folder) not in card


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")

    with pytest.raises(InputError, match="not empty"):
        quickstart.run_quickstart(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_the_control_shows_other_images_and_changes_nothing_else(vqa_dataset, tmp_path):
    quickstart.shuffle_images(vqa_dataset, tmp_path / "shuffled", seed=0)
    before, after = load_dataset(str(vqa_dataset)), load_from_disk(str(tmp_path / "shuffled"))

    for column in ("row_id", "prompt", "completion", "claims"):
        assert before["train"][column] == after["train"][column]
    assert before["test"]["row_id"] == after["test"]["row_id"]
    undecoded = [dataset["train"].cast_column("images", List(Image(decode=False))) for dataset in (before, after)]
    pictures = [[row["images"][0]["bytes"] for row in rows] for rows in undecoded]
    assert set(pictures[0]) == set(pictures[1])
    moved = sum(a != b for a, b in zip(*pictures, strict=True))
    assert moved > 0.8 * len(pictures[0])


def test_the_tower_learns_to_see(tmp_path):
    make_tiny_model(tmp_path)
    blind = teach_tower(tmp_path, seed=1, phantoms=200, steps=5, progress=False)
    sighted = teach_tower(tmp_path, seed=1, phantoms=200, steps=100, progress=False)

    assert sighted["recall"] > 0.5 > blind["precision"]
    assert sighted["precision"] > 2 * blind["precision"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_quickstart_learns(tmp_path, seed):
    quickstart.run_quickstart(tmp_path / "out", seed=seed, control=seed == 1)
    summary = json.loads((tmp_path / "out" / "quickstart.json").read_text())

    assert summary["scores"]["tuned"]["closed"]["n"] >= 150
    assert all(summary["verdicts"].values()), summary["verdicts"]
