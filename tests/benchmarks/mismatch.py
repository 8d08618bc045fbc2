"""What a sampler that is not the policy costs, and what importance weights win back, on the demonstration's task.

    python -m tests.benchmarks.mismatch [--out runs/mismatch] [--steps 40] [--seeds 0 1 2]
                                        [--stds 0 0.05 0.2] [--corrections none token sequence]

Gaussian noise of these standard deviations is put on the logits in vLLM's worker (noisy_sampler.py): a fixed function
of a request's seed and a token's position, fresh in every response. The trainer knows nothing of it. The log-probs that
the sampler reports have it in them, which each run shows on its first step's batch: they are those of transformers with
the same noise, to 1e-4. Corrections are train.importance; without noise there is nothing to correct.

All runs share a warm-started reference and a V* store (OUT/base, made by the demonstration's own first stages), and
differ in run.seed: prompts' order and samples. Held-out prompts are answered by an engine without noise, before (the
reference) and after. What is finished (it has a `held_out.json`) is not run again, and the table is of what there is,
so that the study may be stopped and go on; a run takes about two minutes, all of them 45. The watch of the mismatch is
off: it would end these runs, as it should.

Reward is of the last 10 steps and comes from the noisy sampler. +-: standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console
from rich.table import Table

from megatron_apo import quickstart
from megatron_apo.config import Recipe, load_recipe
from megatron_apo.data.order import sample_seeds
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.telemetry.metrics import read_metrics
from megatron_apo.values.store import MANIFEST
from tests.benchmarks.noise import noise

ROOT = Path(__file__).parents[2]
CORRECTIONS = ("none", "token", "sequence")
PROCESSORS = {0.05: "Std0p05", 0.2: "Std0p2"}
LAST_STEPS = 10
CHECKED = 32  # responses of a run whose log-probs are computed again
TOLERANCE = 1e-4  # nats
# Of `results`, in the order of the table.
FORMATS = {"reward": ".3f", "held_out": ".3f", "mismatch": ".2g", "ess": ".3f", "weight": ".3f", "capped": ".2%"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mismatch"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stds", type=float, nargs="+", default=[0.0, *PROCESSORS], choices=[0.0, *PROCESSORS])
    parser.add_argument("--corrections", nargs="+", default=CORRECTIONS, choices=CORRECTIONS)
    args = parser.parse_args()
    base = prepare(args.out / "base")
    runs = args.out / f"{args.steps}-steps"
    for seed in args.seeds:  # so that all settings have a first seed before any has a second
        for std in args.stds:
            for correction in args.corrections if std else ("none",):
                run(base, folder_of(runs, std, correction, seed), std, correction, seed, args.steps)
    show(base, runs, args)


def command(*arguments: str) -> None:
    """`megatron-apo ARGUMENTS`; engines and graders find this folder's modules."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    subprocess.run(
        [sys.executable, "-m", "megatron_apo.cli", *arguments], check=True, env=os.environ | {"PYTHONPATH": path}
    )


def prepare(base: Path) -> Path:
    """The demonstration's recipe; its reference, V* store and the reference's score are made where they are missing."""
    path = base / "recipe.yaml"
    if not path.is_file():
        recipe = quickstart._recipe(0, base, [])
        quickstart._write_inputs(recipe)
        recipe.save(path)
    recipe = load_recipe(path)
    if not recipe.model.path.is_dir():
        command("warmup", "-r", str(path))
    if not (recipe.vstar.dir / MANIFEST).is_file():
        command("estimate-vstar", "-r", str(path))
    if not (base / "held_out.json").is_file():
        evaluate(path, base, recipe.model.path)
    return path


def evaluate(path: Path, folder: Path, model: Path) -> None:
    """Leave the model's score on held-out prompts in FOLDER/held_out.json; the engine has no noise."""
    command("evaluate", "-r", str(path), f"run.dir={folder}", "--model", str(model))
    (written,) = folder.glob("evaluation-*.json")
    written.rename(folder / "held_out.json")


def folder_of(runs: Path, std: float, correction: str, seed: int) -> Path:
    return runs / f"std{std:g}-{correction}-seed{seed}"


def run(path: Path, folder: Path, std: float, correction: str, seed: int, steps: int) -> None:
    """Train, hold the sampler's log-probs against the noise, and evaluate; nothing if that is done."""
    if (folder / "held_out.json").is_file():
        return
    if folder.exists():  # it was stopped on its way
        shutil.rmtree(folder)
    start = time.monotonic()
    overrides = [f"run.dir={folder}", f"run.seed={seed}", f"train.steps={steps}", f"train.importance={correction}"]
    overrides += ["mismatch.warn=null", "mismatch.stop=null", "train.record=true", "telemetry.tensorboard=false"]
    overrides += ["eval.samples=1", "eval.max_prompts=1", "telemetry.progress=false"]  # by the noisy engine: not used
    if std:
        processor = f"tests.benchmarks.noisy_sampler:{PROCESSORS[std]}"
        overrides.append(f"rollout.extra_args={json.dumps(['--logits-processors', processor])}")
    command("train", "-r", str(path), *overrides)
    worst, without = differences(load_recipe(path, overrides), std)
    print(f"{folder.name}: log-probs are those of transformers with noise to {worst:.1e}, without to {without:.1e}")
    if worst > TOLERANCE:
        raise SystemExit(f"{folder.name}: the sampler's log-probs do not have the noise in them")
    evaluate(path, folder, folder / "checkpoints" / "hf")
    shutil.rmtree(folder / "rollouts")
    print(f"{folder.name}: {time.monotonic() - start:.0f} s", flush=True)


@torch.no_grad()
def differences(recipe: Recipe, std: float) -> tuple[float, float]:
    """Largest |difference| of the first step's recorded log-probs from transformers' with the noise, and without it.

    The first step's weights are the reference's.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    batch = RolloutBatch.read(recipe.run.dir / "rollouts" / "step-000001.parquet")
    seeds = sample_seeds(recipe.run.seed, "train", 0, batch.prompt_ids)
    worst = without = 0.0
    for row in range(CHECKED):
        tokens, response = torch.tensor(batch.sequences.row(row)).long(), batch.sequences.response(row)
        logits_LV = model(tokens[None]).logits[0, len(tokens) - len(response) - 1 : -1]
        noise_LV = torch.stack([noise(seeds[row], at, logits_LV.shape[1], std) for at in range(len(response))])
        recorded = torch.tensor(batch.log_probs([row]))
        chosen = torch.tensor(response).long()[:, None]
        found = [
            float((logits.log_softmax(-1).gather(1, chosen)[:, 0] - recorded).abs().max())
            for logits in (logits_LV + noise_LV, logits_LV)
        ]
        worst, without = max(worst, found[0]), max(without, found[1])
    return worst, without


def show(path: Path, runs: Path, args: argparse.Namespace) -> None:
    before = json.loads((path.parent / "held_out.json").read_text())
    table = Table(title=f"{args.steps} steps; held-out avg@{before['samples_per_prompt']} before: {before['mean']:.3f}")
    head = ("noise", "correction", "seeds", f"reward, last {LAST_STEPS} steps", "held-out", "mismatch", "sequence ESS")
    for name in (*head, "mean weight", "capped"):
        table.add_column(name, justify="right", no_wrap=True)
    for std in args.stds:
        for correction in args.corrections if std else ("none",):
            folders = [folder_of(runs, std, correction, seed) for seed in args.seeds]
            found = [results(folder) for folder in folders if (folder / "held_out.json").is_file()]
            cells = [over_seeds([row[name] for row in found], how) for name, how in FORMATS.items()] if found else []
            table.add_row(f"{std:g}", correction, str(len(found)), *cells)
    Console(width=160).print(table)


def results(folder: Path) -> dict[str, float]:
    """Of one run. The reward is of its last steps, the others of all."""
    rows = [row for row in read_metrics(folder) if "loss" in row]

    def mean(name: str, of: Sequence[dict] = rows, otherwise: float = float("nan")) -> float:
        return fmean(row.get(name, otherwise) for row in of)

    return {
        "reward": mean("reward/mean", rows[-LAST_STEPS:]),
        "held_out": json.loads((folder / "held_out.json").read_text())["mean"],
        "mismatch": mean("mismatch/mean"),
        "ess": mean("mismatch/sequence_ess"),
        "weight": mean("importance/mean"),
        "capped": mean("importance/capped"),
    }


def over_seeds(values: Sequence[float], how: str) -> str:
    if math.isnan(values[0]):
        return "-"
    spread = f" ± {stdev(values):{how}}" if len(values) > 1 else ""
    return f"{fmean(values):{how}}{spread}"


if __name__ == "__main__":
    main()
