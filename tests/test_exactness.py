"""Loss and gradients are the same whether the tower runs or its output is read, rows stand alone or share a picture.

Small Gemmas in fp32 with sliding and full layers, projectors and adapters that are not zero; real rows through cache,
collator and the loss that the recipes train with. What is slightly wrong must differ a thousand times more.
"""

import itertools
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from datasets import Image, List, load_dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS, PARTS
from dentalgemma.models.processors import load_processor
from dentalgemma.training import backbone as hook
from dentalgemma.training.backbone import backbone_of, make_masks, prepare_backbone
from dentalgemma.training.data import PICTURES, ChatCollator
from dentalgemma.training.encoding import encode_pictures
from dentalgemma.training.features import FeatureCache, feature_key
from dentalgemma.training.picture_names import name_pictures

SAME = 1e-5  # of the largest gradient: the same sums in another order
WRONG = 1e-2
LANGUAGE_MODEL, WITH_ALIGNER = ("language_model",), ("language_model", "aligner")


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def folder(request, tiny_model, tiny_gemma4):
    return {"gemma3": tiny_model, "gemma4": tiny_gemma4}[request.param]


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def load(folder):
    """`load(window=16, trains=WITH_ALIGNER)`: see `load_small`."""
    return partial(load_small, folder)


def load_small(folder, window=64, trains=LANGUAGE_MODEL, attention="sdpa"):
    """A model whose adapter changes something, ready for our batches."""
    config = AutoConfig.from_pretrained(folder)
    config.text_config.sliding_window = window
    model = AutoModelForImageTextToText.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=attention
    )
    add_fused_lm_head(model)
    aligner = [name for name in PARTS["aligner"] if hasattr(model.model, name)]
    adapter = LoraConfig(
        r=4, target_modules=LANGUAGE_MODEL_LAYERS, modules_to_save=aligner if "aligner" in trains else None
    )
    model = get_peft_model(model, adapter)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    prepare_backbone(model)
    return model.train()


@pytest.fixture(scope="module")
def rows(vqa_dataset):
    """Three questions about one picture, two about another and one about a third, in mixed order."""
    dataset = load_dataset(str(vqa_dataset), split="train").cast_column("images", List(Image(decode=False)))
    by_picture = {}
    for number, image_id in enumerate(dataset["image_id"]):
        by_picture.setdefault(image_id, []).append(number)
    a, b, c = itertools.islice((own for own in by_picture.values() if len(own) >= 3), 3)
    chosen = dataset.select([a[0], b[0], a[1], c[0], b[1], a[2]])
    return chosen.add_column(PICTURES, name_pictures(chosen))


@pytest.fixture(scope="module")
def batches(rows, load, processor, tmp_path_factory):
    """The rows as a batch with pixels, with stored features, and with stored features and shared pictures."""
    model = load()
    cache = FeatureCache(tmp_path_factory.mktemp("features"), feature_key(model, processor, mixed_precision="no"))
    encode_pictures(cache, [rows], model=model, processor=processor, accelerator=Accelerator(cpu=True))
    collators = {
        "live": ChatCollator(processor),
        "cached": ChatCollator(processor, cache),
        "packed": ChatCollator(processor, cache, pack_questions=3),
    }
    return {name: collator(list(rows)) for name, collator in collators.items()}


@pytest.fixture(scope="module")
def reference(load, batches):
    """A model with a window shorter than the distance of two questions, and loss and gradients of the live batch."""
    model = load(window=16)
    return model, step(model, batches["live"])


def step(model, batch):
    """Loss, and gradients by name, as the trainer computes them."""
    model.zero_grad()
    tokens = int((batch["labels"] != -100).sum())
    loss = model(**batch, fused_lm_head=True, num_items_in_batch=tokens).loss
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def difference(got, expected):
    """max |difference| of the gradients / max |gradient|, or of the losses / loss, whichever is larger."""
    (loss, gradients), (expected_loss, expected_gradients) = got, expected
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    furthest = max((gradients[name] - value).abs().max().item() for name, value in expected_gradients.items())
    return max(furthest / largest, abs(loss - expected_loss) / expected_loss)


CASES = [(64, LANGUAGE_MODEL), (16, WITH_ALIGNER), (3, LANGUAGE_MODEL)]
REST = [case for case in itertools.product((64, 16, 3), (LANGUAGE_MODEL, WITH_ALIGNER)) if case not in CASES]


@pytest.mark.parametrize(
    ("window", "trains"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_stored_features_train_bit_by_bit_as_live_ones_and_shared_pictures_as_separate_ones(
    window, trains, load, batches
):
    model = load(window, trains)
    live = step(model, batches["live"])

    assert any("lora_A" in name and gradient.any() for name, gradient in live[1].items())
    assert any("modules_to_save" in name for name in live[1]) == ("aligner" in trains)
    assert difference(step(model, batches["cached"]), live) == 0.0
    assert difference(step(model, batches["packed"]), live) <= SAME


def test_eager_attention_takes_the_masks_as_well(load, batches, reference):
    model = load(window=16)
    model.get_base_model().set_attn_implementation("eager")

    assert difference(step(model, batches["packed"]), reference[1]) <= SAME


def test_what_is_left_between_shared_and_separate_is_rounding(load, batches):
    cached, packed = (
        {key: value.double() if value.is_floating_point() else value for key, value in batches[name].items()}
        for name in ("cached", "packed")
    )
    model = load(window=16, trains=WITH_ALIGNER).double()

    # Norms and softmax stay in fp32 by themselves: not 1e-14.
    assert difference(step(model, packed), step(model, cached)) <= SAME / 20


def test_the_batches_are_what_they_claim_to_be(batches, processor):
    live, cached, packed = batches.values()

    assert "pixel_values" in live and "pixel_values" not in cached and "segment_ids" not in cached
    assert packed["segment_ids"].max(1).values.tolist() == [3, 2, 0]
    assert 2 * len(packed["image_features"]) == len(cached["image_features"])  # three pictures, not six
    for batch in (cached, packed):
        assert (batch["labels"] != -100).sum() == (live["labels"] != -100).sum()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda features: features.roll(len(features) // 3, 0), id="another picture's"),
        pytest.param(lambda features: features + 0.1 * features.std() * noise(features), id="noise"),
    ],
)
def test_other_features_train_otherwise(spoil, batches, reference):
    model, live = reference
    batch = batches["packed"]

    assert difference(step(model, batch | {"image_features": spoil(batch["image_features"])}), live) > WRONG


def noise(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3))


def test_a_window_counted_by_place_trains_otherwise(batches, reference, monkeypatch):
    model, live = reference
    make = hook.make_masks

    def by_place(backbone, ids, segments, positions):
        places = torch.arange(ids.shape[1]).expand_as(positions)
        return make(backbone, ids, segments, places)

    monkeypatch.setattr(hook, "make_masks", by_place)

    assert difference(step(model, batches["packed"]), live) > WRONG


def test_image_tokens_that_see_only_what_precedes_them_train_otherwise(batches, reference, monkeypatch):
    model, live = reference
    monkeypatch.setattr(hook, "get_block_sequence_ids_for_mask", lambda types: torch.full_like(types, -1))

    assert difference(step(model, batches["packed"]), live) > WRONG


@pytest.mark.parametrize("left_out", [{"segment_ids"}, {"segment_ids", "attention_mask"}])
def test_positions_alone_do_not_keep_questions_apart(left_out, batches, reference):
    model, live = reference
    batch = {key: value for key, value in batches["packed"].items() if key not in left_out}

    assert difference(step(model, batch), live) > WRONG


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant, load, batches):
    model = load(window=16, trains=WITH_ALIGNER)
    stored = step(model, batches["packed"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    assert difference(step(model, batches["packed"]), stored) == 0.0


def test_evaluation_without_gradients_gives_the_same_loss(batches, reference):
    model, (live, _) = reference

    with torch.no_grad():
        losses = [model(**batches[name], fused_lm_head=True).loss.item() for name in ("live", "cached", "packed")]

    assert losses[0] == losses[1] == pytest.approx(live, rel=1e-6)
    assert losses[2] == pytest.approx(live, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_compute_the_gradients_of_one(sharded, folder, load, batches, tmp_path):
    packed = batches["packed"]
    tokens = len(packed["image_features"]) // 3
    lines = [
        {
            key: value[line * tokens : (line + 1) * tokens] if key == "image_features" else value[line : line + 1]
            for key, value in packed.items()
        }
        for line in range(2)
    ]
    both = {key: torch.cat([line[key] for line in lines]) for key in packed}
    torch.save(lines, tmp_path / "lines.pt")

    torch.multiprocessing.spawn(compute_share, (folder, tmp_path, sharded), nprocs=2)

    together = torch.load(tmp_path / "gradients.pt")
    loss, alone = step(load(window=16, trains=WITH_ALIGNER), both)
    assert difference((loss, together), (loss, alone)) <= SAME


def compute_share(rank, folder, shared, sharded):
    """One of two processes: the gradients of its line, averaged; the first process writes them down."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{shared}/meet", rank=rank, world_size=2)
    lines = torch.load(shared / "lines.pt")
    model = load_small(folder, window=16, trains=WITH_ALIGNER)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in backbone_of(model).language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    tokens = sum(int((line["labels"] != -100).sum()) for line in lines)
    model(**lines[rank], fused_lm_head=True, num_items_in_batch=tokens / 2).loss.backward()
    gradients = {
        name.removeprefix("module."): getattr(value.grad, "full_tensor", lambda: value.grad)()  # noqa: B023
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    if rank == 0:
        torch.save(gradients, shared / "gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("window", [16, 3])
def test_a_row_alone_gets_the_masks_that_transformers_makes(window, load, batches):
    model = load(window)
    backbone = backbone_of(model)
    batch = {key: value for key, value in batches["cached"].items() if key != "labels"}
    seen = {}
    backbone.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    tokens = batch["attention_mask"].bool()
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    ours = make_masks(backbone, batch["input_ids"], torch.where(tokens, 0, -1), positions)

    assert ours.keys() == seen.keys() == {"full_attention", "sliding_attention"}
    for layer_type, mask in ours.items():
        assert torch.equal(mask.squeeze(1)[tokens], seen[layer_type].squeeze(1)[tokens])
    # The control: the two kinds of layers do not see the same.
    assert not torch.equal(ours["full_attention"], ours["sliding_attention"])


@pytest.fixture(scope="module")
def texts(rows):
    """Rows without pictures, three of them longer than any window here."""
    system, asked = rows[0]["prompt"]
    return [
        {
            "row_id": row["row_id"],
            "prompt": [system, {**asked, "content": " ".join([row["prompt"][-1]["content"]] * times)}],
            "completion": row["completion"],
        }
        for row, times in zip(rows, (1, 4, 7, 3), strict=False)
    ]


@pytest.mark.parametrize(
    ("attention", "window"),
    [
        ("sdpa", 16),
        ("eager", 64),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("sdpa", 3), ("sdpa", 64)]),
    ],
)
def test_texts_end_to_end_train_as_texts_apart(attention, window, load, texts, processor):
    model = load(window, attention=attention)
    apart = ChatCollator(processor)(texts)
    together = ChatCollator(processor, pack_texts=True)(texts)
    expected = step(model, apart)

    assert apart["attention_mask"].sum(1).sort().values[1] > window
    assert together["input_ids"].shape == (1, apart["attention_mask"].sum())
    assert difference(step(model, together), expected) <= SAME
    # The controls: nothing but positions without an attention mask keeps the rows apart.
    everything = torch.ones_like(together["input_ids"])
    assert difference(step(model, together | {"attention_mask": everything}), expected) > WRONG
    one_text = {key: value for key, value in together.items() if key != "position_ids"}
    assert difference(step(model, one_text), expected) > WRONG
