"""Sampled validation: what answers state is scored as a reader would score it, and asking leaves training as it was."""

import errno
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from datasets import load_dataset
from PIL import Image

from data_builders.claims import Claim, ClaimsDocument, read_claims
from data_builders.records import InputError
from data_builders.sources import load_vocabulary
from dentalgemma.training.curves import Curves, draw_curves
from dentalgemma.training.data import open_image
from dentalgemma.training.validation import SampledValidation, choose_sample, prepare_validation, to_conversation
from dentalgemma.training.verdicts import Case, judge_answer, measure

VOCABULARY = load_vocabulary()
CARIES = Claim("caries", 1, "right_maxillary", annotations=("a",))
INFECTION = Claim("infection", 1, "left_mandibular", annotations=("b",))
NO_CARIES = Claim("caries", negated=True)


def case(question, reference, *claims, language="en", **more):
    return Case("row", question, reference, language, claims=ClaimsDocument(2, claims), **more)


def judge(asked, answer, **more):
    return judge_answer(asked, answer, ended=True, vocabulary=VOCABULARY, **more)


def scores(asked, answer, **more):
    return measure([judge(asked, answer, **more)])


PRESENCE = case(
    "Can you see caries on this panoramic radiograph?",
    "Yes, this panoramic radiograph shows caries in the right maxillary region.",
    replace(CARIES, count=None),
)
ABSENCE = case(
    "Can you see caries on this panoramic radiograph?",
    "No, there is no sign of caries on this panoramic radiograph.",
    NO_CARIES,
)
SIDE = case(
    "Which side of the patient is the carious lesion on?",
    "The finding is on the patient's right.",
    Claim("caries", 1, side="right", annotations=("a",)),
)
FINDINGS = case(
    "Which pathological findings does this panoramic radiograph show, and in which regions?",
    "On this panoramic radiograph a carious lesion in the right maxillary region and a periapical infection in the "
    "left mandibular region can be seen.",
    CARIES,
    INFECTION,
)
TEETH = case(
    "Which teeth are absent on this panoramic radiograph?",
    "Not present: teeth 18, 28.",
    Claim("tooth", tooth="18", negated=True),
    Claim("tooth", tooth="28", negated=True),
)


@pytest.fixture(scope="module")
def rows(vqa_dataset):
    return load_dataset(str(vqa_dataset), split="train").remove_columns("images").to_list()


def read_case(row):
    question, answer = row["prompt"][-1]["content"], row["completion"][0]["content"]
    return Case(row["row_id"], question, answer, row["language"], row["question_type"], read_claims(row["claims"]))


def test_every_answer_of_a_dataset_scores_full_marks_against_its_own_claims(rows):
    judged = [judge(own, own.reference) for own in map(read_case, rows)]
    metrics = measure(judged)

    assert metrics.pop("contradictions") == metrics.pop("unread") == 0
    assert {"yes_no_accuracy", "sensitivity_caries", "specificity_caries", "side_accuracy"} <= metrics.keys()
    assert set(metrics.values()) == {1.0}


def test_answers_to_other_rows_score_less_on_every_metric(rows):
    """The control: full marks are not given to just anything that reads like an answer."""
    cases = sorted(map(read_case, rows), key=lambda own: own.question_type)
    swapped = measure([judge(own, other.reference) for own, other in zip(cases, cases[5:] + cases[:5], strict=True)])

    assert swapped["contradictions"] > 0
    for name in ("yes_no_accuracy", "sensitivity", "specificity", "side_accuracy", "region_accuracy", "exact_match"):
        assert swapped[name] < 1, name


@pytest.mark.parametrize(
    ("asked", "answer", "expected"),
    [
        pytest.param(
            PRESENCE, "No, there is no sign of caries.", {"yes_no_accuracy": 0, "sensitivity_caries": 0}, id="missed"
        ),
        pytest.param(PRESENCE, "Yes.", {"yes_no_accuracy": 1, "sensitivity_caries": 1}, id="a bare yes"),
        pytest.param(
            PRESENCE, "Possibly, caries.", {"yes_no_accuracy": 0, "sensitivity_caries": 1}, id="maybe is not yes"
        ),
        pytest.param(
            ABSENCE, "Yes, caries.", {"yes_no_accuracy": 0, "specificity_caries": 0, "contradictions": 1}, id="invented"
        ),
        pytest.param(ABSENCE, "No.", {"specificity_caries": 1, "contradictions": 0}, id="a bare no"),
        pytest.param(SIDE, "On the patient's left.", {"side_accuracy": 0}, id="wrong side"),
        pytest.param(SIDE, "It is on the patient's right.", {"side_accuracy": 1, "exact_match": 0}, id="other words"),
        pytest.param(
            SIDE, "On the patient's right and on the patient's left.", {"side_accuracy": 0.5}, id="both to be safe"
        ),
        pytest.param(
            FINDINGS,
            "A carious lesion in the right maxillary region.",
            {"region_accuracy": 0.5, "sensitivity_caries": 1, "sensitivity_infection": 0, "sensitivity": 0.5},
            id="one of two",
        ),
        pytest.param(
            FINDINGS,
            "A periapical infection in the right maxillary region and a carious lesion in the left mandibular region.",
            {"region_accuracy": 0, "sensitivity": 1, "statements_supported": 0},
            id="places swapped",
        ),
        pytest.param(TEETH, "Not present: teeth 28, 18.", {"tooth_accuracy": 1}, id="teeth"),
        pytest.param(TEETH, "Not present: teeth 18, 38.", {"tooth_accuracy": 1 / 3}, id="another tooth"),
        pytest.param(SIDE, "", {"side_accuracy": 0, "statements_supported": 0, "unread": 0}, id="nothing said"),
        pytest.param(
            SIDE, "Hmm perhaps on the patient's right.", {"side_accuracy": 1, "unread": 2 / 7}, id="unknown words"
        ),
    ],
)
def test_an_answer_is_worth_what_it_states(asked, answer, expected):
    found = scores(asked, answer)

    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "answer", "why"),
    [
        pytest.param(PRESENCE, "Yes, there is no sign of caries.", "says yes, and only denies", id="yes, but none"),
        pytest.param(PRESENCE, "No, caries can be seen.", "says no, and affirms", id="no, but there"),
        pytest.param(PRESENCE, "Yes, caries. No.", "says yes and no", id="yes and no"),
        pytest.param(
            FINDINGS,
            "A carious lesion in the right maxillary region. There is no sign of caries.",
            "affirms and denies caries",
            id="there and nowhere",
        ),
        pytest.param(ABSENCE, "Caries can be seen.", "affirms caries, which is not there", id="claims deny it"),
        pytest.param(PRESENCE, "There is no sign of caries.", "denies caries, which is there", id="claims state it"),
    ],
)
def test_what_cannot_both_be_is_a_contradiction(asked, answer, why):
    assert why in judge(asked, answer).contradictions


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        pytest.param(FINDINGS, "A carious lesion in the left maxillary region.", id="a wrong place"),
        pytest.param(
            FINDINGS,
            "A carious lesion in the right maxillary region. There is no sign of caries in the other regions.",
            id="here, and not elsewhere",
        ),
    ],
)
def test_what_may_both_be_is_none(asked, answer):
    assert judge(asked, answer).contradictions == ()


def test_spanish_answers_are_read_too():
    asked = case(
        "¿Se observa caries en esta radiografía panorámica?",
        "Sí, esta radiografía panorámica muestra caries en la región maxilar derecha.",
        replace(CARIES, count=None),
        language="es",
    )

    assert scores(asked, asked.reference)["yes_no_accuracy"] == scores(asked, asked.reference)["claims_stated"] == 1
    assert scores(asked, "No.")["sensitivity_caries"] == 0


def test_a_case_is_scored_by_the_condition_that_it_names():
    known = ["dental caries", "caries", "periodontitis", "alveolar_osteitis"]
    asked = Case("row", "What is it?", "Assessment: dental caries.", condition="dental_caries")
    other = replace(asked, reference="Assessment: alveolar osteitis.", condition="alveolar_osteitis")

    assert scores(asked, "It is Dental  Caries.", conditions=known)["condition_named_alone"] == 1
    both = scores(asked, "Dental caries or periodontitis", conditions=known)
    assert (both["condition_named"], both["condition_named_alone"]) == (1, 0)
    assert scores(asked, "caries", conditions=known)["condition_named"] == 0
    assert scores(other, "alveolar osteitis", conditions=known)["condition_named"] == 1


def test_a_language_that_nobody_reads_back_has_no_claims_to_score():
    asked = case("Ist Karies zu sehen?", "Ja, Karies.", CARIES, language="de")

    assert scores(asked, "Ja, Karies.") == {"ended": 1, "exact_match": 1, "word_overlap": 1}


@pytest.fixture(scope="module")
def validation_split(vqa_dataset, processor):
    from dentalgemma.training.config import StageConfig
    from dentalgemma.training.data import load_splits

    return load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation"))["validation"]


@pytest.fixture(scope="module")
def processor(tiny_model):
    from dentalgemma.models.processors import load_processor

    return load_processor(tiny_model)


def test_the_sample_does_not_depend_on_the_order_of_rows(validation_split):
    shuffled = validation_split.shuffle(seed=1)
    chosen = [validation_split[number]["row_id"] for number in choose_sample(validation_split, size=20, seed=7)]
    again = [shuffled[number]["row_id"] for number in choose_sample(shuffled, size=20, seed=7)]
    other = [validation_split[number]["row_id"] for number in choose_sample(validation_split, size=20, seed=8)]

    assert set(chosen) == set(again)
    assert set(chosen) != set(other)


def test_rare_question_types_are_in_the_sample(validation_split):
    types = set(validation_split["question_type"])
    chosen = choose_sample(validation_split, size=len(types), seed=7)

    assert {validation_split[number]["question_type"] for number in chosen} == types


def sample(split, processor, folder, size=12):
    return SampledValidation(split, processor, size=size, seed=3, dataset=Path(folder))


def settings(**more):
    defaults = {"eval_strategy": "steps", "metric_for_best_model": None, "greater_is_better": None, "seed": 3}
    return Namespace(**defaults | more)


def prepare(split, processor, dataset, metric, greater, rows=12):
    stage = Namespace(validation_sample=rows, dataset_name=str(dataset), dataset_test_split="validation")
    training = settings(metric_for_best_model=metric, greater_is_better=greater)
    return prepare_validation(stage, training, split, processor), training


@pytest.mark.parametrize(
    ("metric", "greater", "rows", "message"),
    [
        pytest.param("eval_sides", True, 12, "nothing measures 'sides' here; choose among eval_loss", id="misspelt"),
        pytest.param("eval_tooth_accuracy", True, 12, "nothing measures 'tooth_accuracy'", id="no case in the sample"),
        pytest.param("eval_sensitivity", True, 0, "validation_sample: 64", id="no sample"),
        pytest.param("eval_sensitivity", False, 12, "would keep the checkpoint with the worst", id="wrong way round"),
        pytest.param("eval_loss", True, 12, "would keep the checkpoint with the worst", id="the highest loss"),
    ],
)
def test_a_metric_that_would_waste_the_run_is_refused_at_the_start(
    validation_split, processor, vqa_dataset, metric, greater, rows, message
):
    with pytest.raises(InputError, match=message):
        prepare(validation_split, processor, vqa_dataset, metric, greater, rows)


@pytest.mark.parametrize(
    ("metric", "derived", "right"),
    [
        pytest.param("eval_contradictions", True, False, id="fewer contradictions are better"),
        pytest.param("yes_no_accuracy", True, True, id="without the prefix"),
        pytest.param("eval_loss", False, False, id="loss"),
    ],
)
def test_which_way_is_better_follows_from_the_metric(validation_split, processor, vqa_dataset, metric, derived, right):
    """`derived` is what transformers makes of the name."""
    _, training = prepare(validation_split, processor, vqa_dataset, metric, derived)

    assert training.greater_is_better is right


def test_claims_of_another_schema_are_refused_in_one_sentence(validation_split, processor, vqa_dataset):
    broken = validation_split.remove_columns("claims").add_column("claims", ['{"claims": []}'] * len(validation_split))

    with pytest.raises(InputError, match=r"its claims cannot be read .* or set `validation_sample: 0`"):
        sample(broken, processor, vqa_dataset)


def test_clinical_cases_are_scored_by_condition_ending_and_words(instruct_dataset, processor):
    rows = load_dataset(str(instruct_dataset), split="validation")

    metrics = set(sample(rows, processor, instruct_dataset).metrics())
    assert metrics == {"condition_named", "condition_named_alone", "ended", "exact_match", "word_overlap"}


def test_rows_of_others_need_nothing_but_prompt_and_completion(validation_split, processor, tmp_path):
    bare = validation_split.select_columns(["images", "prompt", "completion"])
    asked = sample(bare, processor, tmp_path)

    assert {"exact_match", "ended", "yes_no_accuracy"} <= set(asked.metrics())
    assert len({case.row_id for case in asked.cases}) == 12


def test_an_image_stays_where_the_prompt_puts_it(validation_split):
    row = validation_split[0]
    parts = [{"type": "text", "text": "Before."}, {"type": "image"}, {"type": "text", "text": "After."}]
    (turn,) = to_conversation({"images": row["images"], "prompt": [{"role": "user", "content": parts}]})

    assert [part["type"] for part in turn["content"]] == ["text", "image", "text"]
    assert turn["content"][1]["image"].mode == "RGB"


@pytest.mark.known_bug(7)
@pytest.mark.parametrize(
    "content",
    [
        pytest.param("What is it?", id="a text"),
        pytest.param([{"type": "text", "text": "What is it?"}], id="parts without a place"),
        pytest.param([{"type": "text", "text": "This:"}, {"type": "image", "text": None}], id="parts with a place"),
    ],
)
def test_a_model_is_asked_with_the_images_that_it_is_trained_with_however_a_prompt_is_written(
    content, validation_split, processor
):
    from dentalgemma.evaluation.likelihood import encode
    from dentalgemma.training.data import ChatCollator

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    row = {**validation_split[0], "prompt": turns}
    batch = ChatCollator(processor)([row])
    asked = encode(processor, [to_conversation(row)])
    another = encode(processor, [to_conversation({**row, "images": validation_split[-1]["images"]})])

    assert torch.equal(asked["input_ids"][0], batch["input_ids"][0][batch["labels"][0] == -100])
    assert torch.equal(asked["pixel_values"], batch["pixel_values"])
    assert not torch.equal(asked["pixel_values"], another["pixel_values"])


def test_two_images_without_places_keep_their_order(validation_split):
    images = [image for number in (0, -1) for image in validation_split[number]["images"]]
    (turn,) = to_conversation(
        {"images": images, "prompt": [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]}
    )
    shown = [part["image"].tobytes() for part in turn["content"] if part["type"] == "image"]

    assert len(set(shown)) == 2
    assert shown == [open_image(image).tobytes() for image in images]


@pytest.fixture(scope="module", params=["tiny_model", "tiny_gemma4"])
def tuned(request):
    """A small model of each family that talks, under an adapter, and its processor.

    With tied embeddings a random model repeats the token that it has just seen, whatever the image.
    """
    from peft import LoraConfig, get_peft_model

    from dentalgemma.models.loading import load_pretrained

    model, processor = load_pretrained(request.getfixturevalue(request.param), dtype=torch.float32)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=r".*language_model.*\.(q_proj|o_proj|up_proj|down_proj)")
    torch.manual_seed(1)
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(model.get_output_embeddings().weight))
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model, processor


@pytest.fixture(scope="module")
def mixed_split(validation_split):
    """Eight rows: with one image, with two, with none, and the turns of a dialogue."""
    rows = [{**row, "images": list(row["images"])} for row in validation_split.select(range(8)).to_list()]
    rows[1]["images"] *= 2
    rows[3]["images"] = rows[6]["images"] = []
    rows[4]["prompt"] = [*rows[4]["prompt"], *rows[4]["completion"], {"role": "user", "content": "And now?"}]
    from datasets import Dataset

    return Dataset.from_list(rows, features=validation_split.features)


def test_answers_do_not_depend_on_batches_nor_on_what_training_set(tuned, mixed_split, vqa_dataset):
    """Left padding, images, several images and none; dropout and checkpointing on, as while training."""
    from accelerate import Accelerator

    model, processor = tuned
    asked = sample(mixed_split, processor, vqa_dataset, size=8)
    asked.max_new_tokens = 16
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    state = torch.get_rng_state()
    together = asked.ask(model, Accelerator(cpu=True), batch_size=4)

    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    model.gradient_checkpointing_disable()
    alone = asked.ask(model.eval(), Accelerator(cpu=True), batch_size=1)
    assert together == alone
    assert len({answer["output"] for answer in alone}) > 4  # the model says something, and not always the same


@pytest.mark.known_bug(2)
def test_an_answer_is_asked_with_the_prompt_that_training_shows(tuned, mixed_split):
    from dentalgemma.evaluation.likelihood import encode
    from dentalgemma.training.data import ChatCollator

    _, processor = tuned
    for row in mixed_split:
        batch = ChatCollator(processor)([row])
        trained = batch["input_ids"][0][batch["labels"][0] == -100]
        asked = encode(processor, [to_conversation(row)])
        assert torch.equal(asked["input_ids"][0], trained)
        assert (trained == processor.tokenizer.bos_token_id).sum() == 1
        assert ("pixel_values" in asked) == bool(row["images"])


def train(model, dataset, out, **options):
    from dentalgemma.models.loading import load_model
    from dentalgemma.training.config import parse_stage
    from dentalgemma.training.data import load_splits
    from dentalgemma.training.run_facts import write_run_facts
    from dentalgemma.training.trainer import StageTrainer

    settings = {
        "model_name_or_path": model,
        "dataset_name": dataset,
        "output_dir": out,
        "max_steps": 8,
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 16,
        "learning_rate": "1e-2",
        "dataloader_num_workers": 0,
        "validation_sample": 12,
        "disable_tqdm": "true",
        **options,
    }
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    stage, training, model_config = parse_stage(REPOSITORY / "recipes" / "stage1_vqa.yaml", argv=argv)
    splits = load_splits(stage)
    loaded, processor = load_model(model_config)
    trainer = StageTrainer(
        model=loaded, processor=processor, stage=stage, training=training, model_config=model_config, dataset=splits
    )
    trainer.train()
    write_run_facts(trainer, stage, model_config, splits)
    return trainer


@pytest.fixture(scope="module")
def run(tiny_model, vqa_dataset, tmp_path_factory):
    """A run of eight steps whose best checkpoint is chosen by what the answers say."""
    out = tmp_path_factory.mktemp("runs") / "sampled"
    metric = {"metric_for_best_model": "eval_word_overlap", "report_to": "tensorboard"}
    return train(tiny_model, vqa_dataset, out, **metric)


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def test_the_best_checkpoint_is_chosen_by_a_sampled_metric(run):
    values = {entry["step"]: entry["eval_word_overlap"] for entry in evaluations(run)}

    assert list(values) == [4, 8]
    assert run.state.best_global_step == max(values, key=values.get)
    assert run.state.best_metric == max(values.values()) > 0


def test_every_answer_of_every_evaluation_is_kept(run):
    folder = Path(run.args.output_dir) / "validation"

    assert sorted(path.name for path in folder.iterdir()) == ["step-4.jsonl", "step-8.jsonl"]
    lines = [json.loads(line) for line in (folder / "step-4.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    overlap = sum(line["hits_and_cases"]["word_overlap"][0] for line in lines) / 12
    assert overlap == pytest.approx(evaluations(run)[0]["eval_word_overlap"])
    assert {"row_id", "question", "reference", "answer", "contradictions", "unread"} <= lines[0].keys()


def test_run_facts_hold_the_metrics_of_the_best_step(run):
    facts = json.loads((Path(run.args.output_dir) / "run_facts.json").read_text())["sampled_validation"]
    best = next(entry for entry in evaluations(run) if entry["step"] == run.state.best_global_step)

    assert facts["rows"] == 12
    assert facts["step"] == run.state.best_global_step
    assert facts["metrics"]["word_overlap"] == best["eval_word_overlap"]
    assert len(facts["row_ids_sha256"]) == 64


def test_tensorboard_gets_the_sampled_metrics(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (Path(run.args.output_dir) / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("eval/word_overlap")}

    assert logged == pytest.approx({entry["step"]: entry["eval_word_overlap"] for entry in evaluations(run)})


def test_the_curves_are_a_picture_of_the_whole_run(run):
    with Image.open(Path(run.args.output_dir) / "curves.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 800
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_asking_changes_nothing_in_training(run, tiny_model, vqa_dataset, tmp_path):
    """Dropout is on, so that a single random number drawn more would show in the losses."""
    without = train(tiny_model, vqa_dataset, tmp_path, validation_sample=0)

    def losses(trainer, name):
        return [entry[name] for entry in trainer.state.log_history if name in entry]

    assert without.validation is None
    assert losses(without, "loss") == losses(run, "loss")
    assert losses(without, "eval_loss") == losses(run, "eval_loss")


def test_training_stops_early_on_a_sampled_metric(tiny_model, vqa_dataset, tmp_path):
    """A model that all but stands still is never better than at first."""
    metric = {"metric_for_best_model": "eval_exact_match", "early_stopping_patience": 1, "eval_steps": 1}
    from transformers import TrainerState

    train(tiny_model, vqa_dataset, tmp_path, learning_rate="1e-30", save_steps=1, **metric)
    state = TrainerState.load_from_json(tmp_path / "checkpoint-2" / "trainer_state.json")

    assert state.best_global_step == 1
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_a_tracker_that_is_not_installed_is_refused_before_the_model_is_loaded():
    from dentalgemma.training.config import parse_stage

    with pytest.raises(InputError, match="report_to: trackio is not installed: `pip install trackio`"):
        parse_stage(REPOSITORY / "recipes" / "stage1_vqa.yaml", argv=["--report_to", "trackio"])


@pytest.fixture(scope="module")
def talking_model(tiny_model, tmp_path_factory):
    """The small model with an output layer of its own, so that it says something else for every image."""
    from dentalgemma.models.loading import load_pretrained

    folder = tmp_path_factory.mktemp("models") / "talking"
    model, processor = load_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(model.get_output_embeddings().weight))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.mark.slow
@pytest.mark.parametrize(("port", "sharding"), [(29641, {}), (29642, FSDP2)], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_answers_of_one(talking_model, vqa_dataset, validation_split, tmp_path, port, sharding):
    """Ten rows in batches of three: the processes have unequal shares, and the last is short of rows."""
    from accelerate import Accelerator

    from dentalgemma.models.loading import load_pretrained

    options = {"max_steps": 1, "per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_on_start": "true"}
    options |= {"validation_sample": 10, "gradient_checkpointing": "false"}
    run = {"rows": "images", "model": str(talking_model), "dataset": str(vqa_dataset), "out": str(tmp_path / "run")}
    (tmp_path / "cases.json").write_text(json.dumps([run | {"options": options}]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **sharding}
    command = [*torchrun, str(REPOSITORY / "tests" / "scale_cases.py"), str(tmp_path / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-4000:]

    model, processor = load_pretrained(talking_model, dtype=torch.float32)
    alone = SampledValidation(validation_split, processor, size=10, seed=42, dataset=vqa_dataset)
    answers = [answer["output"] for answer in alone.ask(model, Accelerator(cpu=True), batch_size=10)]
    written = [json.loads(line) for line in (tmp_path / "run/validation/step-0.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in written] == answers
    assert len(set(answers)) == 10


def test_a_full_disk_stops_no_run_for_a_picture_and_loses_no_answer_silently(
    validation_split, processor, vqa_dataset, tmp_path, monkeypatch, capsys
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    args = Namespace(output_dir=tmp_path, metric_for_best_model=None)
    state = Namespace(log_history=[], best_global_step=None, best_metric=None, is_world_process_zero=True)
    Curves().on_save(args, state, None)
    assert "could not be drawn: [Errno 28]" in capsys.readouterr().err

    asked = sample(validation_split, processor, vqa_dataset)
    answers = [{"output": "", "finish_reason": "stop"}] * 12
    with pytest.raises(InputError, match=r"no space to write .*step-4.jsonl; make room"):
        asked.write(tmp_path / "step-4.jsonl", answers, asked.judge(answers))
    assert list(tmp_path.iterdir()) == []


def test_curves_of_a_run_that_has_just_begun_can_be_drawn(tmp_path):
    draw_curves(Namespace(log_history=[], best_global_step=None, best_metric=None), tmp_path / "curves.png")

    assert (tmp_path / "curves.png").is_file()
