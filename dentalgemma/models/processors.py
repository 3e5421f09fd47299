"""Load processors, also Gemma 4's on a machine without torchvision; how a picture is fitted to the vision tower."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import transformers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    Gemma3Processor,
    ProcessorMixin,
)
from transformers.utils import is_torchvision_available

from data_builders.records import InputError

IMAGE_FITS = ("stretch", "pan_and_scan")
CROP_OPTIONS = (
    "do_pan_and_scan",
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)


class ImageFitError(InputError):
    """A fit of pictures that a processor cannot make."""


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
    processor = loader.from_pretrained(name, revision=revision)
    if isinstance(processor, Gemma3Processor):
        _settle(processor)
    return processor


def image_fit(processor: ProcessorMixin) -> str | None:
    """How a processor fits pictures, one of `IMAGE_FITS`; None for a family that keeps each picture's shape."""
    if not isinstance(processor, Gemma3Processor):
        return None
    return "pan_and_scan" if crop_options(processor)["do_pan_and_scan"] else "stretch"


def crop_options(processor: Gemma3Processor) -> dict[str, bool | int | float]:
    """The options of pan and scan as the processor applies them, which need not be what its image processor says."""
    merged = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
    return {name: merged["images_kwargs"][name] for name in CROP_OPTIONS}


def set_image_fit(processor: ProcessorMixin, fit: str | None) -> None:
    """Stretch pictures to a square, or show crops of long ones as well (`pan_and_scan`); None keeps what is loaded.

    It is saved with the processor. `Gemma3Processor` lets defaults of its class overrule what its saved image
    processor says, and lets the tokenizer's saved settings overrule those (transformers 5.23): so the options stand in
    both, and whoever loads the folder with plain transformers gets the same crops. How large a crop must be and how
    many there may be is what the image processor says, else the class's default.

    Raises:
        ImageFitError: for a family without it.
    """
    if fit is None:
        return
    if fit not in IMAGE_FITS:
        raise ImageFitError(f"image_fit: {fit!r} is unknown; choose among {', '.join(IMAGE_FITS)}, or leave it out")
    if not isinstance(processor, Gemma3Processor):
        raise ImageFitError(
            f"image_fit: {fit}: {type(processor).__name__} has no such option, since Gemma 4 keeps each picture's "
            "shape, and other families fit pictures in ways of their own; leave image_fit out"
        )
    pictures, saved = processor.image_processor, processor.tokenizer.init_kwargs
    if fit == "stretch":
        for name in CROP_OPTIONS:
            saved.pop(name, None)
    else:
        for name in CROP_OPTIONS:
            own = getattr(pictures, name)
            saved[name] = processor.images_kwargs[name] if own is None else own
        saved["do_pan_and_scan"] = True
    _settle(processor)
    if image_fit(processor) != fit:
        raise ImageFitError(f"image_fit: transformers {transformers.__version__} does not take {fit} from a processor")


def _settle(processor: Gemma3Processor) -> None:
    """Let the image processor, which may be asked alone, make the crops that the whole processor makes."""
    options, pictures = crop_options(processor), processor.image_processor
    if options["do_pan_and_scan"]:
        for name, value in options.items():
            setattr(pictures, name, value)
    elif pictures.do_pan_and_scan:
        pictures.do_pan_and_scan = False


def take_image_fit(processor: ProcessorMixin, run: Path) -> None:
    """Fit pictures as an adapter was trained on them, where its folder holds a processor; else as the base does."""
    path = Path(run) / "tokenizer_config.json"
    if not isinstance(processor, Gemma3Processor) or not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not saved.get("do_pan_and_scan"):
        set_image_fit(processor, "stretch")
        return
    for name in CROP_OPTIONS:
        setattr(processor.image_processor, name, saved.get(name))
    set_image_fit(processor, "pan_and_scan")


def write_image_fit(processor: ProcessorMixin, folder: Path) -> None:
    """Write into the files of a model folder how its pictures are fitted; whatever else they say stays."""
    if not isinstance(processor, Gemma3Processor):
        return
    options = crop_options(processor)
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = Path(folder) / name
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        whole = json.loads(text)
        part = whole.get("image_processor", {}) if name == "processor_config.json" else whole
        if options["do_pan_and_scan"] and part:
            part.update(options)
        elif part.get("do_pan_and_scan"):
            part["do_pan_and_scan"] = False
        if whole != json.loads(text):
            path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def picture_tokens(processor: ProcessorMixin, height: int, width: int) -> int:
    """How many image tokens a Gemma processor makes of a picture of this size in pixels, those of its crops included.

    The size may be as stored or as displayed: a quarter turn does not change the number.
    """
    if isinstance(processor, Gemma3Processor):
        return processor.image_seq_length * (1 + count_crops(processor, height, width))
    return processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]


def count_crops(processor: Gemma3Processor, height: int, width: int) -> int:
    """How many crops follow a picture of this size, by the image processor's own rule."""
    options = crop_options(processor)
    if not options.pop("do_pan_and_scan"):
        return 0
    pictures = processor.image_processor
    crop = getattr(pictures, "pan_and_scan_batched", None) or pictures.pan_and_scan  # with torchvision, without
    return len(crop(np.broadcast_to(np.uint8(0), (3, height, width)), **options))


def write_picture(processor: ProcessorMixin, tokens: int) -> str:
    """What a Gemma processor writes in place of a picture that takes so many image tokens in all.

    Gemma 3 says of a picture with crops which is which, and crops take as many tokens each as the picture itself.
    """
    crops = 0
    if isinstance(processor, Gemma3Processor):
        pictures, rest = divmod(tokens, processor.image_seq_length)
        if rest or pictures < 1:
            raise ValueError(f"{tokens} image tokens are no multiple of the {processor.image_seq_length} of a picture")
        crops = pictures - 1
    return processor.replace_image_token({"num_crops": [crops], "num_soft_tokens_per_image": [tokens]}, 0)
