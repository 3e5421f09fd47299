"""TRL's `SFTTrainer` with our collator, early stopping, and without what it sends and writes unasked."""

from __future__ import annotations

from transformers import EarlyStoppingCallback, PreTrainedModel, ProcessorMixin
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
        dataset,
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

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write no card: TRL's names no base model and the wrong task; `dentalgemma card` writes the real one."""

    def _send_telemetry(self) -> None:
        """Send nothing: training data may be about patients, and whoever trains was not asked."""
