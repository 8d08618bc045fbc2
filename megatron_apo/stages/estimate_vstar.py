"""Stage 1, offline, once: N responses of the reference policy per prompt, graded, into a V* store.

    V*(x) = b1 log( 1/N sum_i exp(r(x, y_i) / b1) ),   y_i ~ pi_ref(.|x)

The store keeps rewards; V* is derived when it is read. A killed run, started again, samples only the missing shards.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.progress import track

from megatron_apo.config import Recipe
from megatron_apo.data.order import sample_seed
from megatron_apo.data.prompts import Prompt
from megatron_apo.inputs import Inputs, fingerprint, load_inputs
from megatron_apo.model.hf_config import check_served, read_hf_config
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.server import engine_environment, longest_request
from megatron_apo.telemetry.summary import RunSummary
from megatron_apo.values.store import StoreRow, StoreWriter
from megatron_apo.weights.hf_io import model_hash


def run(recipe: Recipe) -> None:
    """Fill `recipe.vstar.dir`. Raises before any sampling if the recipe's files do not fit together."""
    check_served(read_hf_config(recipe.model.reference_path))
    inputs = load_inputs(recipe)
    prompts, size = inputs.training.prompts, recipe.vstar.prompts_per_shard
    if inputs.training.too_long:
        print(f"{len(inputs.training.too_long)} prompts are longer than data.max_prompt_tokens and left out")
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    with RewardPool(recipe.reward) as pool, RunSummary(recipe.run.dir).phase("estimate_vstar") as summary:
        identity = fingerprint(
            recipe,
            inputs,
            model_hash=model_hash(recipe.model.reference_path),
            reward_name=pool.reward_name,
            reward_version=pool.reward_version,
        )
        writer = StoreWriter(recipe.vstar.dir, identity, len(shards))
        missing = sorted(set(range(len(shards))) - writer.finished_shards())
        if missing:
            with _output_to(recipe.run.dir / "logs" / "vllm-estimate-vstar.log"):
                engine = _start_engine(recipe)
            for index in track(missing, "V*: sampling the reference", disable=not recipe.telemetry.progress):
                writer.write_shard(index, _sample_shard(engine, recipe, inputs, shards[index], pool))
        store = writer.finish()
        summary["vstar"] = {
            "prompts": len(store),
            "samples_per_prompt": recipe.vstar.samples_per_prompt,
            "mean_reward": float(store.rewards.mean()),
            "grader_failures": pc.sum(store.column("num_failures")).as_py(),
        }
    n, mean = recipe.vstar.samples_per_prompt, store.rewards.mean()
    print(f"V* store: {recipe.vstar.dir}, {len(store)} prompts x {n}, mean reward {mean:.3f}")


def _start_engine(recipe: Recipe) -> Any:
    """One in-process vLLM engine over the reference."""
    rollout = recipe.rollout
    os.environ |= engine_environment(rollout)  # read by vLLM when it is imported
    from vllm import LLM

    engine = LLM(
        model=str(recipe.model.reference_path),
        skip_tokenizer_init=True,  # token ids in, token ids out
        dtype=rollout.dtype,
        seed=recipe.vstar.seed,
        max_model_len=longest_request(recipe.model.reference_path, recipe.max_sequence_tokens),
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        kv_cache_memory_bytes=int(rollout.kv_cache_gib * 2**30),
        tensor_parallel_size=rollout.tp,
        generation_config="vllm",  # no sampling default from the model's folder
        enable_chunked_prefill=False,  # a seeded request prefilled in two pieces kills the CPU engine
        enforce_eager=True,
    )
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns about the tokenizer that it was told not to load
    return engine


@contextmanager
def _output_to(log_path: Path) -> Iterator[None]:
    """Let this process and those that it starts in this block write to a file: vLLM is talkative, also from C++."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    usual = {stream: os.dup(stream) for stream in (1, 2)}
    with log_path.open("ab") as log:
        try:
            for stream in usual:
                os.dup2(log.fileno(), stream)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in usual.items():
                os.dup2(copy, stream)
                os.close(copy)


def _sample_shard(
    engine: Any, recipe: Recipe, inputs: Inputs, prompts: Sequence[Prompt], pool: RewardPool
) -> list[StoreRow]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            n=recipe.vstar.samples_per_prompt,
            seed=sample_seed(recipe.vstar.seed, "vstar", 0, prompt.prompt_id),
            **inputs.sampling(recipe.sampling).parameters(),
        )
        for prompt in prompts
    ]
    requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    results = engine.generate(requests, sampling, use_tqdm=False)
    graded = []
    for prompt, result in zip(prompts, results, strict=True):
        samples = sorted(result.outputs, key=lambda output: output.index)
        graded.append(
            (samples, [pool.submit(inputs.grade_request(prompt, s.token_ids, s.finish_reason)) for s in samples])
        )
    rows = []
    for prompt, (samples, futures) in zip(prompts, graded, strict=True):
        grades = [future.result() for future in futures]
        rows.append(
            StoreRow(
                prompt_id=prompt.prompt_id,
                text_hash=prompt.text_hash,
                rewards=[grade.reward for grade in grades],
                lengths=[len(sample.token_ids) for sample in samples],
                finish_reasons=[sample.finish_reason for sample in samples],
                responses=[list(sample.token_ids) for sample in samples] if recipe.vstar.keep_responses else None,
                num_failures=sum(grade.failure is not None for grade in grades),
            )
        )
    return rows
