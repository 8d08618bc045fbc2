"""A recorded run, and the true value of its prompts at some of its steps: what `baselines.py --run --truth` reads.

    python -m tests.benchmarks.recorded_truth QUICKSTART [--out runs/truth] [--prompts 96] [--steps 48] [--every 6]
                                              [--group 4] [--samples 256] [section.key=value ...]

QUICKSTART: the folder of a `megatron-apo quickstart` run, whose reference and prompts are used. GRPO trains on so many
of its prompts, half of them a step, and saves its weights every so many steps; each of these, and the reference, is
then sampled so many times a prompt as stage 1 would. The truth of step 1, EVERY + 1, .. is the mean reward of the
weights that the step sampled from: OUT/truth.parquet with columns step, prompt_id and value. What is there is not made
again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_apo.runtime import launch
from megatron_apo.values.store import VStarStore, is_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/truth"))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--samples", type=int, default=256)
    args, overrides = parser.parse_known_args()
    recipe = ["-r", str(args.quickstart / "recipe.yaml"), f"data.max_prompts={args.prompts}"]
    run = args.out / "run"
    if not (run / "checkpoints" / "hf").is_dir():
        settings = ["objective.name=grpo", f"objective.samples_per_prompt={args.group}", f"train.steps={args.steps}"]
        settings += [
            f"train.prompts_per_step={args.prompts // 2}",
            f"train.save_every={args.every}",
            "train.record=true",
        ]
        launch.run_command(["train", *recipe, f"run.dir={run}", *settings, *overrides])
    rows: dict[str, list] = {"step": [], "prompt_id": [], "value": []}
    for step in range(0, args.steps, args.every):
        store = VStarStore.open(sampled(recipe, args, run, step))
        means = store.values(1.0, "mean")
        for prompt_id in store.prompt_ids:
            rows["step"].append(step + 1)
            rows["prompt_id"].append(prompt_id)
            rows["value"].append(means[prompt_id])
    pq.write_table(pa.table(rows), args.out / "truth.parquet")
    print(f"{len(rows['step'])} values: {args.out / 'truth.parquet'}")


def sampled(recipe: list[str], args: argparse.Namespace, run: Path, step: int) -> Path:
    """The store of the samples of the weights after `step` steps."""
    folder = args.out / f"after-{step}"
    store, model = folder / "store", folder / "model"
    if is_whole(store):
        return store
    if step and not model.is_dir():
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        launch.run_command(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(model)])
    own = [f"model.path={model}"] if step else []
    own += [f"run.dir={folder}", f"vstar.dir={store}", f"vstar.samples_per_prompt={args.samples}", "vstar.seed=1000"]
    launch.run_command(["estimate-vstar", *recipe, *own])
    return store


if __name__ == "__main__":
    main()
