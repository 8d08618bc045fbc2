"""Each method of stage 2 learns: the demonstration's task, 20 steps of 256 responses, one reference, one seed.

    python -m tests.benchmarks.learning QUICKSTART [--out runs/learning] [--methods apo-k4 grpo ...] [overrides]

QUICKSTART: the folder of a `megatron-apo quickstart` run, whose reference, prompts and V* store all methods share.
What they share of settings is `COMMON`; a method's own are its defaults, but for what `METHODS` says. A run that is
complete in OUT is told and not repeated.

gained: held-out avg@8 after - before, and how many of its standard errors, of independent means: the prompts are the
same, which makes the true error smaller. training: mean reward of the first step and of the last three.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from megatron_apo.runtime import launch
from megatron_apo.telemetry.metrics import read_metrics
from megatron_apo.telemetry.summary import read_summary

RESPONSES = 256
COMMON = (
    "train.steps=20",
    "train.minibatches=2",
    "optimizer.lr=2e-4",
    "optimizer.warmup_steps=4",
    "eval.samples=8",
    "eval.max_prompts=512",
)
METHODS: dict[str, tuple[int, tuple[str, ...]]] = {  # responses a prompt, overrides
    "apo": (1, ("objective.name=apo",)),
    "apo-k4": (4, ("objective.name=apo",)),
    "reinforce": (1, ("objective.name=reinforce",)),
    "rloo": (4, ("objective.name=rloo",)),
    "grpo": (8, ("objective.name=grpo",)),
    "dr_grpo": (8, ("objective.name=dr_grpo",)),
    "dapo": (8, ("objective.name=dapo",)),
    "rebel": (2, ("objective.name=rebel",)),
    "ppo": (1, ("objective.name=ppo", "objective.critic.optimizer.lr=2e-4")),
    "tbrm": (1, ("objective.name=tbrm",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args, overrides = parser.parse_known_args()
    for method in args.methods:
        run = args.out / method
        if "pass_at_1" not in read_summary(run) or "after" not in read_summary(run)["pass_at_1"]:
            train(args.quickstart, run, method, overrides)
    show(args.out, args.methods)


def train(quickstart: Path, run: Path, method: str, overrides: list[str]) -> None:
    samples, own = METHODS[method]
    shape = [f"train.prompts_per_step={RESPONSES // samples}", f"objective.samples_per_prompt={samples}"]
    recipe = ["-r", str(quickstart / "recipe.yaml"), f"run.dir={run}"]
    launch.run_command(["train", *recipe, *COMMON, *own, *shape, *overrides])


def show(out: Path, methods: list[str]) -> None:
    table = Table(box=None)
    for name in (
        "method",
        "held-out before",
        "after",
        "gained",
        "standard errors",
        "training",
        "KL a response",
        "step s",
    ):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    missed = []
    for method in methods:
        summary, rows = read_summary(out / method), read_metrics(out / method)
        before, after = summary["pass_at_1"]["before"], summary["pass_at_1"]["after"]
        gained, error = after["mean"] - before["mean"], (before["stderr"] ** 2 + after["stderr"] ** 2) ** 0.5
        rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
        kl = summary.get("kl", {}).get("per_sequence")
        table.add_row(
            method,
            *(f"{found['mean']:.3f} ± {found['stderr']:.3f}" for found in (before, after)),
            f"{gained:+.3f}",
            f"{gained / error:.1f}",
            f"{rewards[0]:.3f} → {fmean(rewards[-3:]):.3f}",
            "" if kl is None else f"{kl:.3f}",
            f"{summary['step_split_s']['step']:.2f}",
        )
        if gained < 4 * error:
            missed.append(method)
    Console(width=140).print(table)
    if missed:
        sys.exit(f"less than 4 standard errors: {', '.join(missed)}")


if __name__ == "__main__":
    main()
