"""Stage 1 beside a bare `vllm.LLM.generate` over the same requests, and what grading adds.

    python -m tests.benchmarks.stage1 [--prompts 2000] [--samples 8] [--rounds 3] [--model DIR]

The three take turns in one process on one engine, so that they see the same machine: generate alone; stage 1's
sampler (shards, grading in processes of their own, Parquet) with the arithmetic grader; the same with one that does
nothing.
Without --model the arithmetic model is used untrained, whose responses run to the length cap.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from megatron_apo.config import build_recipe
from megatron_apo.data.arithmetic import build_tokenizer, write_model, write_task
from megatron_apo.data.order import sample_seed
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.offline import OfflineEngine
from megatron_apo.stages.estimate_vstar import Job, Sampler


class Nothing:
    """A grader that costs nothing."""

    name, version = "nothing", "1"

    def __call__(self, request: GradeRequest) -> float:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch), args.model, args.prompts, args.samples, args.rounds)


def measure(folder: Path, model: Path | None, num_prompts: int, num_samples: int, rounds: int) -> None:
    write_task(folder / "data", 0, num_train=num_prompts, num_eval=1, num_sft=0)
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model or write_model(folder / "model", 0, build_tokenizer()))},
        "data": {"train": str(folder / "data" / "train.jsonl"), "template": "raw", "max_prompt_tokens": 16},
        "sampling": {"max_response_tokens": 24},
        "reward": {"name": "arithmetic"},
        "vstar": {"dir": str(folder / "vstar"), "samples_per_prompt": num_samples, "prompts_per_shard": 256},
        "rollout": {"threads": 1, "kv_cache_gib": 0.25},
    }
    recipe = build_recipe(tree, [])
    engine = OfflineEngine(
        recipe.model.path,
        recipe.rollout,
        seed=0,
        max_sequence_tokens=recipe.max_sequence_tokens,
        prefix_caching=recipe.vstar.prefix_caching,
        log_path=folder / "vllm.log",
    )
    job = Job.open(recipe)
    seconds: dict[str, list[float]] = {"bare generate": [], "stage 1": [], "stage 1, no grading": []}
    bare(engine, job)  # warm
    for turn in range(rounds):
        seconds["bare generate"].append(bare(engine, job))
        for name, reward in (("stage 1", "arithmetic"), ("stage 1, no grading", "tests.benchmarks.stage1:Nothing")):
            own = build_recipe(tree, [f"vstar.dir={folder / f'vstar-{turn}-{reward[:4]}'}", f"reward.name={reward}"])
            seconds[name].append(stage_1(engine, Job.open(own)))
    alone = median(seconds["bare generate"])
    print(f"{num_prompts} prompts x {num_samples}, {rounds} rounds, medians")
    for name, times in seconds.items():
        print(f"{name:22} {median(times):7.2f} s   {alone / median(times):6.1%} of bare throughput   {times}")


def bare(engine: OfflineEngine, job: Job) -> float:
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


def stage_1(engine: OfflineEngine, job: Job) -> float:
    with RewardPool(job.recipe.reward) as pool:
        start = time.monotonic()
        sampler = Sampler(job, engine, pool)
        waiting = list(range(job.writer.num_shards))
        while waiting or sampler.is_busy:
            if waiting and sampler.wants_more:
                sampler.open(waiting.pop(0))
            sampler.advance()
        job.writer.finish()
        return round(time.monotonic() - start, 2)


if __name__ == "__main__":
    main()
