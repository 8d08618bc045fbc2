"""A run of stage 2 that is ready to start, made in a second: an untrained model, prompts, and a V* store that no engine
sampled; and batches for it that none did either."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_apo.config import Recipe, build_recipe
from megatron_apo.data.arithmetic import build_tokenizer, write_model, write_task
from megatron_apo.data.order import step_prompts
from megatron_apo.data.rollouts import RolloutBatch, RolloutFolder
from megatron_apo.rollout.inputs import load_inputs, store_fingerprint
from megatron_apo.values.shards import StoreRow
from megatron_apo.values.store import StoreWriter
from tests.batches import make_batch

NUM_PROMPTS, NUM_EVAL, SAMPLES = 64, 8, 4
SETTINGS = [
    "data.template=raw",
    "data.max_prompt_tokens=16",
    "sampling.max_response_tokens=24",
    f"vstar.samples_per_prompt={SAMPLES}",
    "reward.name=arithmetic",
    "train.steps=3",
    "train.prompts_per_step=16",
    "train.minibatches=2",
    "train.tokens_per_micro_batch=256",
    "optimizer.lr=1e-3",
    "rollout.threads=1",
    "rollout.kv_cache_gib=0.25",
    "eval.samples=1",
    "telemetry.progress=false",
]


def write_run(folder: Path, *overrides: str, num_experts: int = 0, num_eval: int = NUM_EVAL) -> Recipe:
    """Write model, data and store under `folder`; the recipe is in folder/recipe.yaml. With experts it is a mixture."""
    data = write_task(folder / "data", 0, num_train=NUM_PROMPTS, num_eval=num_eval, num_sft=0)
    write_model(folder / "model", 0, build_tokenizer())
    if num_experts:
        make_mixture(folder / "model", num_experts)
    paths = [f"run.dir={folder / 'run'}", f"model.path={folder / 'model'}", f"vstar.dir={folder / 'vstar'}"]
    paths += [f"data.train={data['train']}", f"data.eval={data['eval']}"]
    recipe = build_recipe({}, [*paths, *SETTINGS, *overrides])
    write_store(recipe)
    recipe.save(folder / "recipe.yaml")
    return recipe


def make_mixture(folder: Path, num_experts: int) -> None:
    """Put a mixture in the place of a dense model."""
    dense = Qwen3Config.from_pretrained(folder).to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("max_position_embeddings", "eos_token_id", "pad_token_id", "bos_token_id")
    own = {"num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "dtype": "float32"}
    own |= {"tie_word_embeddings": False, "norm_topk_prob": True, "intermediate_size": 96}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**{name: dense[name] for name in names}, **own)).save_pretrained(folder)


def write_store(recipe: Recipe) -> None:
    """A store of this recipe whose rewards are drawn, a share of them right for each prompt."""
    inputs, draw = load_inputs(recipe), random.Random(0)
    rows = []
    for prompt in inputs.training.prompts:
        rate = draw.random()
        rewards = [float(draw.random() < rate) for _ in range(SAMPLES)]
        rows.append(StoreRow(prompt.prompt_id, prompt.text_hash, rewards, [9] * SAMPLES, ["stop"] * SAMPLES))
    writer = StoreWriter(recipe.vstar.dir, store_fingerprint(recipe, inputs), 1)
    writer.write_shard(0, rows)
    writer.finish()


def write_batches(recipe: Recipe, folder: Path, steps: Sequence[int]) -> None:
    """What `train --record` would have kept of these steps, of the recipe's own prompts and random responses."""
    inputs = load_inputs(recipe)
    for step in steps:
        RolloutFolder(folder).write(step, random_batch(recipe, inputs.training.prompts, step))


def random_batch(recipe: Recipe, prompts: Sequence, step: int) -> RolloutBatch:
    draw = random.Random(step)
    chosen = step_prompts(
        step, num_prompts=len(prompts), prompts_per_step=recipe.train.prompts_per_step, seed=recipe.run.seed
    )
    responses = [[draw.randrange(18) for _ in range(draw.randint(1, 24))] for _ in chosen]
    return make_batch(
        [prompts[index].token_ids for index in chosen],
        responses,
        rewards=[float(draw.random() < 0.5) for _ in chosen],
        log_probs=[[-3 * draw.random() for _ in response] for response in responses],
        prompt_ids=[prompts[index].prompt_id for index in chosen],
        weight_version=step,
    )
