"""What a step takes at the paper's scale, by method: seconds and peak memory as they are COMPUTED. Nothing is measured.

    python -m tests.benchmarks.paper_scale [--settings 1.5B 3B 7B 16k] [--response-tokens 500] [--groups 2 4 8] ..

arXiv 2505.20686: MATH with Qwen2.5 1.5B, 3B and 7B on four H100, and 16k tokens with the 1.5B model on eight. Counted
are passes (`Objective.cost`), FLOPs (model/flops.py), bytes that decoding reads, and bytes that are held, in the layout
of this repository's recipes; the constants below say all that is assumed. All methods take as many steps of as many
prompts; the responses of a prompt are the method's own. A*-PO's stage 1, eight samples of each prompt once, is told
apart and counted in its whole time.

    a pass        = FLOPs / (GPUs x peak x MFU)
    generation    = max(bytes / (HBM x share), FLOPs / (peak x MFU)) + decode steps x overhead, of an engine on each GPU
    bytes         = decode steps x weights + the keys and values that each token's step reads
    decode steps  = the longest response, or all tokens over the sequences that an engine has at once, if that is more

So times are from below: nothing is lost to starting kernels, waiting, syncing weights, grading, evaluation, padding or
a second pass over what was recomputed. The paper's hours are several times as long, and have all of these in them, in
its own code (FSDP, micro-batches of one sequence, an eager engine over four GPUs). Ratios are what may be compared,
with care: what takes each method the same time brings them nearer to 1 (--fixed-s). The last table is how far they go.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_apo.config import Recipe, build_recipe, load_recipe
from megatron_apo.model.flops import forward_flops
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.model.logprobs import SLAB_ROWS
from megatron_apo.objectives import Objective, build_objective

# NVIDIA's data sheet of the H100 SXM: bf16 without sparsity, HBM3, memory.
PEAK_FLOPS, HBM_BYTES_PER_S, GPU_BYTES = 989e12, 3.35e12, 80e9
# Assumptions, which no GPU has confirmed. Megatron-LM's README tells of up to 47 % on H100 in training; a pass without
# gradient and the products of decoding are taken to reach as much as training does.
MFU = 0.4
HBM_SHARE = 0.8  # of the bandwidth that decoding reaches
DECODE_OVERHEAD_S = 0.0  # of a decode step, beside what it reads and computes
LENGTH_CV = 0.5  # standard deviation of responses' lengths over their mean
# The recipe's engines (launch/recipes/qwen2.5-1.5b-math.yaml): what vLLM takes beside weights and KV cache.
WORKSPACE_BYTES = 6e9
# The paper's code (github.com/ZhaolinGao/A-PO, scripts/apo_math.sh): 256 prompts in two minibatches, 8 samples of the
# reference, 25 passes over 7,500 prompts, at most 256 + 1,024 tokens.
PROMPTS, MINIBATCHES, REFERENCE_SAMPLES, MATH_PROMPTS, MATH_STEPS = 256, 2, 8, 7500, 25 * (7500 // 256)

# The paper's table, one seed: hours, and peak memory in %. For 16k tokens hours are second-hand, from a summary of the
# paper (engineerscodex.com/a-star-po-faster-rl-llm-training), by which REBEL ran out of memory.
PAPER: dict[str, dict[str, tuple[float, float | None]]] = {
    "1.5B": {"apo": (6.92, 41.59), "ppo": (10.84, 42.64), "grpo": (15.01, 42.19), "rebel": (10.33, 63.34)},
    "3B": {"apo": (8.78, 49.28), "ppo": (13.59, 54.95), "grpo": (18.26, 49.75), "rebel": (12.88, 74.32)},
    "7B": {"apo": (11.01, 76.57), "ppo": (20.53, 92.81), "grpo": (20.15, 77.82), "rebel": (14.67, 98.77)},
    "16k": {"apo": (49, None), "ppo": (88, None), "grpo": (90, None)},
}


@dataclass(frozen=True)
class Setting:
    """recipe: whose layout, micro-batch and engines are taken, with `overrides`. prompt_tokens, response_tokens: mean
    lengths, which are estimates. stage1_prompts: those that stage 1 samples."""

    recipe: str
    gpus: int
    prompt_tokens: int
    response_tokens: int
    lengths: tuple[int, ...]  # means that the last table goes over
    steps: int
    stage1_prompts: int
    overrides: tuple[str, ...] = ()


SETTINGS = {
    "1.5B": Setting("qwen2.5-1.5b-math", 4, 128, 500, (300, 500, 900), MATH_STEPS, MATH_PROMPTS),
    "3B": Setting(
        "qwen2.5-1.5b-math", 4, 128, 500, (300, 500, 900), MATH_STEPS, MATH_PROMPTS, ("model.path=shape:qwen2.5-3b",)
    ),
    "7B": Setting("qwen2.5-7b-math", 4, 128, 500, (300, 500, 900), MATH_STEPS, MATH_PROMPTS),
    # Prompts and steps are not known: here each prompt comes four times.
    "16k": Setting("r1-distill-qwen-1.5b-16k", 8, 256, 8000, (4000, 8000, 12000), 200, 200 * PROMPTS // 4),
}


@dataclass(frozen=True)
class Assumptions:
    mfu: float = MFU
    hbm_share: float = HBM_SHARE
    decode_overhead_s: float = DECODE_OVERHEAD_S
    length_cv: float = LENGTH_CV
    fixed_s: float = 0.0  # of each step, whatever the method


@dataclass(frozen=True)
class Work:
    """Responses to sample and learn from. longest: tokens of the longest response of an engine's share. max_num_seqs,
    kv_cache_bytes: of an engine."""

    spec: ModelSpec
    gpus: int
    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    longest: int
    max_num_seqs: int
    kv_cache_bytes: float

    @property
    def responses(self) -> int:
        return self.prompts * self.samples

    @property
    def forward_flops(self) -> float:
        """Of a pass over all responses, each of the mean length."""
        return self.responses * forward_flops(self.spec, [(self.prompt_tokens, self.response_tokens)])


def pass_s(flops: float, gpus: int, assumed: Assumptions) -> float:
    return flops / (gpus * PEAK_FLOPS * assumed.mfu)


def kv_token_bytes(spec: ModelSpec) -> int:
    """Keys and values of a token in bf16."""
    return 2 * spec.num_layers * spec.num_query_groups * spec.head_dim * 2


def decode_steps(work: Work) -> int:
    """Of an engine, whose cache holds sequences of the mean length."""
    share = work.responses / work.gpus
    room = work.kv_cache_bytes / (kv_token_bytes(work.spec) * (work.prompt_tokens + work.response_tokens))
    return max(work.longest, math.ceil(share * work.response_tokens / min(share, room, work.max_num_seqs)))


def generate_s(work: Work, assumed: Assumptions) -> float:
    """Of engines on one GPU each, which share out the responses; a prompt is computed once for all of its responses."""
    spec, prompt, mean, steps = work.spec, work.prompt_tokens, work.response_tokens, decode_steps(work)
    share = work.responses / work.gpus
    # A token's step reads the keys and values of all before it: the sum over a response is P L + L^2 / 2.
    tokens_read = share * (prompt * mean + mean**2 * (1 + assumed.length_cv**2) / 2)
    num_bytes = steps * 2 * spec.num_weights + kv_token_bytes(spec) * tokens_read
    of_prompt = forward_flops(spec, [(prompt, 1)])
    flops = share * (forward_flops(spec, [(prompt, mean)]) - of_prompt)
    decode_s = max(num_bytes / (HBM_BYTES_PER_S * assumed.hbm_share), pass_s(flops, 1, assumed))
    prefill_s = pass_s(work.prompts * of_prompt, work.gpus, assumed)
    return decode_s + prefill_s + steps * assumed.decode_overhead_s


def step_s(work: Work, objective: Objective, splits_groups: bool, assumed: Assumptions) -> dict[str, float]:
    """Seconds of each part of a step; parts that a method has none of are left out."""
    cost = objective.cost(MINIBATCHES)
    policy_s = pass_s(work.forward_flops, work.gpus, assumed)
    # Its head is one row.
    critic_s = pass_s(replace(work, spec=replace(work.spec, vocab_size=1)).forward_flops, work.gpus, assumed)
    found = {"generate": generate_s(work, assumed)}
    for name, number in cost.forwards.items():
        if name != "present" or splits_groups:
            found[f"{name} forward"] = number / MINIBATCHES * (critic_s if name == "critic" else policy_s)
    for name, number in cost.forward_backwards.items():  # a backward pass is two forward ones (model/flops.py)
        found[f"{name} training"] = number / MINIBATCHES * 3 * (critic_s if name == "critic" else policy_s)
    return found | ({"fixed": assumed.fixed_s} if assumed.fixed_s else {})


# ---- memory


def peak_bytes(recipe: Recipe, spec: ModelSpec, objective: Objective) -> dict[str, float]:
    """Of a GPU, by part, in training or in sampling, whichever takes more. The engine is on the GPU while it samples,
    and not while the trainer computes, as the paper's code frees it (free_cache_engine)."""
    cost, parallel = objective.cost(MINIBATCHES), recipe.parallel
    shards = parallel.tp * parallel.pp

    def trained(weights: int) -> float:
        """bf16 weights, fp32 gradients; fp32 main weights and moments, which data-parallel ranks share out."""
        return weights * (2 + 4 + 12 / parallel.dp) / shards

    held = {"policy": trained(spec.num_weights)}
    if "reference" in cost.forwards:
        held["reference"] = 2 * spec.num_weights / shards
    if "critic" in cost.forward_backwards:
        held["critic"] = trained(spec.as_critic().num_weights)
    training = {"activations": activation_bytes(recipe, spec)}
    sampling = {
        "engine": 2 * spec.num_weights / recipe.rollout.tp + recipe.rollout.kv_cache_gib * 2**30 + WORKSPACE_BYTES
    }
    return held | max((training, sampling), key=lambda parts: sum(parts.values()))


def activation_bytes(recipe: Recipe, spec: ModelSpec) -> float:
    """Of a micro-batch on Transformer Engine's layers, in bf16, and the head's tile and gradient (model/logprobs.py).

    A layer keeps the inputs and outputs of both norms; queries, keys and values; attention's output; and gate, up and
    their product, unless feed-forward parts are computed again, one layer at a time.
    """
    tokens, train = recipe.train.tokens_per_micro_batch, recipe.train
    query, key = spec.num_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    attention = 4 * spec.hidden_size + 2 * query + 2 * key
    feed_forward = 3 * spec.ffn_size
    again = train.recompute == "selective"
    kept = spec.num_layers * attention + (1 if again else spec.num_layers) * feed_forward
    head = 4 * train.log_prob_chunk_tokens * min(SLAB_ROWS, spec.vocab_size) + 4 * tokens * spec.hidden_size
    return 2 * kept * tokens / recipe.parallel.tp + head


# ---- a setting


@dataclass(frozen=True)
class Row:
    """A method in a setting. parts: seconds of a step. stage1_s: 0 where there is none."""

    name: str
    parts: dict[str, float]
    stage1_s: float
    memory: dict[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())

    def whole_s(self, steps: int) -> float:
        return steps * self.step_s + self.stage1_s

    @property
    def paper(self) -> str:
        return self.name.split()[0]


def rows_of(setting: Setting, groups: Sequence[int], assumed: Assumptions) -> list[Row]:
    """A*-PO, PPO, REBEL and GRPO with groups of each of these sizes."""
    recipe = recipe_of(setting)
    spec = read_hf_config(Path(recipe.model.path))
    assert setting.response_tokens <= recipe.sampling.max_response_tokens, "the mean is above the cap"
    work = Work(
        spec,
        setting.gpus,
        PROMPTS,
        1,
        setting.prompt_tokens,
        setting.response_tokens,
        recipe.sampling.max_response_tokens,
        recipe.rollout.max_num_seqs,
        recipe.rollout.kv_cache_gib * 2**30,
    )
    stage1 = replace(work, prompts=setting.stage1_prompts, samples=REFERENCE_SAMPLES)
    found = []
    for name, size in [("apo", None), ("ppo", None), ("rebel", None), *(("grpo", size) for size in groups)]:
        objective = objective_of(name, size)
        samples = objective.samples_per_prompt
        splits = samples * recipe.max_sequence_tokens > recipe.train.tokens_per_micro_batch
        found.append(
            Row(
                f"{name} G={size}" if size else name,
                step_s(replace(work, samples=samples), objective, splits, assumed),
                generate_s(stage1, assumed) if objective.takes_baseline else 0.0,
                peak_bytes(recipe, spec, objective),
            )
        )
    return found


def recipe_of(setting: Setting) -> Recipe:
    return load_recipe(setting.recipe, ["data.train=unused", "data.eval=unused", *setting.overrides])


def objective_of(name: str, samples: int | None = None) -> Objective:
    """By the method's own defaults, KL to the reference included."""
    settings = [f"objective.name={name}", *([f"objective.samples_per_prompt={samples}"] if samples else [])]
    recipe = build_recipe({}, ["model.path=unused", "data.train=unused", "vstar.dir=unused", *settings])
    return build_objective(recipe.objective, max_response_tokens=recipe.sampling.max_response_tokens)


# ---- the tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--response-tokens", type=int, help="mean length; none: the setting's estimate")
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[2, 4, 8], help="of GRPO; the paper's is not known here"
    )
    parser.add_argument("--mfu", type=float, default=MFU)
    parser.add_argument("--hbm-share", type=float, default=HBM_SHARE)
    parser.add_argument("--decode-overhead-s", type=float, default=DECODE_OVERHEAD_S)
    parser.add_argument("--fixed-s", type=float, default=0.0, help="of each step, whatever the method")
    args = parser.parse_args()
    assumed = Assumptions(args.mfu, args.hbm_share, args.decode_overhead_s, fixed_s=args.fixed_s)
    print(f"COMPUTED, not measured: {assumed}")
    for name in args.settings:
        setting = SETTINGS[name]
        setting = replace(setting, response_tokens=args.response_tokens or setting.response_tokens)
        show(name, setting, rows_of(setting, args.groups, assumed))
        show_ranges(name, setting, args.groups)


def show(name: str, setting: Setting, rows: list[Row]) -> None:
    apo, *_ = rows
    print(
        f"\n{name}: {setting.gpus} GPUs, {PROMPTS} prompts a step, responses of {setting.response_tokens} tokens on "
        f"average, {setting.steps} steps; stage 1 of {setting.stage1_prompts} prompts x {REFERENCE_SAMPLES}: "
        f"{apo.stage1_s / 3600:.2f} h, {apo.stage1_s / (setting.steps * apo.step_s):.0%} of A*-PO's steps\n"
    )
    passes = [apo.stage1_s / more_s if (more_s := extra_s(setting, row, apo)) > 0 else math.inf for row in rows]
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    columns = ["step, s", *parts, "x apo", "hours", "x apo with stage 1", "even after", "paper, h", "x"]
    print(f"| method | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for row, even in zip(rows, passes, strict=True):
        hours, _ = PAPER[name].get(row.paper, (None, None))
        cells = [
            f"{row.step_s:.2f}",
            *(f"{row.parts[part]:.2f}" if part in row.parts else "" for part in parts),
            f"{row.step_s / apo.step_s:.2f}",
            f"{row.whole_s(setting.steps) / 3600:.2f}",
            f"{row.whole_s(setting.steps) / apo.whole_s(setting.steps):.2f}",
            f"{even:.2f} passes" if row is not apo else "",
            f"{hours:.2f}" if hours else "",
            f"{hours / PAPER[name]['apo'][0]:.2f}" if hours else "",
        ]
        print(f"| {row.name} | {' | '.join(cells)} |")
    columns = list(dict.fromkeys(part for row in rows for part in row.memory))
    print(
        f"\n| method | GB a GPU | of 80 | x apo | {' | '.join(columns)} | paper | x |\n|{'---|' * (6 + len(columns))}"
    )
    for row in rows:
        total, (_, share), first = (
            sum(row.memory.values()),
            PAPER[name].get(row.paper, (0, None)),
            PAPER[name]["apo"][1],
        )
        cells = [
            f"{total / 1e9:.1f}",
            f"{total / GPU_BYTES:.0%}",
            f"{total / sum(apo.memory.values()):.2f}",
            *(f"{row.memory[part] / 1e9:.1f}" if part in row.memory else "" for part in columns),
            f"{share:.0f} %" if share else "",
            f"{share / first:.2f}" if share and first else "",
        ]
        print(f"| {row.name} | {' | '.join(cells)} |")


def extra_s(setting: Setting, row: Row, apo: Row) -> float:
    """What a method takes more than A*-PO's steps for one pass over the prompts that stage 1 samples. Stage 1 has paid
    off after as many passes as its time has of these."""
    return setting.stage1_prompts / PROMPTS * (row.step_s - apo.step_s)


def show_ranges(name: str, setting: Setting, groups: Sequence[int]) -> None:
    """How far the ratios of whole times move with what is assumed, all of it at once and each by itself."""
    print(
        f"\nx apo with stage 1, smallest and largest over MFU {RANGES['mfu']}, share of HBM {RANGES['hbm_share']}, "
        f"overhead of a decode step {RANGES['decode_overhead_s']} s, mean lengths {setting.lengths}:\n"
    )
    ranges = ratio_ranges(setting, groups)
    columns = list(next(iter(ranges.values())))
    print(f"| method | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for method, found in ranges.items():
        print(f"| {method} | {' | '.join(f'{low:.2f} to {high:.2f}' for low, high in found.values())} |")


RANGES: dict[str, tuple[float, ...]] = {
    "mfu": (0.3, 0.4, 0.5),
    "hbm_share": (0.5, 0.8, 1.0),
    "decode_overhead_s": (0.0, 0.005, 0.01),
}


def ratio_ranges(setting: Setting, groups: Sequence[int]) -> dict[str, dict[str, tuple[float, float]]]:
    """{method: {what varies: smallest and largest ratio}}, what does not vary being as it is assumed."""
    kept = {key: (getattr(Assumptions(), key),) for key in RANGES} | {"lengths": (setting.response_tokens,)}
    whole = RANGES | {"lengths": setting.lengths}
    cases = {key: kept | {key: whole[key]} for key in whole} | {"all": whole}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for case, values in cases.items():
        ratios: dict[str, list[float]] = {}
        for *chosen, length in itertools.product(*values.values()):
            at = replace(setting, response_tokens=length)
            rows = rows_of(at, groups, Assumptions(**dict(zip(RANGES, chosen, strict=True))))
            for row in rows[1:]:
                ratios.setdefault(row.name, []).append(row.whole_s(at.steps) / rows[0].whole_s(at.steps))
        for name, each in ratios.items():
            found.setdefault(name, {})[case] = (min(each), max(each))
    return found


if __name__ == "__main__":
    main()
