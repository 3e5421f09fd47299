"""The benchmarks: a training step's operations held to others' count, every mode runs, README and results agree."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))

# TFLOP for a row of the 4B model, counted by others: the tower; all, at 400 and 600 tokens, a quarter of them answer.
TOWER = {"P1": 19.58, "P2": 17.36, "P3": 5.46, "ours": 0, "ours, packed": 0}
TOTAL = {"P1": (28.9, 33.7), "P2": (25.8, 30.3), "P3": (13.9, 18.4), "ours": (5.8, 8.8), "ours, packed": (3.44, 6.61)}
AT_LEAST = {"ours": (4, 3.2), "ours, packed": (6, 4)}  # times fewer than P2


@pytest.fixture(scope="module")
def flops():
    import step_flops

    return step_flops


def test_the_tower_costs_three_forwards_as_it_comes_and_nothing_from_the_cache(flops):
    rows = {name: flops.count(flops.ARMS[name], 600) for name in ("P2", "ours")}

    assert rows["P2"].tower / 1e12 == pytest.approx(17.36, rel=0.02)
    assert rows["ours"].tower == 0
    assert rows["P2"].total / 1e12 == pytest.approx(30.3, rel=0.02)
    assert rows["ours"].total / 1e12 == pytest.approx(8.8, rel=0.02)


@pytest.mark.slow
def test_operations_of_all_ways_are_those_that_others_counted(flops):
    found = flops.measure_flops()

    for place, length in enumerate(("400", "600")):
        rows = found["tflop_per_row"][length]
        assert {name: row["tower"] for name, row in rows.items()} == pytest.approx(TOWER, rel=0.02)
        assert {name: rows[name]["total"] for name in TOTAL} == pytest.approx(
            {name: totals[place] for name, totals in TOTAL.items()}, rel=0.02
        )
        for name, least in AT_LEAST.items():
            assert found["ratios"][length][f"P2 / {name}"] >= least[place]
            assert found["ratios_with_head_scored_anew"][length][f"P2 / {name}"] >= least[place]


def test_the_scaled_model_has_the_proportion_of_the_large_one(flops, tiny_model):
    from architectures import gemma3_4b, scaled

    from dentalgemma.models.processors import load_processor

    def proportion(config, length):
        return flops.count_forward(config, length)["tower"] / flops.count_forward(config, length)["language_model"]

    assert proportion(scaled(load_processor(tiny_model)), 128) == pytest.approx(proportion(gemma3_4b(), 600), rel=0.02)


def test_the_comparison_of_steps_and_stages_finds_what_is_wrong():
    from step_cpu import find_failures

    exact, off = {"gradients": 1e-7}, {"gradients": 0.1}
    stage = {"loss_difference": 0.001, "time": 0.3}

    assert not find_failures({"cached": exact, "cached, packed": exact, "cached, noise": off}, {"0": stage})
    assert len(find_failures({"cached": off, "cached, packed": off, "cached, noise": exact}, {})) == 3
    assert len(find_failures({}, {"0": {"loss_difference": 0.02, "time": 0.6}})) == 2


def test_models_that_share_weights_are_adapted_by_themselves():
    from step_gpu import share_weights

    first = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    second = share_weights(first)
    second[0].register_forward_hook(lambda *_: torch.zeros(1, 2))

    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second is not first
    assert not first[0]._forward_hooks


@pytest.mark.slow
def test_a_stage_from_the_cache_equals_trls_in_less_than_half_the_time(tmp_path):
    options = ["--mode", "cpu", "--full-stage", "--seeds", "0", "--phantoms", "12", "--epochs", "1"]
    results = run_benchmark(tmp_path, *options)

    assert not results["failed"]
    (stage,) = results["stages"].values()
    assert stage["ours"]["validation_loss"] < stage["ours"]["loss_before"] - 0.1
    assert stage["ours"]["rows"] == stage["trl"]["rows"] > 80


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_runs_on_a_small_model(tmp_path):
    size = ["--size", "small", "--device", "cpu", "--repeats", "1", "--steps", "1", "--workers", "0"]
    results = run_benchmark(tmp_path, "--mode", "gpu", *size)

    assert len(results["ways"]) == 2
    for ways in results["ways"].values():
        assert set(ways) == {"P2", "P3", "ours", "ours, packed"}
        assert all(way["rows_per_second"] > 0 and way["tflops_per_second"] > 0 for way in ways.values())
        assert ways["ours"]["rows_per_second"] < ways["ours"]["rows_per_second_once_encoded"]  # encoding is paid for


def run_benchmark(folder, *options):
    out = folder / "figures.json"
    command = [sys.executable, BENCHMARKS / "train_step.py", *options, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["results"]


def test_results_are_of_one_form():
    from report import KEYS, RESULTS

    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}

    assert {"merge", "read_annotations", "build_dataset", "train_step_flops", "train_step_cpu"} <= set(reports)
    for name, report in reports.items():
        assert tuple(report) == KEYS, name
        assert report["command"].startswith(f"python benchmarks/{report['benchmark'].partition(' ')[0]}.py"), name
        assert {"measures", "headline"} <= set(report["results"]), name


def test_the_table_in_the_readme_is_that_of_the_results():
    from report import make_table, put_table

    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")

    assert put_table(text, make_table()) == text, "run `python benchmarks/report.py`"
    assert ("not yet measured on a GPU" in text) != (BENCHMARKS / "results" / "train_step_gpu.json").exists()


def test_recorded_operations_are_those_that_are_claimed():
    recorded = json.loads((BENCHMARKS / "results" / "train_step_flops.json").read_text())["results"]

    for place, length in enumerate(("400", "600")):
        rows = recorded["tflop_per_row"][length]
        assert {name: rows[name]["total"] for name in TOTAL} == pytest.approx(
            {name: totals[place] for name, totals in TOTAL.items()}, rel=0.02
        )
