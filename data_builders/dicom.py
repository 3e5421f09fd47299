"""DICOM files as images: their pixels, and nothing of what they say about a patient.

Grey values are rescaled as the file states, brought to 8 bits by its VOI table or first window, or else by the range
of values that is there, and inverted where they count down from white (MONOCHROME1).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_builders.images import MAX_PIXELS, ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

# No other tag is ever taken from a file: names, dates, institutions and devices stay where they are.
TAGS = [
    "BurnedInAnnotation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
]


def check_dicom(path: Path) -> None:
    """Look at a file's header; it holds one image that may be used and that can be decoded.

    Raises:
        ImageError: with code `dicom_extra_missing`, `burned_in_annotation` or `dicom_unreadable`.
    """
    with _plain_errors():
        _check(_read(path, with_pixels=False))


def read_dicom(file: Path | io.BytesIO, *, text_allowed: bool = False) -> Image.Image:
    """Decode the pixels of a file to an 8-bit grey or RGB image, by the rule at the top of this module.

    `text_allowed` reads files that do not state that their pixels are free of text. It is for looking at a picture on
    one's own machine, and for nothing that is stored or passed on.

    Raises:
        ImageError: as `check_dicom` does, and where the pixels cannot be decoded.
    """
    with _plain_errors():
        dataset = _read(file, with_pixels=True)
        _check(dataset, text_allowed=text_allowed)
        return Image.fromarray(_to_8_bits(dataset))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn whatever pydicom raises into an ImageError; its own words may quote what the file says about a patient."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"is DICOM that cannot be read ({type(error).__name__})", "dicom_unreadable") from None


def _read(file: Path | io.BytesIO, *, with_pixels: bool) -> Dataset:
    try:
        from pydicom import dcmread
    except ImportError:
        message = 'is DICOM, which needs pydicom: pip install "dentalgemma[dicom]"'
        raise ImageError(message, "dicom_extra_missing") from None
    if isinstance(file, io.BytesIO):
        file.seek(0)
    tags = [*TAGS, "PixelData"] if with_pixels else TAGS
    return dcmread(file, specific_tags=tags, stop_before_pixels=not with_pixels)


def _check(dataset: Dataset, *, text_allowed: bool = False) -> None:
    from pydicom.pixels import get_decoder

    burned_in = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    if burned_in != "NO" and not text_allowed:
        says = (
            "states that text is burned into its pixels"
            if burned_in == "YES"
            else "does not say that its pixels are free of text"
        )
        remedy = (
            "which may name a patient; look at it, and use a copy that states BurnedInAnnotation NO where there is none"
        )
        raise ImageError(f"{says} (BurnedInAnnotation), {remedy}", "burned_in_annotation")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(f"is DICOM of {frames} frames; export the one that is annotated", "dicom_unreadable")
    if int(dataset.Rows) * int(dataset.Columns) > MAX_PIXELS:
        message = f"claims {dataset.Columns} x {dataset.Rows} pixels, more than {MAX_PIXELS:,}"
        raise ImageError(message, "dicom_unreadable")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        message = f"is DICOM compressed as {syntax.name}; install a decoder that pydicom uses, such as python-gdcm"
        raise ImageError(message, "dicom_unreadable")


def _to_8_bits(dataset: Dataset) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, pixel_array

    values = pixel_array(dataset)
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(values, dataset)
        return (colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8)
    if not photometric.startswith("MONOCHROME"):
        bits = int(dataset.BitsStored)
        return (values >> max(0, bits - 8)).astype(np.uint8)
    values = apply_modality_lut(values, dataset)
    if dataset.get("VOILUTSequence"):
        shares = _by_range(apply_voi(values, dataset))
    elif dataset.get("WindowWidth") is not None:
        shares = _by_window(values, dataset)
    else:
        shares = _by_range(values)
    if photometric == "MONOCHROME1":
        shares = 1 - shares
    return np.rint(np.nan_to_num(shares) * 255).astype(np.uint8)


def _by_range(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _by_window(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """The first window of the file, by the formulas of DICOM PS3.3 C.11.2.1."""
    center, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if not width > 0:
        return _by_range(values)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _first(value: object) -> float:
    return float(value[0] if hasattr(value, "__iter__") else value)  # type: ignore[index, arg-type]
