"""`dentalgemma doctor`: every bad thing here is really built, and a sound run is the control."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, Gemma3Config
from trl import ModelConfig

from data_builders.records import InputError
from dentalgemma.available_memory import available_memory
from dentalgemma.models.loading import fingerprint_files
from dentalgemma.training import dry_run
from dentalgemma.training.doctor import diagnose, gpu_label
from dentalgemma.training.doctor_page import print_page
from dentalgemma.training.dry_run import rehearse
from dentalgemma.training.first_loss import check_first_loss

STAGE1 = REPOSITORY / "recipes" / "stage1_vqa.yaml"


def options_of(settings):
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def look(tiny_model, vqa_dataset, tmp_path_factory):
    """Diagnose stage 1 on the small model, with one or two things changed."""
    out = tmp_path_factory.mktemp("doctor") / "run"

    def look(gpu="a100", gpus=None, accelerate=None, throughput=1.0, first_loss=False, config=STAGE1, **changed):
        settings = {"model_name_or_path": tiny_model, "dataset_name": vqa_dataset, "output_dir": out} | changed
        return diagnose(
            config,
            options_of(settings),
            gpu=gpu,
            gpus=gpus,
            accelerate=accelerate,
            throughput=throughput,
            first_loss=first_loss,
        )

    return look


@pytest.fixture(scope="module")
def sound(look):
    return look(throughput=None, first_loss=True)


@pytest.fixture
def changed_model(tiny_model, tmp_path):
    """A copy of the small model with a file of it changed."""

    def change(name, edit):
        folder = tmp_path / "changed"
        if not folder.exists():
            shutil.copytree(tiny_model, folder)
        text = (folder / name).read_text()
        edited = edit(text)
        assert edited != text
        (folder / name).write_text(edited)
        return folder

    return change


def page(found, width=100):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_page(found.as_json(), console)
    return console.export_text()


def test_a_sound_run_is_passed(sound):
    assert sound.refusals == []
    assert sound.warnings == []
    assert sound.unchecked == []
    assert "Nothing found that would waste this run." in page(sound)


def test_the_page_says_what_the_run_will_cost(sound, vqa_dataset):
    facts = sound.as_json()
    rows = facts["dataset"]["rows"]["train"]

    assert facts["steps"]["in_all"] == 5 * -(-rows // 4)
    assert facts["time"]["origin"] == "estimated"
    assert sum(count for _, count in facts["lengths"]["train"]["histogram"]) == rows
    assert facts["parts"]["language_model"]["trainable"] > 0
    assert facts["memory"]["activations_with_checkpointing"] < facts["memory"]["activations_without_checkpointing"]
    assert facts["memory"]["bytes"]["total"] == sum(
        size for name, size in facts["memory"]["bytes"].items() if name != "total"
    )
    assert json.loads(json.dumps(facts)) == json.loads(json.dumps(sound.as_json()))
    text = page(sound)
    for words in ("Memory on A100 (estimate)", "TFLOP a row", "Loss before training", "Disk:", "median"):
        assert words in text


def test_only_the_answer_and_its_turn_end_are_shown_as_trained(sound):
    for pieces in sound.facts["shown"]:
        kinds = [kind for kind, _ in pieces]
        assert kinds[0] == "prompt"
        assert kinds.count("image") == 1  # its tokens in one piece
        assert kinds.count("trained") == 1
        assert dict(pieces)["trained"].rstrip().endswith("<end_of_turn>")
        assert "image tokens]" in dict(pieces)["image"]


def test_no_path_is_printed_that_the_user_did_not_give(sound, tiny_model, vqa_dataset):
    text = json.dumps(sound.as_json()) + page(sound, width=500)
    for given in (str(tiny_model), str(vqa_dataset)):
        text = text.replace(given, "")

    assert str(Path.home()) not in text
    assert str(REPOSITORY) not in text
    assert "/tmp" not in text


@pytest.mark.known_bug(1)
def test_a_length_that_cuts_is_refused(look):
    assert "would cut image tokens or answers" in " ".join(look(max_length=1024).refusals)


@pytest.mark.known_bug(1)
def test_a_template_that_puts_the_prompt_into_the_labels_is_refused(look, changed_model):
    """Without a generation prompt the opening of the model's turn counts as answer."""
    folder = changed_model("chat_template.jinja", lambda text: text.replace("add_generation_prompt", "false"))

    assert any("the chat template renders a prompt differently" in s for s in look(model_name_or_path=folder).refusals)


@pytest.mark.known_bug(2)
def test_a_template_that_doubles_bos_is_refused(look, changed_model):
    folder = changed_model("chat_template.jinja", lambda text: text.replace("{{ bos_token }}", "{{ bos_token * 2 }}"))

    assert any(
        "<bos> occurs 2 times instead of once" in sentence for sentence in look(model_name_or_path=folder).refusals
    )


@pytest.mark.known_bug(6)
def test_a_processor_without_token_type_ids_is_refused(look, changed_model):
    changed_model("processor_config.json", lambda text: text.replace("Gemma3Processor", "LlavaProcessor"))
    folder = changed_model("tokenizer_config.json", lambda text: text.replace("Gemma3Processor", "LlavaProcessor"))
    found = look(model_name_or_path=folder)

    assert any("(LlavaProcessor) gives no token_type_ids" in sentence for sentence in found.refusals)


@pytest.mark.known_bug(9, 11)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"trains": "jaw"}, "trains: ['jaw']: choose", id="unknown part"),
        pytest.param({"lora_target_modules": "all-linear"}, "is set by `trains`; leave it out", id="all-linear"),
        pytest.param({"lora_modules_to_save": "lm_head"}, "lm_head and embeddings are never trained", id="head"),
    ],
)
def test_unknown_targets_are_refused(look, options, message):
    assert any(message in sentence for sentence in look(**options).refusals)


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """An adapter of the small Gemma 3, that says it is one of whatever is asked for."""
    from dentalgemma.models.loading import load_pretrained
    from dentalgemma.models.parts import adapter_config

    def make(base, weights=None):
        from peft import get_peft_model

        folder = tmp_path / "adapter"
        model, _ = load_pretrained(tiny_model, dtype=torch.float32)
        adapted = get_peft_model(model, adapter_config(model, ModelConfig(use_peft=True), ["language_model"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # which begins at zero, and would change nothing
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
        (folder / "run_facts.json").write_text(json.dumps({"stage": "vqa", "base_weights": weights}))
        return folder

    return make


@pytest.mark.known_bug(12)
def test_an_adapter_of_another_architecture_is_refused(look, adapter, tiny_gemma4):
    found = look(model_name_or_path=adapter(tiny_gemma4))

    assert any("is an adapter of another base" in sentence for sentence in found.refusals)


@pytest.mark.known_bug(12)
def test_an_adapter_of_other_weights_is_refused_and_its_own_base_accepted(look, adapter, tiny_model):
    other = look(model_name_or_path=adapter(tiny_model, weights="0123456789abcdef"))
    own = look(model_name_or_path=adapter(tiny_model, weights=fingerprint_files(tiny_model)))

    assert any("is an adapter of another base: it was trained on weights 0123" in s for s in other.refusals)
    assert own.refusals == []
    assert own.facts["model"]["earlier_adapters"] == 1


@pytest.mark.known_bug(18)
def test_a_t4_is_refused_with_bf16_and_told_what_works(look):
    refused = look(gpu="t4")
    path = look(gpu="t4", config=REPOSITORY / "recipes" / "stage1_vqa_t4.yaml", eval_steps=10, save_steps=10)

    assert any("has no bf16, it only emulates it" in sentence for sentence in refused.refusals)
    assert any("--load_in_4bit true --dtype float32 --bf16 false" in sentence for sentence in refused.refusals)
    assert path.refusals == []


@pytest.mark.known_bug(18)
def test_float16_is_no_way_out_on_a_t4(look):
    assert any("infinities" in s for s in look(gpu="t4", bf16="false", fp16="true", dtype="float16").refusals)


def make_dataset(folder, rows, validation=None):
    features = Dataset.from_list(rows).features.copy()
    if "images" in features:
        features["images"] = List(ImageFeature())
    folder.mkdir()
    for split, own in {"train": rows, "validation": rows if validation is None else validation}.items():
        columns = {name: [row[name] for row in own] for name in features}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def chat(question, answer, **columns):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        **columns,
    }


@pytest.mark.known_bug(7)
def test_images_and_placeholders_that_disagree_are_refused(look, tmp_path):
    picture = Image.new("RGB", (20, 20))
    parts = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    row = {
        "row_id": "a1",
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "Caries."}]}],
        "images": [picture],
    }
    found = look(dataset_name=make_dataset(tmp_path / "data", [row] * 8))

    assert any("row a1: images: 1, places for images in its messages: 2" in sentence for sentence in found.refusals)


def test_an_empty_answer_is_refused(look, tmp_path):
    rows = [chat("Is there caries?", "", row_id="b2"), *[chat("Is there caries?", "Yes.", row_id="b3")] * 8]

    assert any(
        "row b2" in s and "answer is empty" in s for s in look(dataset_name=make_dataset(tmp_path / "d", rows)).refusals
    )


def test_an_empty_split_is_refused(look, tmp_path):
    rows = [chat("Is there caries?", "Yes.")] * 8
    data = make_dataset(tmp_path / "data", rows, validation=[])

    assert any('"validation" corresponds to no data' in sentence for sentence in look(dataset_name=data).refusals)


def test_an_aligner_without_images_is_refused(look, instruct_dataset):
    found = look(dataset_name=instruct_dataset, trains="aligner")

    assert any("no row of" in sentence and "has an image to learn from" in sentence for sentence in found.refusals)


def test_a_text_stage_on_the_same_model_is_sound(look, instruct_dataset):
    found = look(
        config=REPOSITORY / "recipes" / "stage2_instruct.yaml",
        dataset_name=instruct_dataset,
        eval_steps=5,
        save_steps=5,
    )

    assert found.refusals == []
    assert found.facts["memory"]["batch"]["images"] == 0


@pytest.mark.slow
def test_rows_that_will_be_left_out_are_counted(look, sound):
    middle = sound.facts["lengths"]["train"]["median"]
    some = look(max_row_tokens=middle)
    all_ = look(max_row_tokens=10)

    assert some.refusals == []
    assert any(f"longer than {middle} tokens and will be left out" in sentence for sentence in some.warnings)
    assert any("rows are longer than 10 tokens" in sentence for sentence in all_.refusals)


def test_no_disk_space_is_refused(look):
    """A checkpoint of the small model at every one of a thousand million steps fits on no disk."""
    found = look(max_steps=10**9, eval_steps=1, save_steps=1, save_total_limit=10**9)

    assert any(s.startswith("no disk space: checkpoints, merged model and features take about") for s in found.refusals)


def test_what_does_not_fit_is_refused_and_what_would_fit_is_named(look):
    options = {"memory": "fixed", "pack_questions": 1, "gradient_accumulation_steps": 4}
    found = look(gpu="l4", per_device_train_batch_size=40000, **options)

    assert any(
        "l4 has 22.0" in s and "`--per_device_train_batch_size 1 --gradient_accumulation_steps 160000" in s
        for s in found.refusals
    )


def test_features_are_counted_with_their_place_on_the_disk_and_the_time_to_make_them(sound, vqa_dataset):
    """Sixteen tokens of a picture, as wide as the small tower, in bf16; a picture of several rows counts once."""
    features, rows = sound.facts["features"], sound.facts["dataset"]["rows"]
    width = 128

    assert features["pictures"] < rows["train"] + rows["validation"]
    assert features["bytes"] == features["pictures"] * 16 * width * 2
    assert features["tflop_each"] > 0
    assert sound.facts["memory"]["vision"] == "cached"
    assert sound.facts["time"]["encoding_hours"] >= 0
    assert "features cached" in page(sound)
    assert f"Features: {features['pictures']} pictures" in page(sound)


def test_a_tower_that_trains_has_no_features(look):
    refused = look(trains="vision_tower", vision_features="cached")
    live = look(vision_features="live")

    assert any("vision_features: cached: the tower trains" in sentence for sentence in refused.refusals)
    assert live.facts["memory"]["vision"] == "live"
    assert "features" not in live.facts


@pytest.mark.slow
def test_where_one_process_reads_the_weights_the_tower_stays_live(look, tmp_path):
    shipped = (REPOSITORY / "recipes" / "accelerate" / "fsdp2.yaml").read_text()
    texts = {
        "false": shipped,
        "true": shipped.replace("fsdp_cpu_ram_efficient_loading: false", "fsdp_cpu_ram_efficient_loading: true"),
        "unsaid": "".join(line for line in shipped.splitlines(True) if "fsdp_cpu_ram_efficient_loading" not in line),
    }
    assert len(set(texts.values())) == 3
    seen = {}
    for name, text in texts.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        seen[name] = look(accelerate=path).facts["memory"]["vision"]

    assert seen == {"false": "cached", "true": "live", "unsaid": "live"}  # accelerate's own default is true


def test_a_row_of_many_pictures_takes_no_tokens_off_the_others(look, tmp_path):
    """Rows of a picture share its sixteen tokens; two rows show four, which is longer than most rows."""
    picture = Image.new("RGB", (20, 20))
    rows = [
        chat("What is it?", "Caries.", images=[picture] * (4 if number < 2 else 1), image_id=f"p{number // 2}")
        for number in range(40)
    ]
    found = look(
        dataset_name=make_dataset(tmp_path / "data", rows),
        pack_questions=2,
        per_device_train_batch_size=4,
        memory="fixed",
        throughput=None,
    )
    lengths, time = found.facts["lengths"]["train"], found.facts["time"]

    assert found.facts["memory"]["batch"]["tokens"] >= lengths["longest"] + lengths["shortest"] - 16
    assert time["tflop_per_row"] > 0
    assert time["rows_per_second"] > 0


def test_memory_auto_shows_what_the_run_would_choose(look):
    """Four rows a step, as the recipe has it one by one with checkpointing; the small model has room for all."""
    found = look(memory="auto", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    memory = found.facts["memory"]

    assert found.refusals == []
    assert (memory["per_device_train_batch_size"], memory["gradient_accumulation_steps"]) == (4, 1)
    assert memory["chosen"]
    assert not memory["checkpointing"]
    assert found.facts["steps"]["rows_per_step"] == 4
    assert "Chosen (memory: auto): batch 4 × accumulation 1, no gradient checkpointing" in page(found)


def test_packing_shares_the_tokens_of_a_picture_and_takes_less_time(look):
    options = {"per_device_train_batch_size": 4, "throughput": None}
    alone, packed = (look(pack_questions=number, **options) for number in (1, 3))

    assert packed.facts["memory"]["batch"]["questions"] > 1
    assert packed.facts["memory"]["batch"]["tokens"] > alone.facts["memory"]["batch"]["tokens"]
    assert packed.facts["time"]["tflop_per_row"] < alone.facts["time"]["tflop_per_row"]
    assert "questions share the tokens of their image" in page(packed)
    assert "share the tokens" not in page(alone)


@pytest.mark.slow
def test_a_step_of_more_rows_than_there_are_is_refused(look):
    found = look(gpus=8, gradient_accumulation_steps=100)

    assert any("one step takes 3200 rows" in sentence for sentence in found.refusals)


def test_a_run_that_is_evaluated_only_at_its_end_is_warned_of(look):
    found = look(max_steps=50)

    assert found.refusals == []
    assert any("ends after 50 steps and is evaluated only then (eval_steps: 100)" in text for text in found.warnings)


@pytest.mark.known_bug(19, 20)
def test_what_zero3_cannot_train_is_refused(look, tiny_gemma4, tmp_path):
    zero3 = REPOSITORY / "recipes" / "accelerate" / "zero3.yaml"
    picture = Image.new("RGB", (20, 20))
    rows = [chat("What is it?", "Caries.", images=[picture] if number % 2 else []) for number in range(40)]
    mixed = look(accelerate=zero3, dataset_name=make_dataset(tmp_path / "data", rows))

    assert any(
        "ZeRO-3 loads Gemma 4's buffers wrong" in s
        for s in look(accelerate=zero3, model_name_or_path=tiny_gemma4).refusals
    )
    assert any("20 of 40 rows" in s and "hang" in s for s in mixed.refusals)


@pytest.mark.known_bug(19)
def test_zero3_cannot_start_from_an_adapter(look, adapter, tiny_model):
    folder = adapter(tiny_model)
    sharded, whole = (
        look(accelerate=REPOSITORY / "recipes" / "accelerate" / name, model_name_or_path=folder)
        for name in ("zero3.yaml", "zero2.yaml")
    )

    assert any(
        "no process has whole weights to fold an adapter into: `dentalgemma merge` it" in s for s in sharded.refusals
    )
    assert not any("fold an adapter" in s for s in whole.refusals)


@pytest.mark.slow
def test_accelerate_configurations_are_read(look):
    shared = look(accelerate=REPOSITORY / "recipes" / "accelerate" / "zero2.yaml")

    assert shared.facts["gpu"]["sharing"] == "zero2"
    assert shared.facts["steps"]["rows_per_step"] == 4 * shared.facts["gpu"]["gpus"]
    with pytest.raises(InputError, match="no accelerate configuration"):
        look(accelerate=STAGE1)


def test_everything_wrong_is_said_at_once(look):
    found = look(gpu="t4", max_length=512, trains="jaw", gradient_accumulation_steps=10**6, max_steps=500)

    assert len(found.refusals) == 4
    text = page(found, width=400)
    assert all(f"refused: {sentence}" in text for sentence in found.refusals)
    assert "This run would be wasted: 4 things to mend." in text


@pytest.mark.slow
def test_a_stated_throughput_gives_the_hours(look):
    found = look(throughput=0.5, num_train_epochs=2)
    rows = found.facts["dataset"]["rows"]["train"]

    assert found.facts["time"]["origin"] == "stated"
    assert found.facts["time"]["hours_per_epoch"] == pytest.approx(rows / 0.5 / 3600, abs=1e-3)


@pytest.mark.slow
def test_without_a_gpu_the_run_is_meant_for_this_machine(look):
    found = look(gpu=None)

    assert found.refusals == []
    assert found.facts["memory"]["available"] > 2**30


def test_an_unknown_gpu_and_an_unknown_option_are_wrong_use(look):
    with pytest.raises(InputError, match="--gpu abacus: choose one of"):
        look(gpu="abacus")
    with pytest.raises(InputError, match="lerning_rate"):
        look(lerning_rate=1)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla P100-PCIE-16GB", "p100"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A10", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(name, label):
    assert gpu_label(name) == label


def write_group(folder, limit, usage, cached, names=("memory.max", "memory.current", "inactive_file")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_available_memory_is_what_the_container_or_the_job_has_left(tmp_path):
    own, mib = tmp_path / "cgroup", 2**20
    own.write_text("0::/slurm/job\n")
    whole = available_memory(tmp_path / "none", own)
    write_group(tmp_path / "v2", "max", 3 * mib, mib)
    unlimited = available_memory(tmp_path / "v2", own)
    write_group(tmp_path / "v2" / "slurm", 4 * mib, 3 * mib, mib)
    write_group(tmp_path / "v2" / "slurm" / "job", "max", 3 * mib, mib)
    write_group(
        tmp_path / "v1" / "memory",
        9 * mib,
        3 * mib,
        2 * mib,
        names=("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )

    assert min(whole, unlimited) > 10 * mib
    assert available_memory(tmp_path / "v2", own) == 2 * mib
    assert available_memory(tmp_path / "v1", own) == 8 * mib


def test_a_base_that_is_not_here_cannot_be_passed_offline(look):
    found = look(model_name_or_path="google/medgemma-1.5-4b-it")

    assert any("google/medgemma-1.5-4b-it" in sentence for sentence in found.refusals)
    assert any("access to google/medgemma-1.5-4b-it: the Hub could not be asked" in s for s in found.unchecked)


@pytest.mark.known_bug(5)
def test_a_first_loss_is_held_to_what_is_normal_for_the_family():
    base = Gemma3Config(text_config={"vocab_size": 262208})
    rehearsal = Gemma3Config(text_config={"vocab_size": 3072})
    rehearsal.rehearsal = True

    assert check_first_loss(2.5, base) is None
    assert "up to 6.0 is normal for gemma3" in check_first_loss(8.0, base)
    for loss in (13.0, 30.0):
        with pytest.raises(InputError, match=r"worse than guessing among all words \(12\.5\)"):
            check_first_loss(loss, base)
    with pytest.raises(InputError, match="the first loss is nan"):
        check_first_loss(float("nan"), rehearsal)
    assert check_first_loss(11.0, rehearsal) is None


@pytest.mark.known_bug(5)
def test_weights_that_know_nothing_are_found_before_and_while_training(look, changed_model, make_trainer, tmp_path):
    """A random model that does not call itself one of rehearsals, as a base looks whose weights did not load."""
    folder = changed_model("config.json", lambda text: text.replace('"rehearsal": true', '"rehearsal": false'))

    assert any(
        "worse than guessing" in sentence for sentence in look(model_name_or_path=folder, first_loss=True).refusals
    )
    with pytest.raises(InputError, match="worse than guessing"):
        make_trainer(folder, tmp_path / "run", logging_steps=1).train()


def test_the_first_loss_of_a_sound_model_is_that_of_its_run(sound, tiny_model, make_trainer, tmp_path):
    assert AutoConfig.from_pretrained(tiny_model).rehearsal
    trainer = make_trainer(tiny_model, tmp_path / "run")
    loss = trainer.evaluate()["eval_loss"]

    assert sound.facts["first_loss"] == pytest.approx(loss, rel=0.15)  # four rows stand for all


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_rehearsal_runs_the_recipe_and_leaves_nothing_behind(vqa_dataset, tmp_path, family):
    options = {"dataset_name": vqa_dataset, "output_dir": tmp_path / "real", "model_name_or_path": "google/base"}
    done = rehearse(STAGE1, options_of(options), family)

    assert done["passed"], done
    assert done["steps"] == 4
    assert len(done["losses"]) == 4
    assert len(done["validation_losses"]) == 2
    assert done["proof"]["passed"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rehearsal_that_fails_says_why(tmp_path):
    done = rehearse(STAGE1, options_of({"dataset_name": "nowhere", "output_dir": tmp_path}), "gemma3")

    assert not done["passed"]
    assert "nowhere is neither a folder here nor a dataset" in done["error"]


@pytest.fixture
def started(monkeypatch):
    """The options of a rehearsal that is not run: it takes too long."""
    options = {}

    def run(command, timeout, **_):
        flags = [str(part) for part in command]
        options.update({flag: flags[place + 1] for place, flag in enumerate(flags) if flag.startswith("--")})
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(dry_run.subprocess, "run", run)
    return options


@pytest.mark.parametrize(
    ("sample", "metric", "asked", "chooses"),
    [
        (48, "eval_tooth_accuracy", "48", "eval_tooth_accuracy"),
        (500, "eval_tooth_accuracy", "4", "eval_loss"),
        (48, "eval_loss", "4", "eval_loss"),
        (0, "eval_loss", "0", "eval_loss"),
    ],
)
def test_a_rehearsal_asks_enough_rows_for_what_chooses_the_best_step(started, sample, metric, asked, chooses):
    options = options_of({"dataset_name": "data", "validation_sample": sample, "metric_for_best_model": metric})
    done = rehearse(STAGE1, options, "gemma3")

    assert (started["--validation_sample"], started["--metric_for_best_model"]) == (asked, chooses)
    assert not done["passed"]
    assert done["error"].startswith("4 steps did not end within 1800 seconds: rehearse with a smaller batch")


@pytest.mark.slow
def test_a_rehearsal_runs_where_a_sampled_metric_chooses_the_best_step(vqa_dataset, tmp_path):
    options = {"dataset_name": vqa_dataset, "output_dir": tmp_path / "real", "validation_sample": 24}
    metric = {"metric_for_best_model": "eval_region_accuracy", "greater_is_better": "true"}  # no case in 4 rows
    done = rehearse(STAGE1, options_of(options | metric), "gemma3")

    assert done["passed"], done


def test_a_family_without_a_small_model_cannot_be_rehearsed():
    with pytest.raises(InputError, match="no small model of the family 'qwen3_vl'"):
        rehearse(STAGE1, [], "qwen3_vl")


def test_features_that_have_no_folder_to_lie_in_are_told(look, tmp_path):
    (tmp_path / "file").write_text("")

    assert look(feature_cache=tmp_path / "folder").refusals == []
    assert "no folder that can be written to" in look(feature_cache=tmp_path / "file").refusals[0]


def test_pictures_count_by_what_they_show_and_not_by_what_they_are_called(look, tmp_path):
    pictures = [Image.new("RGB", (20, 20), (shade, 0, 0)) for shade in (10, 200)]
    rows = [
        chat("What is it?", "Caries.", images=[pictures[number % 2]], image_id=f"p{number}") for number in range(40)
    ]

    assert look(dataset_name=make_dataset(tmp_path / "data", rows)).facts["features"]["pictures"] == 2
