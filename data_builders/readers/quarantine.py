"""DICOM images that must not be used, or cannot be, are left out by every reader in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

from data_builders.images import ImageError, is_dicom
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

Reader = Callable[[Source], Iterator[ImageRecord | Problem]]


def quarantine_dicom(reader: Reader) -> Reader:
    """Make a reader look at the header of every DICOM image, and put a problem in the place of one that is unfit."""

    @wraps(reader)
    def read(source: Source) -> Iterator[ImageRecord | Problem]:
        lacking = 0
        for item in reader(source):
            error = _find_fault(item)
            if error is None:
                yield item
            elif error.code == "dicom_extra_missing":
                lacking += 1
            else:
                assert isinstance(item, ImageRecord)
                yield Problem(error.code, "error", item.path, None, f"{error}; the image is left out")
        if lacking:
            message = f'{lacking} images are DICOM and were left out; to read them: pip install "dentalgemma[dicom]"'
            yield Problem("dicom_extra_missing", "error", source.root, None, message)

    return read


def _find_fault(item: ImageRecord | Problem) -> ImageError | None:
    if not isinstance(item, ImageRecord):
        return None
    suffix = item.path.suffix.lower()
    if not (suffix in (".dcm", "") or suffix[1:].isdecimal()) or not is_dicom(item.path):
        return None
    from data_builders.dicom import check_dicom

    try:
        check_dicom(item.path)
    except ImageError as error:
        return error
    return None
