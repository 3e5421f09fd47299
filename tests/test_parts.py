"""A dataset with one configuration per source, as `push` makes of mixed terms, is as good here as the one it was."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from data_builders.configurations import split_by_source
from data_builders.dataset_folder import BuildError
from data_builders.phantom_formats import write_phantoms
from data_builders.probes import build_probe
from data_builders.proof import check_dataset
from data_builders.records import InputError
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.cli import app

SOURCES = ("photos", "opg")
OWN_TERM = """\
own_finding:
  kind: pathology
  en: {one: a strange shade, other: strange shades, condition: strange shading}
  es: {one: una sombra rara, other: sombras raras, condition: sombras extrañas, gender: f}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dataset of two sources, with a vocabulary of its own that one of them needs."""
    root = tmp_path_factory.mktemp("mixed")
    sources = []
    for seed, name in enumerate(SOURCES):
        write_phantoms(root / name, count=12, seed=30 + seed, formats=("yolo",), progress=False)
        (source,) = yaml.safe_load((root / name / "sources.yaml").read_text())["sources"]
        sources.append({**source, "name": name, "root": f"{name}/yolo", "license": "CC-BY-4.0"})
    (root / "terms.yaml").write_text(OWN_TERM)
    document = {"seed": 1, "vocabulary": "terms.yaml", "sources": sources}
    (root / "sources.yaml").write_text(yaml.safe_dump(document))
    build_vqa(load_sources(root / "sources.yaml"), root / "vqa", progress=False)
    return root / "vqa"


@pytest.fixture(scope="module")
def pulled(whole):
    out = whole.parent / "pulled"
    split_by_source(whole, out)
    return out


def test_every_row_is_proven_in_the_whole_and_in_each_configuration(whole, pulled):
    rows = dict(check_dataset(whole))

    assert dict(check_dataset(pulled)) == rows
    assert not any(rows.values())
    one, other = (dict(check_dataset(pulled / "data" / name)) for name in SOURCES)
    assert min(len(one), len(other)) > 50
    assert one | other == rows and not one.keys() & other.keys()


def test_a_configuration_is_read_with_the_datasets_own_vocabulary(pulled, tmp_path):
    spoilt = tmp_path / "pulled"
    shutil.copytree(pulled, spoilt)
    (spoilt / "vocabulary.yaml").write_text("own_finding: {kind: nonsense}\n")

    for folder in (spoilt, spoilt / "data" / "opg"):
        with pytest.raises(InputError, match=r"vocabulary\.yaml: own_finding"):
            check_dataset(folder)


def test_a_wrong_row_of_a_configuration_is_found_by_the_command(pulled, tmp_path):
    spoilt = tmp_path / "pulled"
    shutil.copytree(pulled, spoilt)
    shard = next((spoilt / "data" / "opg").glob("train-*.parquet"))
    table = pq.read_table(shard)
    languages = pa.array(["xx", *table["language"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("language"), "language", languages), shard)

    done = CliRunner().invoke(app, ["check", str(spoilt), "--json"])
    report = json.loads(done.stdout)

    assert done.exit_code == 1
    assert report["rows"] == len(dict(check_dataset(pulled)))
    assert list(report["wrong"]) == [table["row_id"][0].as_py()]


def test_the_same_questions_are_asked_of_the_whole_and_of_its_configurations(whole, pulled, tmp_path):
    build_probe(whole, "train", tmp_path / "whole.jsonl")
    build_probe(pulled, "train", tmp_path / "pulled.jsonl")
    build_probe(pulled / "data" / "opg", "train", tmp_path / "opg.jsonl")
    asked = {path.stem: [json.loads(line) for line in path.open()] for path in tmp_path.glob("*.jsonl")}

    for items in asked.values():
        for item in items:
            item.pop("image")  # below a folder that is named for the file
    whole_ones = {item["item_id"]: item for item in asked["whole"]}
    assert {item["item_id"]: item for item in asked["pulled"]} == whole_ones
    assert {item["source"] for item in asked["whole"]} == set(SOURCES)
    assert {item["source"] for item in asked["opg"]} == {"opg"}
    assert len(list((tmp_path / "pulled_images").iterdir())) == len(list((tmp_path / "whole_images").iterdir()))


def test_rows_without_their_records_are_refused_before_a_bar_is_drawn(pulled, tmp_path):
    shutil.copytree(pulled / "data" / "opg", tmp_path / "opg")
    (tmp_path / "opg" / "records.jsonl").unlink()
    done = CliRunner().invoke(app, ["check", str(tmp_path / "opg")])

    assert isinstance(done.exception, InputError)
    assert "is no VQA dataset folder" in str(done.exception)
    assert done.output == ""  # no bar of 0 %
    with pytest.raises(BuildError, match="is no VQA dataset folder"):
        build_probe(tmp_path / "opg", "train", tmp_path / "probe.jsonl")


def test_a_recipe_names_the_configurations_that_it_could_train_on(pulled):
    from dentalgemma.training.config import StageConfig
    from dentalgemma.training.data import DatasetError, load_splits

    def load(config):
        stage = StageConfig(dataset_name=str(pulled), dataset_config=config, dataset_test_split="validation")
        return load_splits(stage)

    with pytest.raises(DatasetError, match=r"several configurations: set --dataset_config to one of \['opg', 'photos'"):
        load(None)
    with pytest.raises(DatasetError, match=r"no configuration 'xray', only \['opg', 'photos'\]"):
        load("xray")
    assert set(load("opg")["train"]["source"]) == {"opg"}
