"""Stage 1, offline, once: responses of the reference policy for every prompt, graded, into a V* store.

    V*(x) = b1 log( 1/N sum_i exp(r(x, y_i) / b1) ),   y_i ~ pi_ref(.|x)

The store keeps rewards; V* is derived when it is read. Any number of workers fill one store, now or later
(`rollout/filling.py`). A worker that finds every shard written closes the store, or reads it if another has.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from megatron_apo.config import Recipe
from megatron_apo.preflight import open_sampling
from megatron_apo.rollout.filling import SamplingEngine, SamplingJob, Worker, fill, offline_engine
from megatron_apo.rollout.inputs import load_inputs, store_fingerprint
from megatron_apo.rollout.stored_prompts import check_prompts
from megatron_apo.telemetry.summary import RunSummary
from megatron_apo.values.claims import Claims
from megatron_apo.values.store import NO_VALUE, VStarStore
from megatron_apo.values.summary import summarize


def run(recipe: Recipe, worker: Worker, engine: SamplingEngine | None = None) -> None:
    """Work on `recipe.vstar.dir` until it is finished, alone or with other workers. engine: None: one of its own."""
    job = open_sampling(recipe)
    with job.claims(worker) as claims, RunSummary(recipe.run.dir).phase("estimate_vstar") as summary:
        left_out = job.inputs.training.left_out
        if any(left_out.values()):
            (recipe.vstar.dir / "left_out.json").write_text(json.dumps(left_out, indent=1) + "\n")
        own = partial(offline_engine, job, f"vllm-estimate-vstar{worker.suffix}")
        fill(job, worker, claims, (lambda: engine) if engine else own)
        summary["vstar"] = _close(job, claims)


def merge(recipe: Recipe) -> None:
    """Close a store whose shards are all written. Raises `StoreError` listing those that are not."""
    job = open_sampling(recipe)
    RunSummary(recipe.run.dir).add({"vstar": _close(job, job.claims(Worker()))})


def check(recipe: Recipe) -> None:
    """Read the finished store whole, and compare it with the recipe. Raises `StoreError`."""
    store, inputs = VStarStore.open(recipe.vstar.dir), load_inputs(recipe)
    store.check(store_fingerprint(recipe, inputs))
    check_prompts(store, inputs.training.prompts)
    print(f"{store.folder}: whole, {len(store)} prompts x {store.drawn.samples}, and of this recipe")


def _close(job: SamplingJob, claims: Claims) -> dict[str, Any]:
    """See to the manifest; for the summary: what the store holds."""
    (filling,) = job.stores
    store = filling.finish()
    claims.remove()
    found = summarize(store, [job.recipe.vstar.beta1], "log_mean_exp")
    print(f"V* store: {store.folder}, {found.prompts} prompts x {found.samples}, mean reward {found.reward.mean:.3f}")
    if found.without_value:
        print(f"{found.without_value} of {found.prompts} prompts have no V*: {NO_VALUE}")
    return {
        "prompts": found.prompts,
        "samples_per_prompt": found.samples,
        "samples": found.responses.count,
        "mean_reward": found.reward.mean,
        "mean_reward_stderr": found.reward.stderr,
        "without_value": found.without_value,
        "truncated": found.responses.truncated,
        "unfinished_thinking": found.responses.num_unfinished,
        "grader_failures": found.responses.num_failures,
        "left_out": {why: len(rows) for why, rows in job.inputs.training.left_out.items()},
        "hours": found.hours,
        "settings": store.settings,
    }
