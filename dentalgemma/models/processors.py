"""Load processors, also Gemma 4's on a machine without torchvision."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, ProcessorMixin
from transformers.utils import is_torchvision_available


class VideoSettings(dict):
    """The settings of a video processor, kept as they are for whoever loads the saved processor with torchvision."""

    _auto_class = None
    model_input_names: tuple[str, ...] = ()  # a trainer asks every part of a processor


class Gemma4Processor(transformers.Gemma4Processor):
    """Gemma 4's processor for text and still images: its video half is all that needs torchvision (transformers 5.23).

    It has the original's name, since that is what `save_pretrained` writes for others to load.
    """

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type | tuple[type, ...]:
        if argument_name == "video_processor":
            return VideoSettings
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, name: str, processor_dict: dict | None = None, **kwargs: object) -> list:
        return [
            AutoFeatureExtractor.from_pretrained(name, **kwargs),
            AutoImageProcessor.from_pretrained(name, **kwargs),
            cls._load_tokenizer_from_pretrained("tokenizer", name, **kwargs),
            VideoSettings((processor_dict or {}).get("video_processor") or {}),
        ]


def load_processor(name: str | Path, revision: str | None = None) -> ProcessorMixin:
    """Load the processor of a model folder or Hub id.

    Raises:
        OSError: as transformers does, when it is missing or gated.
    """
    name = str(name)
    kind = None if is_torchvision_available() else AutoConfig.from_pretrained(name, revision=revision).model_type
    loader = Gemma4Processor if kind == "gemma4" else AutoProcessor
    return loader.from_pretrained(name, revision=revision)
