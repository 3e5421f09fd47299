"""What a training step needs: memory on each GPU and floating-point operations.

Nothing is guessed from a parameter count. The model's own code, with its adapter, runs forward and backward on tensors
that have a shape and a type but no values (PyTorch's fake tensors), and what is alive at each moment is added up. That
takes seconds on a laptop, also for a model that would fill eight GPUs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from trl import ModelConfig, SFTConfig

from dentalgemma.models.loading import fold_adapters
from dentalgemma.models.parts import adapter_config, part_of

GIB = 2**30
# CUDA's context with cuBLAS and cuDNN, plus what the caching allocator rounds up: commonly 0.5 to 0.8 GiB.
CONTEXT = int(0.7 * GIB)
# The share of the peak multiplication rate that a step reaches. The runs that DentalGemma's first model card records
# reached 0.07 (one row at a time); large batches reach 0.4 to 0.5. Time from it is an estimate, and called so.
UTILISATION = 0.3
# TRL's fused head scores this many tokens and words of the vocabulary at a time (trl 1.16, kernels/chunked_logprob.py).
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
# Bytes per trained number in AdamW's two moments; torch's own keep the type of the weight, fp32 here.
OPTIMIZER_BYTES = {"8bit": 2, "adafactor": 0.1, "sgd": 0}
TIGHT = 0.85  # of the GPU's memory: the estimate is good to about 15 %


class Gpu(NamedTuple):
    """A GPU: memory that PyTorch can allocate, compute capability, dense TFLOP/s in the format that training uses."""

    gib: float
    capability: tuple[int, int]
    tflops: float


# Data sheets of NVIDIA: dense bf16 with fp32 accumulation (where the sheet counts sparsity: half). Below capability 8
# there is no bf16 and training multiplies in fp32. Memory is what `torch.cuda.mem_get_info` reports as total.
GPUS = {
    "p100": Gpu(15.9, (6, 0), 9.3),
    "v100": Gpu(15.8, (7, 0), 15.7),
    "v100-32": Gpu(31.7, (7, 0), 15.7),
    "t4": Gpu(14.6, (7, 5), 8.1),
    "rtx3090": Gpu(23.6, (8, 6), 71),
    "rtx4090": Gpu(23.6, (8, 9), 165),
    "a10g": Gpu(22.1, (8, 6), 70),
    "l4": Gpu(22.0, (8, 9), 121),
    "l40s": Gpu(44.4, (8, 9), 362),
    "a100-40": Gpu(39.4, (8, 0), 312),
    "a100": Gpu(79.2, (8, 0), 312),
    "h100": Gpu(79.2, (9, 0), 989),
    "h200": Gpu(139.8, (9, 0), 989),
    "b200": Gpu(178.0, (10, 0), 2250),
}


@dataclass(frozen=True)
class Batch:
    """The sequences that one GPU takes at a time: how many, and for each tokens, answer tokens and image tokens.

    A sequence is a row of the dataset; where questions of one image are packed, it is `questions` rows.
    """

    rows: int
    tokens: int
    answer_tokens: int
    images: tuple[int, ...] = ()  # tokens of each image of a sequence
    questions: float = 1


class Trace(NamedTuple):
    """One training step on shapes: bytes alive at its peak beside weights and gradients, and its operations."""

    peak: int
    flops: int


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the peak of a training step."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    context: int = CONTEXT

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Sharding:
    """What the processes of a run share out among each other: `none` (one GPU), `ddp`, `zero2`, `zero3` or `fsdp`."""

    kind: str = "none"
    gpus: int = 1
    one_loads: bool = False  # only the first process reads the weights


def build_on_meta(
    architecture: PretrainedConfig, model_config: ModelConfig, trains: Sequence[str], adapters: Sequence = ()
) -> PeftModel:
    """The model with its adapter as a run would train it, every tensor a shape without values.

    Raises:
        InputError: for parts that cannot be trained, or `adapters` of another base.
    """
    dtype = weights_dtype(architecture, model_config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
        fold_adapters(model, adapters)
        adapted = get_peft_model(model, adapter_config(model, model_config, trains))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # as the trainer holds what it trains
    return adapted


def weights_dtype(architecture: PretrainedConfig, model_config: ModelConfig) -> torch.dtype:
    """The type that the frozen weights are loaded in."""
    if model_config.dtype in {"auto", None}:
        dtype = getattr(architecture, "dtype", None) or torch.bfloat16
    else:
        dtype = getattr(torch, model_config.dtype)
    # bf16 is as large as fp16, and autocast on a CPU mixes fp32 with no other.
    return torch.bfloat16 if dtype == torch.float16 else dtype


def trace_step(
    model: PeftModel, batch: Batch, *, checkpointing: bool, mixed_precision: bool, vision: str = "live"
) -> Trace:
    """Run one training step of a model made by `build_on_meta` on shapes alone; the model can be traced once.

    `vision` is how pictures reach the language model: `cached` features through the projector; `live` through the
    tower, which rests where it is frozen (`backbone.rest_tower`); `stock` as transformers and TRL alone have it, in the
    graph though frozen. A tower that trains is in the graph in any case.

    The fused head is left out: `head_bytes` and `head_flops` have it. Without a GPU, PyTorch's dispatch is that of the
    CPU, whose attention keeps the same tensors as the memory-efficient kernel of a GPU.
    """
    with FakeTensorMode():
        _give_shapes(model)
        inner: PreTrainedModel = model.get_base_model()
        model.train()
        if checkpointing:
            # Random numbers have no state here that checkpointing could keep.
            inner.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            model.enable_input_require_grads()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        alive = _Alive()
        for tensor in (*model.parameters(), *model.buffers()):
            alive.ignore(tensor)
            if tensor.grad is not None:
                alive.ignore(tensor.grad)
        with alive:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision):
                hidden = _forward(inner.model, batch, vision)
            if hidden.requires_grad:  # an aligner without images learns nothing
                hidden.sum().backward()
        return Trace(alive.peak, alive.flops)


def step_memory(
    model: PeftModel, trace: Trace, batch: Batch, training: SFTConfig, model_config: ModelConfig, sharding: Sharding
) -> Memory:
    """What one GPU holds at the peak of a step, by kind."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    adapters = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    gradients = adapters
    optimizer = int(numbers * _optimizer_bytes(training))
    weights = weight_bytes(model, model_config)
    parts, gathered = 1, 0
    if sharding.kind in {"zero2", "zero3", "fsdp"}:
        parts = sharding.gpus
        if sharding.kind.startswith("zero"):
            # DeepSpeed trains in bf16 and keeps an fp32 master copy of what it trains.
            adapters, gradients, optimizer = numbers * 2, numbers * 2, optimizer + numbers * 4
    if sharding.kind in {"zero3", "fsdp"}:
        gathered = 2 * _largest_block(model)  # one layer at work, the next one on its way
    if sharding.kind == "ddp":
        gradients *= 2  # its buckets are copies
    if model_config.load_in_4bit:
        # A layer is unpacked while it is at work.
        gathered += max(weight.numel() * weight.element_size() for weight in _quantised(model))
    cut = weights if sharding.kind in {"zero3", "fsdp"} else 0
    return Memory(
        weights=weights - cut + cut // parts + gathered,
        adapters=adapters // parts if sharding.kind in {"zero3", "fsdp"} else adapters,
        gradients=gradients // parts,
        optimizer=optimizer // parts,
        activations=trace.peak,
        head=head_bytes(model, batch),
    )


def weight_bytes(model: nn.Module, model_config: ModelConfig) -> int:
    """Bytes of the frozen weights as they are loaded, tied ones once: 4-bit and 8-bit layers with their scales."""
    per_number = None
    if model_config.load_in_4bit:
        # Half a byte, and a scale for each block of 64: in fp32, or once more quantised in blocks of 256.
        per_number = 0.5 + ((1 + 4 / 256) / 64 if model_config.use_bnb_nested_quant else 4 / 64)
    elif model_config.load_in_8bit:
        per_number = 1.0
    quantised = {id(weight) for weight in _quantised(model)}
    total = 0.0
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.requires_grad:
            small = per_number is not None and id(tensor) in quantised
            total += tensor.numel() * (per_number if small else tensor.element_size())
    return int(total)


def head_bytes(model: PeftModel, batch: Batch, *, fused: bool = True) -> int:
    """Bytes of scoring a batch's answers: TRL's fused head in tiles, or all logits with their gradient in fp32."""
    text = model.get_base_model().config.get_text_config()
    if not fused:
        return batch.rows * batch.tokens * text.vocab_size * 4 * 2
    scored = batch.rows * batch.answer_tokens
    tile = min(scored, HEAD_TOKENS) * min(text.vocab_size, HEAD_WORDS) * 4
    return tile + scored * text.hidden_size * (4 + 2)  # and the gradient of the hidden states


def head_flops(architecture: PretrainedConfig, answer_tokens: float) -> float:
    """Operations of scoring so many answer tokens, forward and back to the hidden states; the head is frozen."""
    text = architecture.get_text_config()
    return 4 * answer_tokens * text.hidden_size * text.vocab_size


def feature_bytes(architecture: PretrainedConfig, image_tokens: int, dtype: torch.dtype) -> int:
    """Bytes on disk of the features of so many image tokens: the tower's pooled output, before the projector."""
    return image_tokens * architecture.vision_config.hidden_size * dtype.itemsize


def steps_of(rows: int, training: SFTConfig, gpus: int) -> tuple[int, int]:
    """Steps of an epoch and of the whole run, as the trainer counts them."""
    batches = -(-rows // (training.per_device_train_batch_size * gpus))
    epoch = max(1, -(-batches // training.gradient_accumulation_steps))
    return epoch, training.max_steps if training.max_steps > 0 else int(-(-epoch * training.num_train_epochs // 1))


def rows_per_second(flops_per_row: float, gpu: Gpu, gpus: int) -> float:
    """An estimate of the speed, at `UTILISATION` of the GPU's peak."""
    return gpus * gpu.tflops * 1e12 * UTILISATION / flops_per_row


def what_would_fit(
    batch: Batch, training: SFTConfig, model_config: ModelConfig
) -> list[tuple[str, Batch, bool, ModelConfig]]:
    """Milder settings to try when memory does not suffice, each with the option that a user would set."""
    checkpointing = "" if training.gradient_checkpointing else "--gradient_checkpointing true"
    fewer = ""
    if batch.rows > 1:
        accumulation = batch.rows * training.gradient_accumulation_steps
        fewer = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation}"
    one, four = replace(batch, rows=1), replace(model_config, load_in_4bit=True)
    packed = "" if model_config.load_in_4bit else "--load_in_4bit true"
    tries = [((checkpointing,), batch, model_config)] if checkpointing else []
    tries += [((fewer, checkpointing), one, model_config)] if fewer else []
    tries += [((fewer, checkpointing, packed), one, four)] if packed else []
    return [(" ".join(filter(None, words)), rows, True, settings) for words, rows, settings in tries]


def _optimizer_bytes(training: SFTConfig) -> float:
    name = str(getattr(training.optim, "value", training.optim))
    return next((number for word, number in OPTIMIZER_BYTES.items() if word in name), 8)


def _quantised(model: nn.Module) -> list[nn.Parameter]:
    """The weights that bitsandbytes packs: those of the language model's layers."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) == "language_model" and "lm_head" not in name.split(".")
        if not module.weight.requires_grad
    ]


def _largest_block(model: nn.Module) -> int:
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(
        (
            sum(parameter.numel() * parameter.element_size() for parameter in child.parameters())
            for block in blocks
            for child in block
        ),
        default=0,
    )


def _give_shapes(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones on the CPU, where autocast and attention do their work."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = _dropout_of(module.p)
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trainable = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trainable else fake
                store[name] = made[id(tensor)]


def _dropout_of(share: float):
    """Dropout as a GPU does it, keeping one byte per number; on the CPU it would keep a whole number."""
    return lambda x: torch.native_dropout(x, share, True)[0] if share else x


def _forward(inner: PreTrainedModel, batch: Batch, vision: str) -> torch.Tensor:
    """Hidden states of a batch. Image features are put in without looking for their places, which need values."""
    token_ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
    embeddings = inner.get_input_embeddings()(token_ids)
    extra = {}
    if getattr(inner.language_model, "hidden_size_per_layer_input", None):
        extra["per_layer_inputs"] = inner.language_model.get_per_layer_inputs(token_ids, None)
    if batch.images:
        features = [_see(inner, batch.rows, tokens, vision) for tokens in batch.images]
        features = [picture.reshape(batch.rows, -1, picture.shape[-1]).to(embeddings.dtype) for picture in features]
        rest = embeddings[:, sum(picture.shape[1] for picture in features) :]
        embeddings = torch.cat([*features, rest], dim=1)
    return inner.language_model(
        inputs_embeds=embeddings, attention_mask=_make_masks(embeddings, inner), use_cache=False, **extra
    ).last_hidden_state


def _make_masks(embeddings: torch.Tensor, inner: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Masks (sequences, 1, length, length) by layer type, as pictures, padding and packed questions need them.

    Attention makes numbers of them, and without checkpointing each layer keeps its own.
    """
    rows, length, _ = embeddings.shape
    kinds = sorted(set(inner.config.get_text_config().layer_types))
    return {kind: torch.ones(rows, 1, length, length, dtype=torch.bool) for kind in kinds}


def _see(inner: PreTrainedModel, pictures: int, tokens: int, vision: str) -> torch.Tensor:
    """What one picture of each sequence becomes, through the projector that learns or does not."""
    tower, gemma3 = inner.vision_tower, inner.config.model_type == "gemma3"
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    if vision == "cached" and not trains:
        seen = torch.zeros(pictures, tokens, inner.config.vision_config.hidden_size, dtype=inner.dtype)
    else:
        with torch.set_grad_enabled(trains or vision == "stock"):
            seen = _look_gemma3(tower, pictures) if gemma3 else _look_gemma4(tower, pictures, tokens)
    if not gemma3:
        return inner.embed_vision(inputs_embeds=seen)
    projector = inner.multi_modal_projector
    if seen.shape[1] != tokens:
        return projector(seen)  # which pools
    return projector.mm_soft_emb_norm(seen) @ projector.mm_input_projection_weight


def _look_gemma3(tower: nn.Module, pictures: int) -> torch.Tensor:
    pixels = torch.zeros(pictures, 3, tower.config.image_size, tower.config.image_size)
    return tower(pixel_values=pixels).last_hidden_state


def _look_gemma4(tower: nn.Module, pictures: int, tokens: int) -> torch.Tensor:
    """Piece by piece, since the tower strips padding by value."""
    patches = tokens * tower.config.pooling_kernel_size**2
    places = torch.zeros(pictures, patches, 2, dtype=torch.long)
    pixels = torch.zeros(pictures, patches, 3 * tower.config.patch_size**2)
    seen = tower.patch_embedder(pixels, places, torch.zeros(pictures, patches, dtype=torch.bool))
    mask = torch.ones(pictures, patches, dtype=torch.bool)
    seen = tower.encoder(inputs_embeds=seen, attention_mask=mask, pixel_position_ids=places).last_hidden_state
    pooled = seen.reshape(pictures, tokens, -1, seen.shape[-1]).float().mean(2)
    return pooled.to(seen.dtype)


class _Alive(TorchDispatchMode):
    """Adds up the memory of tensors from their making until nothing holds them any more, and operations on the way.

    PyTorch's own `FlopCounterMode` follows modules, and by that keeps every tensor alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known = WeakIdKeyDictionary()

    def ignore(self, tensor: torch.Tensor) -> None:
        self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        if count := _FLOPS.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size


def _attention(query: torch.Tensor, key: torch.Tensor, *_: object, **__: object) -> int:
    rows, heads, length, size = query.shape
    return 4 * rows * heads * length * key.shape[2] * size


def _attention_backward(_: object, query: torch.Tensor, key: torch.Tensor, *__: object, **___: object) -> int:
    return _attention(query, key) * 5 // 2  # the scores once more, then four products


# PyTorch counts the attention of GPUs, not that of the CPU.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
