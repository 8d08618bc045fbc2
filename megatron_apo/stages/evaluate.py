"""avg@k and greedy of a Hugging Face folder on held-out prompts.

    RUN/evaluation-<folder>/sampled, greedy   stores of k responses a prompt at the sampling temperature, and of one
    RUN/evaluation-<folder>.json              what they come to

Any number of workers that share the run's folder evaluate together, now or later (`rollout/filling.py`). One that finds
every shard written writes down the result, which is the same whoever has sampled what.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

from megatron_apo.config import Recipe
from megatron_apo.preflight import open_evaluation
from megatron_apo.rollout.evaluation import evaluation_of, evaluation_result
from megatron_apo.rollout.filling import Worker, fill, offline_engine
from megatron_apo.runtime.files import write_whole
from megatron_apo.telemetry.units import with_error


def run(recipe: Recipe, worker: Worker) -> None:
    """Work on the evaluation of `model.path` until it is finished, alone or with other workers."""
    job = open_evaluation(recipe)
    with job.claims(worker) as claims:
        fill(job, worker, claims, partial(offline_engine, job, f"vllm-evaluate{worker.suffix}"))
        sampled, greedy = (one.finish() for one in job.stores)
        claims.remove()
    found, path = (
        evaluation_of(sampled, greedy, job.inputs.evaluation.prompts),
        evaluation_result(recipe.run.dir, recipe.model.path),
    )
    is_new = not path.exists()
    write_whole(path, json.dumps(asdict(found) | {"model": str(recipe.model.path)}, indent=1) + "\n")
    if is_new or worker.index == 0:
        print(
            f"{recipe.model.path}: avg@{found.samples_per_prompt} {with_error(found.mean, found.stderr)}, "
            f"greedy {with_error(found.greedy, found.greedy_stderr)} ({found.num_prompts} prompts); {path}"
        )
        for name, one in found.sources.items():
            print(
                f"  {name}: avg@{one.samples_per_prompt} {with_error(one.mean, one.stderr)}, greedy "
                f"{with_error(one.greedy, one.greedy_stderr)} ({one.num_prompts} prompts)"
            )
