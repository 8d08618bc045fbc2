"""What `eval.overlapped` saves, and the most that it could: the demonstration with an evaluation after each step.

    python -m tests.benchmarks.overlapped QUICKSTART [--rounds 5] [SECTION.KEY=VALUE ...]

QUICKSTART: the folder of a `megatron-apo quickstart` run. One trainer rank of one thread beside an engine of one; 256
held-out responses an evaluation, as many as a step samples. Runs that wait for their evaluations and runs that do not
take turns. Of all steps but the first, and of the evaluations before them, seconds are added up:

    learning = a waiting step - generation - sync
    possible = the sum over steps of min(learning, evaluation), as the waiting run took them
    share    = (steps and evaluations, waiting - the same, overlapped) / possible
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from megatron_apo.runtime import launch
from megatron_apo.telemetry.metrics import read_metrics

COMMON = (
    "parallel.pp=1",
    "rollout.threads=1",
    "train.steps=9",
    "eval.every=1",
    "eval.max_prompts=64",
    "eval.samples=3",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    told: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            runs = {}
            for overlapped in ("false", "true"):
                run = Path(folder) / f"{turn}-{overlapped}"
                recipe = ["-r", str(args.quickstart / "recipe.yaml"), f"run.dir={run}", *COMMON, *args.overrides]
                launch.run_command(["train", *recipe, f"eval.overlapped={overlapped}"], run.with_suffix(".log"))
                runs[overlapped] = read_metrics(run)
            told.append(beside(runs["false"], runs["true"]))
            print(f"round {turn}:", {name: round(value, 2) for name, value in told[-1].items()}, flush=True)
    print(f"medians of {args.rounds} rounds, seconds")
    for name in told[0]:
        values = [one[name] for one in told]
        print(f"{name:24} {median(values):8.2f}   {min(values):.2f} to {max(values):.2f}")


def beside(waiting: list[dict[str, Any]], overlapped: list[dict[str, Any]]) -> dict[str, float]:
    whole, parts, evaluations = seconds(waiting)
    learning = [step - sum(others) for step, others in zip(whole, parts, strict=True)]
    possible = sum(map(min, learning, evaluations))
    their_whole, _, their_evaluations = seconds(overlapped)
    took, theirs = sum(whole) + sum(evaluations), sum(their_whole) + sum(their_evaluations)
    return {
        "waiting": took,
        "overlapped": theirs,
        "evaluations": sum(evaluations),
        "learning": sum(learning),
        "possible": possible,
        "share": (took - theirs) / possible,
    }


def seconds(rows: list[dict[str, Any]]) -> tuple[list[float], list[tuple[float, float]], list[float]]:
    """Of each step but the first: all of it, its generation and sync; and of the evaluation of its first weights."""
    steps = [row for row in rows if row.get("time/step_s") is not None][1:]
    evaluated = {row["step"]: row["eval/seconds"] for row in rows if row.get("eval/seconds") is not None}
    return (
        [row["time/step_s"] for row in steps],
        [(row["time/generate_s"], row["time/sync_s"]) for row in steps],
        [evaluated[row["step"] - 1] for row in steps],
    )


if __name__ == "__main__":
    main()
