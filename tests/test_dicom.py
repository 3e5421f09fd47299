"""DICOM: pixels become an image, and nothing else of the file goes anywhere."""

import builtins
import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from data_builders.images import ImageError, find_images, measure, read_size, read_stored
from data_builders.readers import READERS
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

pydicom = pytest.importorskip("pydicom", reason="needs the extra `dicom`")
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"
GREYS = np.arange(0, 4000, 10, dtype=np.uint16).reshape(20, 20)  # 0 to 3990 of 4095
CANARY = "Canary^Patient"


def write_dicom(path, pixels=GREYS, photometric="MONOCHROME2", bits=12, syntax=None, pixel_data=None, **tags):
    """Write a minimal file of one frame, with a patient's name in it."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = CANARY, "CANARY-ID", "19700101"
    dataset.InstitutionName = "CANARY clinic"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = pixels.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = 0
    dataset.BurnedInAnnotation = "NO"
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixel_data or pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    return path


def read_pixels(path):
    return np.asarray(Image.open(io.BytesIO(read_stored(path).content)))


def read(root, reader="yolo", **keys):
    source = Source(
        name="s", reader=reader, root=root, classes={0: "caries", "a": "caries"}, modality="panoramic", **keys
    )
    items = list(READERS[reader](source))
    return [i for i in items if isinstance(i, ImageRecord)], [i for i in items if isinstance(i, Problem)]


def test_twelve_bits_without_a_window_fill_the_range_of_eight(tmp_path):
    path = write_dicom(tmp_path / "a.dcm")

    assert read_size(path) == measure(path)[:2] == (20, 20)
    assert read_stored(path).suffix == ".png"
    assert read_pixels(path) == pytest.approx(GREYS / 3990 * 255, abs=0.5)


def test_monochrome1_counts_down_from_white(tmp_path):
    straight = write_dicom(tmp_path / "a.dcm")
    inverse = write_dicom(tmp_path / "b.dcm", photometric="MONOCHROME1")

    assert (read_pixels(inverse).astype(int) + read_pixels(straight) == 255).all()


def test_files_named_by_their_uid_are_images_with_labels_of_their_own(tmp_path):
    """The last number of a UID is no suffix; what makes a file DICOM is its magic."""
    for number in (55, 56):
        write_dicom(tmp_path / "images" / f"1.2.840.113619.2.{number}")
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"1.2.840.113619.2.{number}.txt").write_text(f"0 .{number} .5 .1 .1\n")
    write_dicom(tmp_path / "images" / "1.2.840.113619.2.57", BurnedInAnnotation="YES")
    (tmp_path / "images" / "notes.2024").write_text("no image")
    records, problems = read(tmp_path)

    centers = {record.path.name[-2:]: sum(record.findings[0].bounds[::2]) / 2 for record in records}
    assert centers == {"55": pytest.approx(0.55), "56": pytest.approx(0.56)}
    assert [(problem.code, problem.path.name[-2:]) for problem in problems] == [
        ("labels_missing", "57"),
        ("burned_in_annotation", "57"),
    ]


@pytest.mark.parametrize(
    ("tags", "value", "grey"),
    [
        # PS3.3 C.11.2.1.2: c = 2048, w = 2001: ((x - (c - 0.5)) / (w - 1) + 0.5) * 255
        pytest.param({"WindowCenter": "2048", "WindowWidth": "2001"}, 2050, 128, id="linear"),
        pytest.param({"WindowCenter": "2048", "WindowWidth": "2001"}, 1000, 0, id="below the window"),
        pytest.param({"WindowCenter": ["2048", "9"], "WindowWidth": ["2001", "9"]}, 3500, 255, id="first of two"),
        pytest.param(
            {"WindowCenter": "1000", "WindowWidth": "100", "VOILUTFunction": "LINEAR_EXACT"}, 1020, 178, id="exact"
        ),
        # 255 / (1 + exp(-4 * 0.2)) = 175.9
        pytest.param(
            {"WindowCenter": "1000", "WindowWidth": "100", "VOILUTFunction": "SIGMOID"}, 1020, 176, id="sigmoid"
        ),
        # x * 2 - 1000 = 1020 where x = 1010
        pytest.param(
            {
                "WindowCenter": "1000",
                "WindowWidth": "100",
                "VOILUTFunction": "LINEAR_EXACT",
                "RescaleSlope": "2",
                "RescaleIntercept": "-1000",
            },
            1010,
            178,
            id="rescaled before",
        ),
    ],
)
def test_the_first_window_is_applied_as_the_standard_says(tmp_path, tags, value, grey):
    path = write_dicom(tmp_path / "a.dcm", **tags)

    assert read_pixels(path)[value == GREYS] == pytest.approx(grey, abs=0.51)


def test_colours_stay_colours(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., 0], pixels[0, 0] = 200, (1, 2, 3)
    path = write_dicom(tmp_path / "a.dcm", pixels, "RGB", 8)

    assert (read_pixels(path) == pixels).all()
    assert measure(path)[:2] == (6, 4)


def test_baseline_jpeg_is_decoded(tmp_path):
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit

    pixels = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    path = write_dicom(
        tmp_path / "a.dcm",
        pixels,
        bits=8,
        syntax=JPEGBaseline8Bit,
        pixel_data=encapsulate([buffer.getvalue()]),
        WindowCenter="128",
        WindowWidth="256",
    )

    assert read_pixels(path) == pytest.approx(pixels, abs=4)


def test_files_are_found_by_suffix_and_by_their_magic_number(tmp_path):
    for name in ("b.DCM", "IM0001"):
        write_dicom(tmp_path / name)
    (tmp_path / "README").write_text("no image")

    assert [path.name for path in find_images(tmp_path)] == ["IM0001", "b.DCM"]


@pytest.mark.parametrize("stated", ["YES", "", "UNKNOWN"])
def test_only_an_image_that_states_to_be_free_of_text_is_read(tmp_path, stated):
    path = write_dicom(tmp_path / "a.dcm", BurnedInAnnotation=stated)

    with pytest.raises(ImageError, match=r"BurnedInAnnotation.*may name a patient; look at it"):
        read_stored(path)


@pytest.mark.parametrize("reader", ["yolo", "dota", "coco", "via", "class_folders"])
def test_an_image_with_burned_in_text_is_left_out_by_every_reader(tmp_path, reader):
    write_annotated(tmp_path, reader)
    write_dicom(tmp_path / "a" / "good.dcm")
    write_dicom(tmp_path / "a" / "bad.dcm", BurnedInAnnotation="YES", photometric="MONOCHROME1")

    records, problems = read(tmp_path, reader)

    assert [(record.path.name, len(record.findings)) for record in records] == [("good.dcm", 1)]
    assert [(p.code, p.severity, p.path.name) for p in problems] == [("burned_in_annotation", "error", "bad.dcm")]
    with pytest.raises(ImageError, match="burned into its pixels"):
        measure(tmp_path / "a" / "bad.dcm")


@pytest.mark.parametrize("reader", ["yolo", "coco"])
def test_without_pydicom_one_problem_names_the_extra(tmp_path, reader, monkeypatch):
    write_annotated(tmp_path, reader)
    for name in ("good.dcm", "bad.dcm"):
        write_dicom(tmp_path / "a" / name)
    import_module = builtins.__import__

    def refuse(name, *args, **keys):
        if name.split(".")[0] == "pydicom":
            raise ImportError(name)
        return import_module(name, *args, **keys)

    monkeypatch.setattr(builtins, "__import__", refuse)
    records, problems = read(tmp_path, reader)

    assert (records, [problem.code for problem in problems]) == ([], ["dicom_extra_missing"])
    assert "2 images" in problems[0].message
    assert 'pip install "dentalgemma[dicom]"' in problems[0].message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        pytest.param({"NumberOfFrames": "3"}, "3 frames", id="frames"),
        pytest.param({"syntax": JPEG_LOSSLESS}, "install a decoder", id="no decoder"),
        pytest.param({"Rows": 30_000, "Columns": 30_000}, "more than 80,000,000", id="bomb"),
        pytest.param({"PhotometricInterpretation": "CANARY"}, "cannot be read|cannot be decoded", id="no such colours"),
        pytest.param({"Rows": 25}, "cannot be read", id="too few pixels"),
    ],
)
def test_what_cannot_be_decoded_is_an_error_that_quotes_nothing(tmp_path, keys, message):
    pixel_data = None
    if "syntax" in keys:
        from pydicom.encaps import encapsulate

        pixel_data = encapsulate([b"\xff\xd8\xff\xd9"])
    path = write_dicom(tmp_path / "a.dcm", pixel_data=pixel_data, **keys)

    with pytest.raises(ImageError, match=message) as caught:
        measure(path)
    assert "canary" not in str(caught.value).casefold()


def test_a_file_cut_short_anywhere_is_an_image_error(tmp_path):
    content = write_dicom(tmp_path / "a.dcm").read_bytes()
    for length in range(133, len(content) - 1, 37):
        (tmp_path / "a.dcm").write_bytes(content[:length])
        with pytest.raises(ImageError):
            measure(tmp_path / "a.dcm")


def test_nothing_but_pixels_leaves_the_file(tmp_path):
    write_annotated(tmp_path, "yolo")
    write_dicom(tmp_path / "a" / "good.dcm", ImageComments=CANARY)
    write_dicom(tmp_path / "a" / "bad.dcm", BurnedInAnnotation="YES", PatientComments=CANARY)

    records, problems = read(tmp_path)
    stored = read_stored(tmp_path / "a" / "good.dcm").content

    said = json.dumps([str(item) for item in (*records, *problems)])
    assert "anary" not in said.casefold().replace(str(tmp_path).casefold(), "")
    assert b"anary" not in stored.lower()
    assert Image.open(io.BytesIO(stored)).info == {}


def write_annotated(root, reader):
    """The same two images, `a/good.dcm` and `a/bad.dcm`, annotated for a reader."""
    names = ("bad", "good")
    if reader in ("yolo", "dota"):
        line = "0 0.5 0.5 0.2 0.2" if reader == "yolo" else "2 2 8 2 8 8 2 8 a 0"
        for name in names:
            (root / "a").mkdir(exist_ok=True)
            (root / "a" / f"{name}.txt").write_text(line)
    elif reader == "coco":
        document = {
            "images": [{"id": i, "file_name": f"a/{name}.dcm"} for i, name in enumerate(names)],
            "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 5, 5]} for i in (0, 1)],
            "categories": [{"id": 1, "name": "a"}],
        }
        (root / "coco.json").write_text(json.dumps(document))
    elif reader == "via":
        shape = {"name": "rect", "x": 2, "y": 2, "width": 5, "height": 5}
        region = {"shape_attributes": shape, "region_attributes": {"name": "a"}}
        document = {name: {"filename": f"a/{name}.dcm", "size": 0, "regions": [region]} for name in names}
        (root / "via.json").write_text(json.dumps(document))
