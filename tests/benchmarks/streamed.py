"""What streamed steps save on long-tailed responses, and the most that they could: the same steps whole and in waves.

    python -m tests.benchmarks.streamed [--rounds 6] [--shrink 32] [SECTION.KEY=VALUE ...]

The quickstart's model with more room, untrained, one trainer rank beside a real vLLM with a thread of its own. The 256
responses of a step have the lengths of lengths.json, divided by `--shrink`: each request has its own cap, and nothing
else ends it. Steps that wait for all and steps that do not take turns, on the same prompts, seeds and caps. In each
round

    bound    = max(generation, reference + first minibatch) + the other minibatches, as the whole step took them
    possible = whole step - bound
    share    = (whole step - streamed step) / possible

The reference is that of all minibatches. The target is a share of 60 %, in the median over rounds. Engine and trainer
share the machine's cores, so that whatever else runs there is in it; of reference and first minibatch it is also told
which part was computed by the time of the last response.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoConfig

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.arithmetic import build_tokenizer, write_model, write_task
from tests.benchmarks.packing import LENGTHS
from tests.benchmarks.ranks import run_ranks

TARGET = 0.6
_WARM_UP = 1  # rounds that are left out: both kinds of step, once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--shrink", type=int, default=32)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(Path(folder), max(caps(args.shrink)), args.overrides)
        told = Path(folder) / "told"
        run_ranks(recipe.parallel.world_size, measure, recipe, args.rounds, args.shrink, told)
        sys.exit(not told.is_file() or told.read_text() != "met")


def caps(shrink: int) -> list[int]:
    """Response tokens of each request of a step."""
    return [max(1, length // shrink) for length in LENGTHS]


def recipe_of(folder: Path, longest: int, overrides: list[str]) -> Recipe:
    """Model and prompts are written to `folder`."""
    data = write_task(folder / "data", seed=0, num_train=len(LENGTHS), num_eval=1, num_sft=1)
    write_model(folder / "model", 0, build_tokenizer())
    config = AutoConfig.from_pretrained(folder / "model")
    config.max_position_embeddings = 2 * (longest + 16)
    config.save_pretrained(folder / "model")
    settings = [
        f"run.dir={folder / 'run'}",
        f"model.path={folder / 'model'}",
        f"data.train={data['train']}",
        f"data.eval={data['eval']}",
        "data.template=raw",
        "data.max_prompt_tokens=16",
        f"sampling.max_response_tokens={longest}",
        "sampling.stop_token_ids=[]",
        "reward.name=arithmetic",
        f"vstar.dir={folder / 'none'}",
        f"train.prompts_per_step={len(LENGTHS)}",
        f"train.tokens_per_micro_batch={max(1024, longest + 16)}",
        "optimizer.lr=1e-6",
        "rollout.threads=1",
        "rollout.kv_cache_gib=0.5",
    ]
    return build_recipe({}, [*settings, *overrides])


def measure(recipe: Recipe, rounds: int, shrink: int, told: Path) -> None:
    """On every rank."""
    from megatron_apo.learner.learner import Learner
    from megatron_apo.learner.streamed import StreamedStep
    from megatron_apo.model.hf_config import read_hf_config
    from megatron_apo.parallel.groups import distributed
    from megatron_apo.rollout import sampler
    from megatron_apo.rollout.inputs import load_inputs
    from megatron_apo.rollout.rollouts import Rollouts

    own_caps, bodies_of = caps(shrink), sampler.generate_bodies

    def capped(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        bodies = bodies_of(*arguments, **options)
        for body, cap in zip(bodies, own_caps, strict=True):
            body["sampling_params"]["max_tokens"] = cap
        return bodies

    sampler.generate_bodies = capped
    with distributed(recipe.parallel) as topology:
        inputs = load_inputs(recipe) if topology.is_driver else None
        prompts = inputs.training.prompts if inputs else []
        learner = Learner.build(recipe, topology)
        rows: list[dict[str, float]] = []

        def whole(number: int) -> dict[str, float]:
            start = time.perf_counter()
            batch = rollouts.sample(prompts, number)
            generated = time.perf_counter()
            own = learner.receive(batch)
            learner.timer.pop()
            learner.learn(own, [0.0] * len(own), number)
            end = time.perf_counter()
            phases = {name: phase.seconds for name, phase in learner.timer.pop().items()}
            # Minibatches have as many sequences each, and of long tails not as many tokens.
            tokens, first = own.sequences.positions_B, len(own) // recipe.train.minibatches
            first_s = phases["train"] * float(tokens[:first].sum() / tokens.sum())
            generate_s, ahead_s = generated - start, phases["reference"] + first_s
            bound = (end - start) - min(generate_s, ahead_s)
            return {"whole": end - start, "generation": generate_s, "ahead": ahead_s, "bound": bound}

        def streamed(number: int) -> dict[str, float]:
            start = time.perf_counter()
            learner.timer.pop()
            step = StreamedStep(learner, number)
            enough = recipe.train.tokens_per_micro_batch * topology.dp
            with closing(rollouts.stream(prompts, number, enough=enough)) as stream:
                for wave_rows, wave in stream:
                    own = step.receive(wave_rows, wave)
                    step.add(own, [0.0] * len(own))
            sampled = time.perf_counter()
            batch = step.batch()
            record = step.finish(batch)
            end = time.perf_counter()
            phases = learner.timer.pop()
            return {
                "streamed": end - start,
                "generation beside": float(batch.seconds_B.max()),
                "last wave": sampled - start - float(batch.seconds_B.max()),
                "waited": phases["wait"].seconds,
                "waves": record.metrics()["layout/waves"],
            }

        rollouts = Rollouts(
            recipe, topology, learner.policy, read_hf_config(recipe.model.path), inputs, phase=learner.timer.phase
        )
        with rollouts:
            rollouts.sync(0)
            for number in range(rounds + _WARM_UP):
                pair = [whole, streamed] if number % 2 else [streamed, whole]
                row: dict[str, float] = {}
                for kind in pair:
                    row |= kind(number)
                rollouts.sync(number + 1)
                rows.append(row)
        if topology.is_driver:
            told.write_text("met" if report(rows[_WARM_UP:], recipe) else "missed")


def report(rows: list[dict[str, float]], recipe: Recipe) -> bool:
    """Whether the target is met."""
    parallel = recipe.parallel
    print(
        f"TP {parallel.tp} x PP {parallel.pp} x CP {parallel.cp} x DP {parallel.dp}, {recipe.train.prompts_per_step} "
        f"responses of {sum(LENGTHS) / len(LENGTHS) * recipe.sampling.max_response_tokens / max(LENGTHS):.0f} tokens "
        f"in the mean and {recipe.sampling.max_response_tokens} at most, {recipe.train.minibatches} minibatches; "
        f"medians of {len(rows)} rounds"
    )
    names = {
        "generation": "generation alone",
        "ahead": "reference and first minibatch alone",
        "whole": "step that waits for all",
        "streamed": "streamed step",
        "bound": "bound",
        "generation beside": "generation beside the trainer",
        "last wave": "computed after the last response",
        "waited": "waited for waves",
    }
    for name, what in names.items():
        values = [row[name] for row in rows]
        print(f"  {what:<38}{median(values):8.2f} s   ({min(values):.2f} to {max(values):.2f})")
    print(f"  {'waves':<38}{median(row['waves'] for row in rows):8.0f}")
    hidden = [1 - row["last wave"] / row["ahead"] for row in rows]
    print(f"reference and first minibatch done by the last response: {median(hidden):.0%}")
    shares = [(row["whole"] - row["streamed"]) / (row["whole"] - row["bound"]) for row in rows]
    share = median(shares)
    met = share >= TARGET
    print(
        f"share of the possible saving: {share:.0%} ({min(shares):.0%} to {max(shares):.0%}); target {TARGET:.0%}: "
        f"{'met' if met else 'missed'}"
    )
    return met


if __name__ == "__main__":
    main()
