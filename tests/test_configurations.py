"""A dataset of licences that exclude each other becomes one configuration per source, with nothing lost on the way."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard

from data_builders.configurations import split_by_source
from data_builders.dataset_folder import BuildError, hash_file
from data_builders.instruct import build_instruct
from data_builders.phantom_formats import write_phantoms
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.publishing.licences import judge_dataset
from dentalgemma.publishing.screening import screen

LICENCES = {"photos": "CC BY-SA 4.0", "opg": "CC-BY-NC-SA-4.0"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset of two sources whose share-alike terms exclude each other."""
    root = tmp_path_factory.mktemp("mixed")
    sources = []
    for seed, (name, licence) in enumerate(LICENCES.items()):
        write_phantoms(root / name, count=12, seed=30 + seed, formats=("yolo",), progress=False)
        (source,) = yaml.safe_load((root / name / "sources.yaml").read_text())["sources"]
        url = f"https://example.org/{name}"
        sources.append({**source, "name": name, "root": f"{name}/yolo", "license": licence, "url": url})
    (root / "sources.yaml").write_text(yaml.safe_dump({"seed": 1, "sources": sources}))
    build_vqa(load_sources(root / "sources.yaml"), root / "vqa", progress=False)
    return root / "vqa"


@pytest.fixture(scope="module")
def apart(mixed):
    out = mixed.parent / "apart"
    split_by_source(mixed, out)
    return out


def files(folder):
    return {p.relative_to(folder).as_posix(): p for p in Path(folder).rglob("*") if p.is_file()}


def read(folder, pattern="data/*.parquet"):
    rows = [row for path in sorted(folder.glob(pattern)) for row in pq.read_table(path).to_pylist()]
    return {row["row_id"]: row for row in rows}


def test_every_row_is_in_its_sources_configuration_as_it_was(mixed, apart):
    whole = read(mixed)
    for name in LICENCES:
        own = read(apart, f"data/{name}/*.parquet")
        assert own == {key: row for key, row in whole.items() if row["source"] == name}
        assert len(own) > 50


def test_each_configuration_loads_by_the_name_of_its_source(apart, tmp_path):
    from datasets import get_dataset_config_names, load_dataset
    from datasets.info import DatasetInfosDict

    assert get_dataset_config_names(str(apart)) == sorted(LICENCES)
    infos = DatasetInfosDict.from_dataset_card_data(DatasetCard.load(apart / "README.md").data)
    for name, licence in LICENCES.items():
        loaded = load_dataset(str(apart), name, cache_dir=str(tmp_path))
        assert set(loaded["train"]["source"]) == {name}
        assert set(loaded["train"]["license"]) == {licence}
        assert loaded["train"][0]["images"][0].size == (448, 224)
        assert loaded["train"].features == infos[name].features
        assert {split: len(rows) for split, rows in loaded.items()} == {
            split: info.num_examples for split, info in infos[name].splits.items()
        }


def test_a_picture_is_stored_once_in_a_configuration(apart):
    for name in LICENCES:
        rows = read(apart, f"data/{name}/*.parquet")
        pictures = {row["images"][0]["path"]: len(row["images"][0]["bytes"]) for row in rows.values()}
        stored = sum(path.stat().st_size for path in (apart / "data" / name).glob("*.parquet"))
        assert len(rows) > 4 * len(pictures)
        assert stored < 1.5 * sum(pictures.values())


def test_each_configuration_has_its_own_terms_in_the_card(apart):
    card = (apart / "README.md").read_text()
    table = card.partition("## Configurations")[2].partition("## Sources and licences")[0]
    photos, opg = (next(line for line in table.splitlines() if line.startswith(f"| `{name}`")) for name in LICENCES)

    assert "| CC BY-SA 4.0 <https://creativecommons.org/licenses/by-sa/4.0/> | Share alike, Attribution |" in photos
    assert "| No commercial use, Share alike, Attribution | <https://example.org/opg> |" in opg
    assert 'load_dataset("OWNER/NAME", "photos", split="train")' in table
    assert card.count("load_dataset(") == 1  # without a configuration it would not load
    data = DatasetCard.load(apart / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "per-source", "LICENSE.md")
    sources = json.loads((apart / "build_report.json").read_text())["sources"]
    assert judge_dataset(sources).verdict == "mixed"
    assert [judge_dataset([source]).metadata["license"] for source in sources] == ["cc-by-sa-4.0", "cc-by-nc-sa-4.0"]


def test_the_records_of_a_source_go_with_it_and_everything_else_as_it_was(mixed, apart):
    before, after = files(mixed), files(apart)
    lines = {name: (apart / "data" / name / "records.jsonl").read_text().splitlines() for name in LICENCES}

    assert sorted(line for own in lines.values() for line in own) == sorted(
        (mixed / "records.jsonl").read_text().splitlines()
    )
    assert all(json.loads(line)["source"] == name for name, own in lines.items() for line in own)
    assert "records.jsonl" not in after
    for name in ("LICENSE.md", "gallery.html", "figures/findings.png"):
        assert after[name].read_bytes() == before[name].read_bytes()


def test_the_report_has_the_hash_of_every_file(apart):
    hashes = json.loads((apart / "build_report.json").read_text())["files"]

    assert hashes == {name: hash_file(path) for name, path in files(apart).items() if name != "build_report.json"}


def test_the_same_dataset_gives_the_same_files_and_is_not_touched(mixed, apart, tmp_path):
    before = {name: hash_file(path) for name, path in files(mixed).items()}
    split_by_source(mixed, tmp_path / "again")

    assert {n: hash_file(p) for n, p in files(tmp_path / "again").items()} == {
        n: hash_file(p) for n, p in files(apart).items()
    }
    assert {name: hash_file(path) for name, path in files(mixed).items()} == before


def test_nothing_in_it_speaks_against_uploading_it(apart):
    assert screen(files(apart)) == []


def test_cases_without_images_are_kept_apart_too(tmp_path):
    sources = []
    for seed, (name, licence) in enumerate(LICENCES.items()):
        write_phantoms(tmp_path / name, count=0, cases=30, seed=40 + seed, formats=("yolo",), progress=False)
        sources.append({"name": name, "reader": "cases", "root": f"{name}/cases", "license": licence})
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump({"seed": 1, "sources": sources}))
    build_instruct(load_sources(tmp_path / "cases.yaml"), tmp_path / "built")
    split_by_source(tmp_path / "built", tmp_path / "apart")
    rows = {name: read(tmp_path / "apart", f"data/{name}/*.parquet") for name in LICENCES}

    assert rows["photos"] | rows["opg"] == read(tmp_path / "built")
    assert all(rows.values())
    for name, own in rows.items():
        lines = (tmp_path / "apart" / "data" / name / "cases.jsonl").read_text().splitlines()
        assert {json.loads(line)["row_id"] for line in lines} == set(own)


def test_what_is_no_dataset_folder_of_a_build_is_refused(mixed, tmp_path):
    with pytest.raises(BuildError, match="is no dataset folder"):
        split_by_source(tmp_path, tmp_path / "out")
    for change, why in [({"name": "../../x"}, "is no name of a source"), ({"rows": 3}, "which the parquet has not")]:
        folder = tmp_path / f"changed{len(why)}"
        shutil.copytree(mixed, folder)
        report = json.loads((folder / "build_report.json").read_text())
        report["sources"][0] |= change
        (folder / "build_report.json").write_text(json.dumps(report))
        with pytest.raises(BuildError, match=why):
            split_by_source(folder, tmp_path / "out" / folder.name)
    assert not (tmp_path.parent / "x").exists()
