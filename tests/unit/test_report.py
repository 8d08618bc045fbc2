"""The page of a run: everything a finished run has, and what is said of a run that has not ended."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_apo.config import build_recipe
from megatron_apo.stages.report import write_report
from megatron_apo.telemetry.plots import smooth
from megatron_apo.telemetry.units import data_size, duration
from megatron_apo.values.store import StoreRow, StoreWriter
from tests.stores import FINGERPRINT


def make_run(folder: Path, steps: int = 60) -> Path:
    """A finished run's folder with plausible numbers."""
    rng = np.random.default_rng(0)
    recipe = build_recipe(
        {
            "run": {"dir": str(folder)},
            "model": {"path": "m"},
            "data": {"train": "train.jsonl"},
            "vstar": {"dir": str(folder / "vstar")},
        },
        ["parallel.pp=2"],
    )
    recipe.save(folder / "recipe.yaml")
    rows = []
    for step in range(1, steps + 1):
        rise = 1 - np.exp(-step / 40)
        time_s = {"generate": 0.62, "reference": 0.2, "train": 0.5, "optimizer": 0.05, "sync": 0.07}
        time_s = {f"time/{name}_s": value * rng.uniform(0.9, 1.2) for name, value in time_s.items()}
        rows.append(
            {"step": step, "time": 1e9 + step, "reward/mean": 0.58 + 0.26 * rise + rng.normal(0, 0.02)}
            | {"kl/per_token": 0.01 * rise, "kl/per_sequence": 0.25 * rise, "grad_norm_reinforce": rng.uniform(1, 3)}
            | {"response/mean_tokens": 25 + rng.normal(0, 0.3), "response/truncated": 0.02 * (1 - rise)}
            | {"response/p50_tokens": 24, "response/p95_tokens": 31, "response/max_tokens": 32}
            | {
                "rollout/slowest_share": 0.05,
                "rollout/slowest_1pct_share": rng.uniform(0.1, 0.2),
                "mfu/train": 0.4,
                "tflops_per_rank/train": 395.6,
            }
            | {"tokens_per_s/train": 8e3 + step, "gpu/rank0/power_w": 300, "gpu/rank1/power_w": 500}
            | {"gpu/rank0/energy_j": 250, "gpu/rank1/energy_j": 1000, "gpu/rank1/xid_events": step == 7}
            | {"mismatch/max": 10 ** rng.uniform(-5.5, -4.8), "mismatch/mean": 10 ** rng.uniform(-7, -6.5)}
            | {"mismatch/warn_limit": 3e-5, "mismatch/stop_limit": 1e-4, "mismatch/warned": 0}
            | {"mismatch/token_mult_prob_error": 1.000001, "mismatch/sequence_ratio_mean": 1.0}
            | {"mismatch/sequence_ratio_max": 1.0002, "mismatch/sequence_ess": 0.99}
            | {"advantage/mean": -0.1 + 0.2 * rise, "advantage/second_moment": 0.2, "tokens_per_s/generate": 1e4}
            | time_s
            | {"time/step_s": sum(time_s.values()) + 0.02}
        )
        if step % 20 == 0:
            scores = {"eval/avg_at_k": 0.58 + 0.25 * rise, "eval/greedy": 0.69 + 0.17 * rise}
            rows.append(
                {"step": step, "time": 1e9, **scores, "eval/avg_at_k_stderr": 0.01, "eval/greedy_stderr": 0.015}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "phases_s": {"warm start": 60.0, "stage 1": 30.0, "stage 2": 300.0, "total": 391.0},
        "pass_at_1": {
            "before": {"mean": 0.581, "stderr": 0.012, "greedy": 0.69},
            "after": {"mean": 0.842, "stderr": 0.009, "greedy": 0.87},
        },
        "sync": {"seconds_mean": 0.07, "bytes": 3_300_000, "phase_seconds_mean": {"load": 0.031}},
        "max_log_prob_difference": 1.3e-5,
        "peak_memory_bytes": {"rank 0": 700_000_000, "vllm server": 2_400_000_000},
        "peak_phase_bytes": {"generate": 610_000_000, "train": 690_000_000},
        "versions": {"torch": "2.13.0+cpu"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    write_store(folder / "vstar", rng.binomial(1, rng.beta(2, 1.5, 256)[:, None], (256, 8)))
    return folder


def write_store(folder: Path, rewards: np.ndarray) -> None:
    rows = [
        StoreRow(f"{i:032x}", f"{i:032x}", list(map(float, row)), [5] * len(row), ["stop"] * len(row))
        for i, row in enumerate(rewards)
    ]
    fingerprint = FINGERPRINT.model_copy(update={"samples_per_prompt": rewards.shape[1]})
    writer = StoreWriter(folder, fingerprint, num_shards=1)
    writer.write_shard(0, rows)
    writer.finish()


class Outline(HTMLParser):
    """Text of the page and every reference to something outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.outside, self.ids = "", [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.outside.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def test_finished_run_shows_its_results(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    found = outline(page)
    assert "+0.261" in found.text and "± 0.015" in found.text  # .842 - .581; sqrt(.012^2 + .009^2)
    assert "0.581" in found.text and "greedy 0.870" in found.text
    assert "of a sync, load0.031 s" in found.text
    assert "6 min 31 s3 phases" in found.text
    assert "256 prompts, 8 samples of each" in found.text
    assert "2.40 GB" in found.text and "2.13.0+cpu" in found.text and "prompts_per_step: 256" in found.text
    assert "generate610.0 MB" in found.text and "train690.0 MB" in found.text
    assert "not there" not in found.text and "nothing in" not in found.text
    assert page.count("<svg") == 15


def test_rates_and_gpus_are_means_and_sums_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = outline(write_report(run).read_text()).text
    assert "parttokens/sTFLOP/s of a rankMFUgenerate10,000train8,03039640.0%" in text  # steps 1 to 60
    assert "GPU power, W, by rank" in text and "lowest" in text and "highest" in text
    assert "015.0" in text and "160.01" in text  # rank 0: 60 x 250 J; rank 1: 60 x 1 kJ, one Xid


def test_mismatch_is_shown_with_its_limits_and_what_was_warned_of(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = outline(write_report(run).read_text()).text
    assert "limit of the mean, warn" in text and "limit of the mean, stop" in text and "sequence ratio max" in text
    assert "importance weights" not in text
    assert "mismatch warned of" not in text and "warning limit" not in text
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["mismatch/warned"] = int(row["step"] in (17, 41))
        row |= {"importance/mean": 0.98, "importance/capped": 0.01}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = outline(write_report(run).read_text()).text
    assert "importance weights" in text and "capped" in text
    assert "mismatch warned of2 stepsthe first is step 17" in text
    assert "steps above the mean's warning limit2, the first is 17" in text


def test_a_run_whose_watch_is_off_shows_no_limits(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: row[name] for name in row if not name.endswith("_limit")} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    text = outline(write_report(run).read_text()).text
    assert "limit of the mean" not in text and "log-prob difference" in text


def test_a_run_without_gpus_says_nothing_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: row[name] for name in row if not name.startswith(("gpu/", "mfu/"))} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    text = outline(write_report(run).read_text()).text
    assert "GPU" not in text.replace("GPU only", "") and "MFU" not in text and "Rates, mean over steps" in text


def test_vstar_is_shown_as_it_was_trained_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["vstar"] |= {"samples_used": 1, "estimator": "debiased", "beta1": 0.25}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = write_report(run).read_text()
    assert "256 prompts, 1 samples of each" in page and "V* (debiased)" in page and "V* at b1 = 0.25" in page
    wrong, right = map(int, re.findall(r"(\d+)% all (?:wrong|right)", page))
    assert wrong + right == 100  # of a single sample


def test_an_estimator_that_the_rewards_do_not_suit_costs_its_figure_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run / "vstar")
    write_store(run / "vstar", np.array([[0.5, 1.0]]))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["vstar"]["estimator"] = "beta_smoothed"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = write_report(run).read_text()
    assert "beta_smoothed needs rewards of 0 and 1" in page and "time of a step by phase" in page


def test_phases_add_up_while_no_total_is_known(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "summary.json").write_text('{"phases_s": {"warm start": 60.0, "stage 1": 30.0}}')
    assert "1 min 30 s2 phases" in outline(write_report(run).read_text()).text


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    found = outline(page)
    assert found.outside == []
    assert not re.search(r"url\((?!#)|@import|<script", page)
    assert "#0102" not in page and "#0101" not in page  # every placeholder colour became a variable
    clip_paths = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clip_paths) == len(set(clip_paths)), "charts share clip paths"


def test_phase_shares_add_up_to_the_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    row = {"time": 0, "reward/mean": 1, "time/generate_s": 0.5, "time/train_s": 0.3, "time/step_s": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i} | row) + "\n" for i in range(4)))
    text = outline(write_report(run).read_text()).text
    assert "generate0.500 s50%" in text and "train0.300 s30%" in text and "other0.200 s20%" in text


@pytest.mark.parametrize("left", ["recipe.yaml", "metrics.jsonl", "summary.json"])
def test_partial_run_says_what_is_missing(tmp_path: Path, left: str) -> None:
    run = make_run(tmp_path)
    for path in list(run.iterdir()):
        if path.is_file() and path.name != left:
            path.unlink()
    (run / "vstar" / "manifest.json").unlink()
    text = outline(write_report(run).read_text()).text
    assert "V*: " in text
    if left != "metrics.jsonl":
        assert "no reward in metrics.jsonl" in text
    if left != "recipe.yaml":
        assert "recipe.yaml: not there" in text
    if left != "summary.json":
        assert "summary.json: not there" in text


def test_a_step_that_diverged_and_a_cut_line_are_no_obstacle(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "time": 0, "reward/mean": null, "kl/per_token": null}\n{"step": 62, "ti')
    write_report(run)


def test_names_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "a<b>&c"
    run.mkdir()
    page = write_report(make_run(run)).read_text()
    assert "<b>" not in page and "a&lt;b&gt;&amp;c" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        write_report(tmp_path)


def test_smooth_is_the_mean_of_the_last_values() -> None:
    assert smooth([1, 3, 5, 7], 2).tolist() == [1, 2, 4, 6]


def test_units() -> None:
    assert [duration(s) for s in (8.42, 200, 7500)] == ["8.4 s", "3 min 20 s", "2 h 05 min"]
    assert [data_size(n) for n in (3.2e6, 1.2e9)] == ["3.2 MB", "1.20 GB"]
