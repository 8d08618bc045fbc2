"""Stage 1 beside a bare `vllm.LLM.generate` over the same requests, and what grading adds.

    python -m tests.benchmarks.stage1 [--model runs/quickstart/models/reference] [--prompts 2000] [--samples 8]

The three take turns in one process on one engine, so that they see the same machine: generate alone; stage 1's own loop
(claims, shards, grading in processes of their own, Parquet); the same without decoding and grading the responses. The
model is a warmed-up one, whose responses end by themselves and reach the grader.

With --server stage 1 also takes turns with itself on a server as a training starts it: what it would cost to have one
engine for both stages, beside the start that this would save.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rich.progress import Progress

from megatron_apo.config import build_recipe
from megatron_apo.data.arithmetic import write_task
from megatron_apo.data.order import sample_seed
from megatron_apo.data.prompts import Prompt
from megatron_apo.rewards.pool import Grade, InlineRewardPool
from megatron_apo.rollout.filling import Sampler, SamplingEngine, SamplingJob, Worker, sample_all
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.offline import OfflineEngine, Sample
from megatron_apo.rollout.served import serving_reference
from megatron_apo.rollout.server import engine_environment

TARGET = 0.95  # of the bare throughput
DONE: Future[Grade] = Future()
DONE.set_result(Grade(0.0))


class Ungraded(Sampler):
    def _submit(self, prompt: Prompt, sample: Sample) -> Future[Grade]:
        return DONE


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/models/reference"))
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        measure(Path(scratch), args.model, args.prompts, args.samples, args.rounds, stack if args.server else None)


def measure(
    folder: Path, model: Path, num_prompts: int, num_samples: int, rounds: int, servers: ExitStack | None
) -> None:
    """servers: what ends a server, where there is to be one."""
    write_task(folder / "data", 0, num_train=num_prompts, num_eval=1, num_sft=0)
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model)},
        "data": {"train": str(folder / "data" / "train.jsonl"), "template": "raw", "max_prompt_tokens": 16},
        "sampling": {"max_response_tokens": 24},
        "reward": {"name": "arithmetic"},
        "vstar": {"dir": str(folder / "vstar"), "samples_per_prompt": num_samples, "prompts_per_shard": 256},
        "rollout": {"threads": 1, "kv_cache_gib": 0.25},
    }
    recipe = build_recipe(tree)
    assert "torch" not in sys.modules, "it has read its environment already"
    os.environ |= engine_environment({}, recipe.rollout)
    from megatron_apo.preflight import open_sampling  # which imports torch

    job = open_sampling(recipe)
    engine = OfflineEngine(
        recipe.model.path,
        recipe.rollout,
        seed=0,
        max_sequence_tokens=recipe.max_sequence_tokens,
        prefix_caching=recipe.vstar.prefix_caching,
        log_path=folder / "vllm.log",
    )
    seconds: dict[str, list[float]] = {"bare LLM.generate": [], "stage 1": [], "stage 1 without grading": []}
    bare, graded, ungraded = seconds.values()
    turns: list[tuple[str, SamplingEngine, type[Sampler]]] = [
        ("stage 1", engine, Sampler),
        ("stage 1 without grading", engine, Ungraded),
    ]
    if servers is not None:
        fleet = servers.enter_context(Fleet.of(recipe, recipe.model.path))
        start = time.monotonic()
        fleet.begin_starts(fleet.engines)
        served = servers.enter_context(serving_reference(fleet))
        print(f"a server's start: {time.monotonic() - start:.1f} s", flush=True)
        turns.append(("stage 1 on a server", served, Sampler))
        seconds["stage 1 on a server"] = []
        warm = build_recipe(tree, [f"vstar.dir={folder / 'warm'}"])
        stage_1(served, open_sampling(warm), Sampler)
    generate(engine, job)  # warm
    for turn in range(rounds):
        bare.append(generate(engine, job))
        for number, (name, one, kind) in enumerate(turns):
            own = build_recipe(tree, [f"vstar.dir={folder / f'vstar-{turn}-{number}'}"])
            seconds[name].append(stage_1(one, open_sampling(own), kind))
        print(f"round {turn}:", {name: times[turn] for name, times in seconds.items()}, flush=True)
    print(f"{num_prompts} prompts x {num_samples}, medians of {rounds} rounds, ratios within a round")
    for name, times in seconds.items():
        print(f"{name:24} {median(times):7.2f} s   {throughput(times, bare):6.1%} of bare throughput   {times}")
    ratio = throughput(graded, bare)
    print(f"target: stage 1 has at least {TARGET:.0%} of bare throughput: {'met' if ratio >= TARGET else 'missed'}")
    print(f"grading adds {1 / throughput(graded, ungraded) - 1:+.1%}")
    if on_server := seconds.get("stage 1 on a server"):
        print(f"a server adds {1 / throughput(on_server, graded) - 1:+.1%}")
    if ratio < TARGET:
        sys.exit(1)


def throughput(times: list[float], others: list[float]) -> float:
    """Beside that of `others`, which took turns with them: a machine's speed drifts."""
    return median(other / own for own, other in zip(times, others, strict=True))


def generate(engine: OfflineEngine, job: SamplingJob) -> float:
    from vllm import SamplingParams

    vstar = job.recipe.vstar
    parameters = job.inputs.sampling(job.recipe.sampling).parameters()
    sampling = [
        SamplingParams(
            n=vstar.samples_per_prompt, seed=sample_seed(vstar.seed, "vstar", 0, prompt.prompt_id), **parameters
        )
        for prompt in job.inputs.training.prompts
    ]
    requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in job.inputs.training.prompts]
    start = time.monotonic()
    engine.llm.generate(requests, sampling, use_tqdm=False)
    return round(time.monotonic() - start, 2)


def stage_1(engine: SamplingEngine, job: SamplingJob, kind: type[Sampler]) -> float:
    with InlineRewardPool(job.recipe.reward, job.recipe.graders) as pool, job.claims(Worker()) as claims:
        start = time.monotonic()
        sample_all(job, kind(job, Worker(), engine, pool, start), claims, claims.take(), Progress(disable=True))
        job.stores[0].finish()
        return round(time.monotonic() - start, 2)


if __name__ == "__main__":
    main()
