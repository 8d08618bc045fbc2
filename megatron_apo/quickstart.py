"""The embedded demonstration: both stages of A*-PO on two CPU cores, with the parts a cluster would use.

It makes data, tokenizer and an untrained model from a seed, writes one recipe, and then runs the same commands that a
user would run by hand, each in a process of its own. Nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from megatron_apo.config import Recipe, RecipeError, build_recipe, recipe_path
from megatron_apo.data.arithmetic import build_tokenizer, write_model, write_task
from megatron_apo.runtime import launch
from megatron_apo.stages.report import write_report
from megatron_apo.telemetry.summary import RunSummary, read_summary
from megatron_apo.telemetry.units import with_error

NUM_TRAIN, NUM_EVAL, NUM_SFT = 2048, 512, 1400
STAGES = ("warmup", "estimate-vstar", "train")
_DEFAULT_OUT = Path("runs/quickstart")


def run(seed: int, out: Path | None, overrides: Sequence[str]) -> None:
    """Run the demonstration into `out` (default: a new folder under runs/)."""
    start = time.monotonic()
    if out is None:
        out = _free_folder(_DEFAULT_OUT)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty; give a new folder")
    recipe = _recipe(seed, out, overrides)
    _write_inputs(recipe)
    path = recipe.run.dir / "recipe.yaml"
    recipe.save(path)
    console = Console()
    for stage in STAGES:
        console.print(f"[bold]$ megatron-apo {stage} --recipe {path}[/bold]")
        launch.run_command([stage, "--recipe", str(path)])
    RunSummary(recipe.run.dir).add({"phases_s": {"total": round(time.monotonic() - start, 2)}})
    report = write_report(recipe.run.dir)
    console.print(_closing_table(recipe.objective.title, read_summary(recipe.run.dir)))
    console.print(f"report: {report}\ntrained model: {recipe.run.dir / 'checkpoints' / 'hf'}", soft_wrap=True)


def _recipe(seed: int, out: Path, overrides: Sequence[str]) -> Recipe:
    tree = yaml.safe_load(recipe_path("quickstart").read_text())
    paths = {
        "run": {"dir": str(out), "seed": seed},
        "model": {"path": str(out / "models" / "reference")},
        "data": {"train": str(out / "data" / "train.jsonl"), "eval": str(out / "data" / "eval.jsonl")},
        "warmup": {"start": str(out / "models" / "untrained"), "data": str(out / "data" / "sft.jsonl")},
        "vstar": {"dir": str(out / "vstar"), "seed": seed},
    }
    for section, values in paths.items():
        tree[section] = tree.get(section, {}) | values
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in ("run.dir", "run.seed"):
            raise RecipeError([f"override {key}: the demonstration's files follow it; use --out and --seed"])
    return build_recipe(tree, overrides)


def _write_inputs(recipe: Recipe) -> None:
    write_task(recipe.run.dir / "data", recipe.run.seed, num_train=NUM_TRAIN, num_eval=NUM_EVAL, num_sft=NUM_SFT)
    assert recipe.warmup.start is not None
    write_model(recipe.warmup.start, recipe.run.seed, build_tokenizer())


def _free_folder(folder: Path) -> Path:
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _closing_table(method: str, summary: dict) -> Table:
    table = Table(title=f"{method} on arithmetic", show_header=False)
    before, after = summary["pass_at_1"]["before"], summary["pass_at_1"]["after"]
    for name, key in ((f"avg@{before['samples_per_prompt']}", "mean"), ("greedy", "greedy")):
        error = "stderr" if key == "mean" else "greedy_stderr"
        values = " -> ".join(with_error(found[key], found[error]) for found in (before, after))
        table.add_row(f"held-out {name}, reference -> trained", values)
    split = summary["step_split_s"]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in split.items() if name != "step")
    table.add_row("seconds a step", f"{split['step']:.2f} ({parts})")
    table.add_row(
        "seconds by phase", ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["phases_s"].items())
    )
    table.add_row("weight sync", f"{summary['sync']['seconds_mean']:.3f} s, {summary['sync']['bytes'] / 2**20:.1f} MiB")
    table.add_row("largest trainer-vLLM log-prob difference", f"{summary['max_log_prob_difference']:.2g}")
    if warned := summary["mismatch"]["warned_steps"]:
        table.add_row("steps whose trainer-vLLM difference was warned of", str(warned))
    if kl := summary.get("kl"):
        table.add_row("KL to the reference", f"{kl['per_token']:.4f} a token, {kl['per_sequence']:.3f} a response")
    rates = summary["tokens_per_s"]
    table.add_row("tokens/s", f"generation {rates['generation']:,.0f}, training {rates['training']:,.0f}")
    peaks = summary["peak_memory_bytes"]
    table.add_row("peak private memory", ", ".join(f"{name} {used / 2**20:,.0f} MiB" for name, used in peaks.items()))
    return table
