"""TRL's `SFTTrainer` with our collator, a validation loss that can be compared, and nothing sent or written unasked."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import DatasetDict
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput
from trl import ModelConfig, SFTConfig, SFTTrainer

from dentalgemma.models.parts import adapter_config
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import ChatCollator


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
        patience = stage.early_stopping_patience
        super().__init__(
            model=model,
            args=training,
            train_dataset=dataset[stage.dataset_train_split],
            eval_dataset=dataset[stage.dataset_test_split],
            processing_class=processor,
            data_collator=ChatCollator(processor),
            peft_config=adapter_config(model_config, stage.trains),
            callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)] if patience else None,
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """One validation batch; its answer tokens are counted for `evaluation_loop`."""
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
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # PEFT puts a card full of "[More Information Needed]" beside every adapter.
        (Path(output_dir or self.args.output_dir) / "README.md").unlink(missing_ok=True)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write no card: TRL's names no base model and the wrong task; `dentalgemma card` writes the real one."""

    def _send_telemetry(self) -> None:
        """Send nothing: training data may be about patients, and whoever trains was not asked."""
