"""The loss before anything is learned: far above a model's own it means broken inputs or weights, not a hard task."""

from __future__ import annotations

import math
import warnings

from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data_builders.records import InputError

# Nats per answer token. An instruct model answers questions it was never trained on at 1 to 4; even with wrong answers
# it knows how answers look. Broken inputs and weights begin at 8 to 30 (ms-swift#9078: 30). Uniform guessing costs
# ln(vocabulary): 12.5 for the Gemmas, which no sound model exceeds.
NORMAL = {"gemma3": 6.0, "gemma4": 6.0}
NORMAL_SHARE = 0.5  # of uniform guessing, for any other family


def check_first_loss(loss: float, architecture: PretrainedConfig) -> str | None:
    """A warning, as a sentence, for a first loss that is high for its family; None for a normal one.

    Small rehearsal models have random weights: they are wrong with confidence, and only a loss that is no number stops
    them.

    Raises:
        InputError: for a loss that no sound model has: not a number, or above uniform guessing.
    """
    if not math.isfinite(loss):
        raise InputError(f"the first loss is {loss}: check precision (float16 overflows) and the weights of the base")
    if getattr(architecture, "rehearsal", False):
        return None
    guessing = math.log(architecture.get_text_config().vocab_size)
    if loss >= guessing:
        raise InputError(
            f"the first loss is {loss:.1f}, worse than guessing among all words ({guessing:.1f}): the weights were "
            "loaded wrong, or the inputs are not what the model knows"
        )
    normal = NORMAL.get(architecture.model_type, NORMAL_SHARE * guessing)
    if loss <= normal:
        return None
    return (
        f"the first loss is {loss:.1f}, where up to {normal:.1f} is normal for {architecture.model_type}: look at the "
        "rendered prompts, the chat template and the base before you go on"
    )


class DivergedError(InputError):
    """A run whose loss or gradients are no numbers any more."""

    exit_code = 1


class FirstLoss(TrainerCallback):
    """Applies `check_first_loss` to the first loss that a run logs, and stops a run that diverges later.

    A run that is resumed has had its first.
    """

    def __init__(self, architecture: PretrainedConfig) -> None:
        self.architecture = architecture
        self.seen = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.seen = state.global_step > 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        logs = logs or {}
        if not self.seen and "loss" in logs:
            self._look_at_first(float(logs["loss"]))
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise DivergedError(
                    f"{name} is {logs[name]} at step {state.global_step}: the run diverged; lower learning_rate, or "
                    "go on from an earlier checkpoint with other settings"
                )

    def _look_at_first(self, loss: float) -> None:
        self.seen = True
        if warning := check_first_loss(loss, self.architecture):
            warnings.warn(warning, stacklevel=2)
