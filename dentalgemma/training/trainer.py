"""TRL's `SFTTrainer` with our collator, a validation loss that can be compared, and nothing sent or written unasked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, PreTrainedModel, ProcessorMixin
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import ModelConfig, SFTConfig, SFTTrainer

from data_builders.records import InputError
from dentalgemma.models.loading import check_output, find_start, keep_chain
from dentalgemma.models.parts import adapter_config, check_trainable, part_of, parts_table
from dentalgemma.models.processors import set_image_fit
from dentalgemma.training import checkpoints, memory_policy
from dentalgemma.training.backbone import check_packing, prepare_backbone, rest_tower, supports_features
from dentalgemma.training.config import StageConfig
from dentalgemma.training.curves import Curves
from dentalgemma.training.data import PICTURES, ChatCollator, check_pictures, count_without_images
from dentalgemma.training.data_wait import DataWait, say_wait
from dentalgemma.training.encoding import encode_pictures
from dentalgemma.training.features import FeatureCache, feature_key, feature_root, find_cache, why_not
from dentalgemma.training.first_loss import FirstLoss
from dentalgemma.training.lengths import LengthGroups, image_tokens, keep_fitting, set_epoch, with_column
from dentalgemma.training.memory import Batch
from dentalgemma.training.packing import ImageGroups
from dentalgemma.training.picture_names import name_pictures
from dentalgemma.training.precision import check_attention
from dentalgemma.training.proof import TrainingProof
from dentalgemma.training.sharding import check_architecture, check_rows, wrap_decoder_layers
from dentalgemma.training.validation import prepare_validation


class StageTrainer(SFTTrainer):
    """Trains the parts that a stage names on rows as the builders write them."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        stage: StageConfig,
        training: SFTConfig,
        model_config: ModelConfig,
        dataset: DatasetDict,
    ) -> None:
        set_image_fit(processor, stage.image_fit)
        self.rows = keep_fitting(dataset, processor, model.config, stage=stage, training=training)
        dataset = self.rows.dataset
        self.stage = stage
        if stage.pack_questions > 1:
            check_packing(model.config)
        self.validation = prepare_validation(stage, training, dataset[stage.dataset_test_split], processor)
        patience = stage.early_stopping_patience
        self.start = find_start(model_config.model_name_or_path, model_config.model_revision)
        check_output(self.start, Path(training.output_dir))
        config = adapter_config(model, model_config, stage.trains)
        config.revision = self.start.revision
        check_architecture(model.config, training)
        check_attention(model.config, model_config.attn_implementation)
        for split in (stage.dataset_train_split, stage.dataset_test_split):
            check_rows(dataset[split], training, split=split, trains=stage.trains)
        super().__init__(
            model=model,
            args=training,
            train_dataset=dataset[stage.dataset_train_split],
            eval_dataset=dataset[stage.dataset_test_split],
            processing_class=processor,
            data_collator=ChatCollator(processor),  # of evaluations, which stay unpacked; `encode` adds the features
            peft_config=config,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)] if patience else None,
        )
        wrap_decoder_layers(self.accelerator, self.model)
        # Gemma 4 says False, and transformers would average batches of unequal length; TRL's loss scales by itself.
        self.model_accepts_loss_kwargs = True
        _keep_full_precision(self.model, training)
        self.parts = check_trainable(self.model, stage.trains)
        check_pictures(dataset[stage.dataset_train_split], stage.trains, stage.dataset_name)
        if self.is_world_process_zero():
            Console(stderr=True).print(parts_table(self.parts))
        self.proof = TrainingProof(self.model, training)
        self.add_callback(self.proof)
        self.add_callback(Curves(stage.stage))
        self.add_callback(FirstLoss(model.config))
        self._prepare_pictures(dataset)
        self.settings = vars(stage) | training.to_dict() | vars(model_config)
        self.settings["vision_features"] = "live" if self.live else "cached"
        self.wait = DataWait(training.dataloader_num_workers, cached=not self.live)
        self.stop = checkpoints.StopSignal()
        self.evaluation_due = self.stopping = False
        self.add_callback(checkpoints.StepHooks(self))
        self.memory: dict[str, object] | None = None
        self.plan = None
        if stage.memory == "auto":
            self.settle = self._measure_rows(model_config)
            self.plan = self.settle()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: object) -> TrainOutput:
        """Train, or go on from a checkpoint that is complete and of the same run; `auto` takes the newest.

        Raises:
            CheckpointError: when there is none to go on from, or data, settings or processes are others.
            StoppedBySignal: after SIGTERM or SIGINT, with a complete checkpoint; what follows training must not run.
        """
        if self.plan is not None and self.args.resume_from_checkpoint != resume_from_checkpoint:
            self.args.resume_from_checkpoint = resume_from_checkpoint
            self.plan = self.settle()  # a resumed run keeps its micro-batch
        self.resume = checkpoints.prepare_resume(self, resume_from_checkpoint)
        self.encode()
        if self.plan is not None:
            self.plan = memory_policy.confirm(self, self.plan, self.loads)
            if self.resume.run is not None:
                self.resume.run["configuration"] = checkpoints.describe_settings(self)
        self.started, self.seconds_before = time.monotonic(), 0.0
        self.wait.begin()
        if self.is_world_process_zero():
            keep_chain(self.start, Path(self.args.output_dir))
            # What an earlier run in this folder recorded is not about what will be written now.
            (Path(self.args.output_dir) / "run_facts.json").unlink(missing_ok=True)
        checkpoints.check_shared(Path(self.args.output_dir), self.accelerator)
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # `_save_checkpoint` rotates
        self.checkpoints_kept = keep
        try:
            with self.stop:
                folder = self.resume.folder
                output = super().train(resume_from_checkpoint=str(folder) if folder else None, **kwargs)
        except checkpoints.EvaluationInterrupted:
            raise checkpoints.stopped(self) from None
        finally:
            self.args.save_total_limit = keep
        if self.must_stop() and checkpoints.is_saved(self):
            raise checkpoints.stopped(self)
        return output

    def _prepare_pictures(self, dataset: DatasetDict) -> None:
        """How pictures reach the language model: `live` says why the tower must see them, None that it need not."""
        stage, processor = self.stage, self.processing_class
        self.packing_collator = ChatCollator(
            processor, pack_questions=stage.pack_questions, pack_texts=stage.pack_texts
        )
        rest_tower(self.model)
        if supports_features(self.model):
            prepare_backbone(self.model)
        self.live = self._must_stay_live(dataset)
        self.train_dataset, self.eval_dataset = map(_name_pictures, (self.train_dataset, self.eval_dataset))
        self.features: FeatureCache | None = None
        self.pictures: int | None = None

    def encode(self) -> None:
        """Encode every picture that the cache lacks, once; a run whose tower must see live does nothing here."""
        if self.live or self.features is not None:
            return
        precision = self.accelerator.mixed_precision
        key = feature_key(self.model, self.processing_class, mixed_precision=precision)
        cache = find_cache(feature_root(self.stage.feature_cache), key)
        self.features = self.data_collator.features = self.packing_collator.features = cache
        self.train_dataset, self.eval_dataset = splits = self._encode(self.train_dataset, self.eval_dataset)
        self.pictures = len({name for rows in splits for names in rows[PICTURES][:] for name in names})

    def _encode(self, *splits: Dataset) -> list[Dataset]:
        """Encode the pictures of splits; their bytes need not be read any more, and go."""
        encode_pictures(
            self.features,
            splits,
            model=self.model,
            processor=self.processing_class,
            accelerator=self.accelerator,
        )
        return [rows.remove_columns("images") if "images" in rows.column_names else rows for rows in splits]

    def _measure_rows(self, model_config: ModelConfig) -> Callable[[], memory_policy.Plan]:
        """What chooses micro-batch and checkpointing, by the longest row and the most pictures of any."""
        lengths = self.rows.lengths[self.stage.dataset_train_split]
        tokens = [sum(counts) for counts in image_tokens(self.train_dataset, self.processing_class)]
        self.loads = memory_policy.Rows(
            lengths,
            [tuple(names) for names in self.train_dataset[PICTURES][:]],
            tokens,
            questions=self.stage.pack_questions,
            cuts=memory_policy.count_cuts(self.args, self.args.world_size),
        )
        longest, seen = (self._measure(max(range(len(own)), key=own.__getitem__)) for own in (lengths, tokens))
        row = replace(longest, images=max(longest.images, seen.images, key=sum))
        vision = "live" if self.live else "cached"
        choice = {"model_config": model_config, "trains": self.stage.trains, "vision": vision}
        return partial(memory_policy.settle, self, row, self.loads, **choice)

    def _measure(self, number: int) -> Batch:
        return memory_policy.measure_row(self.train_dataset[number], self.processing_class)

    def _must_stay_live(self, dataset: DatasetDict) -> str | None:
        """Why the tower must see each picture anew, None where its features are cached.

        Raises:
            InputError: when cached features were asked for and cannot be.
        """
        if self.stage.vision_features == "live":
            return "vision_features: live"
        if all(count_without_images(rows) == len(rows) for rows in (self.train_dataset, self.eval_dataset)):
            return "there are no images"
        reason = why_not(self.model, self.processing_class, datasets=dataset.values())
        if reason and self.stage.vision_features == "cached":
            raise InputError(f"vision_features: cached: {reason}; set `vision_features: live`")
        if reason and self.is_world_process_zero():
            Console(stderr=True).print(f"The tower sees each picture anew in every step: {reason}")
        return reason

    def must_stop(self) -> bool:
        """Whether a signal came to any process; all processes ask together."""
        if self.stop.name:
            self.accelerator.set_trigger()
        self.stopping = self.stopping or self.accelerator.check_trigger()
        return self.stopping

    def interrupt_evaluation(self) -> None:
        """Leave an evaluation when a signal came; all processes call it, once per batch."""
        if self.is_in_train and self.must_stop():
            raise checkpoints.EvaluationInterrupted

    def evaluate(self, eval_dataset: Dataset | None = None, *args: object, **kwargs: object) -> dict[str, float]:
        """Evaluate without a trace in the random states: what is trained after it stays the same."""
        self.encode()
        if eval_dataset is not None and self.features is not None and PICTURES not in eval_dataset.column_names:
            (eval_dataset,) = self._encode(_name_pictures(eval_dataset))
        with checkpoints.unchanged_randomness():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one step; how long they let it wait is counted, and not what the GPU has still to do."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        warning = self.wait.end_step()
        if self.is_world_process_zero():
            say_wait(warning)
        return super().get_batch_samples(self.wait.watch(epoch_iterator), num_batches, device)

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Log, with the share of the time that training waited for its data."""
        if "loss" in logs:
            logs["data_wait"] = self.wait.take_share()
        super().log(logs, *args, **kwargs)

    def _run_epoch(self, **kwargs: object) -> None:
        if checkpoints.is_finished(self):
            self.control.should_training_stop = True
        else:
            set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
            super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, model: nn.Module, *args, **kwargs
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except checkpoints.EvaluationInterrupted:
            self.evaluation_due = True
            self._save_checkpoint(model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self.stopping:
            raise checkpoints.stopped(self)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save, then list every file in a manifest, then delete what is no longer needed: in this order."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with checkpoints.writing(folder, self.accelerator):
            super()._save_checkpoint(model, trial)
            checkpoints.complete(self, folder)
        # A signal may have come while it was written; another step first would only cost time.
        self.must_stop()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            checkpoints.check_adapter_keys(Path(resume_from_checkpoint), self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        checkpoints.check_best(self)
        self.proof.look()
        super()._load_best_model()

    def _load_callback_state(self) -> None:
        checkpoints.restore_state(self)

    def _get_dataloader(self, *args: object, is_training: bool = False, **kwargs: object) -> DataLoader:
        for_evaluation = self.data_collator
        if is_training:
            self.data_collator = self.packing_collator
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = for_evaluation
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(checkpoints.ignore_signals, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        order = {
            "seed": self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            "epoch": lambda: int(self.state.epoch or 0),
        }
        if self.args.train_sampling_strategy == "group_by_length":
            rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroups(rows, self.train_dataset[self.args.length_column_name][:], **order)
        if self.args.train_sampling_strategy == "random" and self.stage.pack_questions > 1:
            pictures = [tuple(names) for names in self.train_dataset[PICTURES][:]]
            return ImageGroups(self.args.train_batch_size, pictures, questions=self.stage.pack_questions, **order)
        return super()._get_train_sampler(train_dataset)

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """One validation batch; its answer tokens are counted for `evaluation_loop`."""
        self.interrupt_evaluation()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        counted = (-outputs.log_probs, outputs.is_top1, outputs.label_mask)
        per_row = torch.stack([values.float().sum(1) for values in counted], dim=1)
        # Of rows that a distributed sampler shows twice to fill its last batch, only one is gathered.
        self._answer_tokens += self.accelerator.gather_for_metrics(per_row).sum(0).cpu()
        return per_row[:, 0].sum() / per_row[:, 2].sum().clamp(min=1), None, None

    def evaluation_loop(self, *args: object, metric_key_prefix: str = "eval", **kwargs: object) -> EvalLoopOutput:
        """The validation loss is the mean over answer tokens.

        transformers takes the mean of batch means, which weighs short answers more and changes with batch size and
        number of processes; the best checkpoint is chosen by it.
        """
        self._answer_tokens = torch.zeros(3)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, right, tokens = self._answer_tokens.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1)
        output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = right / max(tokens, 1)
        if self.validation and metric_key_prefix == "eval":
            output.metrics.update({f"eval_{name}": value for name, value in self.validation.evaluate(self).items()})
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # PEFT puts a card full of "[More Information Needed]" beside every adapter.
        (Path(output_dir or self.args.output_dir) / "README.md").unlink(missing_ok=True)
        # transformers pickles its arguments here, with any token among them, and nothing of ours reads them.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write no card: TRL's names no base model and the wrong task; `dentalgemma card` writes the real one."""

    def _send_telemetry(self) -> None:
        """Send nothing: training data may be about patients, and whoever trains was not asked."""


def _name_pictures(rows: Dataset) -> Dataset:
    return with_column(rows, PICTURES, name_pictures(rows))


def _keep_full_precision(model: nn.Module, training: SFTConfig) -> None:
    """Hold trained weights in fp32: small steps would be lost in 16 bits.

    PEFT does so for LoRA, but not for `modules_to_save`, and TRL turns it back for quantised bases (trl 1.16, peft
    0.21). ZeRO-3 wants one dtype, and keeps an fp32 copy of its own.
    """
    plugin = training.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize == 2:
            if "lora_" not in name and not (training.bf16 or training.fp16):
                raise InputError(f"{part_of(name)} trains in full: set `bf16: true`, or `dtype: float32` on a CPU")
            parameter.data = parameter.data.float()
