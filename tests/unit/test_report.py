"""The page of a run: everything a finished run has, by each method, and what is said of a run that has not ended."""

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
from megatron_apo.objectives import objective_of
from megatron_apo.stages.report import write_report
from megatron_apo.telemetry.plots import smooth
from megatron_apo.telemetry.units import data_size, duration
from megatron_apo.values.store import StoreRow, StoreWriter
from tests.stores import FINGERPRINT
from tests.unit.test_methods import METHODS


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
            | {"loss": 0.2 - 0.1 * rise, "grad_norm": 0.1, "value/mean": 0.6 + rng.normal(0, 0.01)}
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
    assert page.count("<svg") == 17
    assert "A*-PO · tp 1 × pp 2" in found.text and "avg@8 after A*-PO" in found.text
    assert "advantage r − V*" in found.text and "What A*-PO learns from" in found.text


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
        row |= {"importance/mean": 0.98 + 1e-4 * row["step"], "importance/capped": 0.01}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = outline(write_report(run).read_text()).text
    assert "importance weights" in text and "importance/capped0.01" in text
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


# ---- by method

ADVANTAGE = {"advantage/mean", "advantage/second_moment"}
CLIPPED = {"clip/low", "clip/high", "clip/dual"}
KL = {"kl/per_token", "kl/per_sequence"}
GROUP = {"group/std", "group/equal", "reward/length_penalty"}
CRITIC = {"critic/loss", "critic/grad_norm", "critic/explained_variance", "critic/clipped", "critic/skipped_steps"}
IN_UNITS, PLAIN = {"grad_norm_reinforce"}, {"grad_norm"}
# Its name, how its advantage is told, and what a page has of the metrics that it tells by its defaults.
PAGES = {
    "apo": ("A*-PO", "r − V*", ADVANTAGE | {"value/mean"} | KL | IN_UNITS),
    "reinforce": ("REINFORCE", "r − V*", ADVANTAGE | {"value/mean", "ratio/mean"} | IN_UNITS),
    "rloo": ("RLOO", "r − mean of the group's others", ADVANTAGE | {"value/mean", "ratio/mean"} | IN_UNITS),
    "rebel": ("REBEL", "r − mean of the group", ADVANTAGE | IN_UNITS),
    "grpo": (
        "GRPO",
        "r − mean of the group, in standard deviations",
        ADVANTAGE | GROUP | CLIPPED | KL | {"kl/in_loss"} | PLAIN,
    ),
    "dr_grpo": ("Dr. GRPO", "r − mean of the group", ADVANTAGE | GROUP | CLIPPED | IN_UNITS),
    "dapo": ("DAPO", "r − mean of the group, in standard deviations", ADVANTAGE | GROUP | CLIPPED | PLAIN),
    "ppo": (
        "PPO",
        "r − critic's value",
        ADVANTAGE | {"value/mean"} | CLIPPED | CRITIC | KL | {"kl/in_reward"} | PLAIN,
    ),
    "tbrm": ("TBRM", None, {"bellman/first_logit", "bellman/residual"} | KL | PLAIN),
}


def run_of(folder: Path, method: str, *overrides: str, steps: int = 1) -> Path:
    """A run of steps that tell what is theirs alone. Of one step nothing is drawn, and each number is in a table."""
    paths = [f"run.dir={folder}", "model.path=m", "data.train=t", f"vstar.dir={folder / 'vstar'}"]
    recipe = build_recipe({}, [*paths, f"objective.name={method}", *overrides])
    recipe.save(folder / "recipe.yaml")
    objective = objective_of(recipe)
    names = objective.told | {"loss", "grad_norm"} | (CRITIC if objective.needs_critic else set())
    names |= KL if "reference" in objective.target_log_probs | objective.loss_log_probs else set()
    names |= IN_UNITS if objective.reinforce_scale else set()
    rows = [{"step": step, "time": 0} | {name: step + len(name) for name in names} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_page_has_what_its_method_tells(tmp_path: Path, method: str) -> None:
    title, _, told = PAGES[method]
    page = write_report(run_of(tmp_path, method)).read_text()
    assert set(re.findall("<td>([a-z_]+(?:/[a-z_]+)*)</td><td>", page)) - {"loss"} == told
    assert f" · {title} run</title>" in page and f"<p>{title} · tp 1 " in page and f"What {title} learns from" in page
    assert (title == "A*-PO") or "A*-PO" not in page
    assert ("<h2>V*</h2>" in page) == ("V*: " in page) == (method in ("apo", "reinforce"))
    assert ("<h2>Critic</h2>" in page) == (method == "ppo")
    assert ("<h2>Distance from the reference</h2>" in page) == (KL <= told)


@pytest.mark.parametrize("method", METHODS)
def test_a_page_says_what_its_method_should_have_told(tmp_path: Path, method: str) -> None:
    run = run_of(tmp_path, method, steps=0)
    missing = " ".join(re.findall('<p class="missing">(.*?)</p>', write_report(run).read_text())).replace("&#x27;", "'")
    _, advantage, told = PAGES[method]
    said = {
        f"advantage {advantage}": advantage is not None,
        "beside the reward": "value/mean" in told,
        "standard deviation of a group": GROUP <= told,
        "that a bound took out of the gradient": CLIPPED <= told,
        "ratio to the old policy": "ratio/mean" in told,
        "Bellman residual": method == "tbrm",
        "loss of the critic": method == "ppo",
        "KL per token": KL <= told,
        "KL in the loss": method == "grpo",
        "KL in the reward": method == "ppo",
        "gradient norm in REINFORCE units": IN_UNITS <= told,
        "gradient norm:": PLAIN <= told,
    }
    assert {text: text in missing for text in said} == said
    assert not re.search("prompts of a step|baseline of their own|importance|entropy", missing)


def test_what_a_recipe_leaves_out_or_adds_is_said_so(tmp_path: Path) -> None:
    def text(*arguments: str) -> str:
        return write_report(run_of(tmp_path, *arguments, steps=0)).read_text().replace("&#x27;", "'")

    kernel = text("reinforce", "objective.baseline.source=kernel", "objective.kl_coefficient=0.1")
    assert "advantage r − kernel of the past" in kernel and "V*" not in kernel
    assert "KL in the reward" in kernel and "KL per token" in kernel
    assert "<h2>V*</h2>" in text("grpo", "vstar.filter=both")
    assert "importance weights" in text("grpo", "train.importance=token")
    assert "mean of the group;" in text("grpo", "objective.divide_by_std=false")


def test_a_store_that_was_not_used_is_on_no_page(tmp_path: Path) -> None:
    write_store(tmp_path / "vstar", np.array([[0.0, 1.0]]))
    assert "V*" not in write_report(run_of(tmp_path, "dapo")).read_text()


def test_what_changes_is_drawn_and_dynamic_sampling_shown(tmp_path: Path) -> None:
    run = run_of(tmp_path, "dapo", steps=3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drawn = [{"prompts/drawn": 40 + row["step"], "reward/drawn": 0.1 * row["step"], "reward/mean": 0.5} for row in rows]
    drawn = [one | {"prompts/not_worth": one["prompts/drawn"] - 32, "clip/dual": 0} for one in drawn]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row | more) + "\n" for row, more in zip(rows, drawn, strict=True))
    )
    page = write_report(run).read_text()
    titles = re.findall('<figure><h3>(.*?)</h3><svg role="img" aria-label="(.*?)"', page)
    assert all(title == label for title, label in titles)
    assert [title for title, _ in titles] == [
        "advantage r − mean of the group, in standard deviations",
        "standard deviation of a group&#x27;s rewards, mean",
        "responses in groups of equal rewards, which teach nothing",
        "length penalty in the reward, mean",
        "tokens that a bound took out of the gradient",
        "prompts of a step",
        "reward of a step&#x27;s prompts",
        "loss",
        "gradient norm",
    ]
    assert "clip/dual</td><td>0<" in page and "of those that are learned from" in page


def test_a_run_of_before_there_were_methods_keeps_its_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["objective"] = {"name": "apo", "beta2": 0.001, "loss_scale": "paper"}
    del recipe["vstar"]["filter"], recipe["train"]["importance"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("value/mean", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = outline(write_report(run).read_text()).text
    assert "after A*-PO" in text and "256 prompts, 8 samples of each" in text and "gradient norm in REINFORCE" in text
    assert text.count("nothing in metrics.jsonl") == 1 and "V* beside the reward: nothing in" in text


@pytest.mark.parametrize("objective", [{"name": "of tomorrow"}, {"name": "grpo", "of_tomorrow": 1}])
def test_a_method_that_is_not_known_has_a_page_without_a_name(tmp_path: Path, objective: dict[str, object]) -> None:
    run = run_of(tmp_path, "grpo")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"objective": objective}))
    page = write_report(run).read_text()
    assert " · run</title>" in page and "What the method learns from" in page and "<p>tp 1 " in page
    assert "<td>group/std</td>" in page and "<td>grad_norm</td>" in page and "V*" not in page


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
