"""Log-probs and gradients in bf16 and FP8 beside fp32's, for a small model of each family.

    python -m tests.gpu.parity [--quick] [--tiny]

Truth is the fp32 model on Megatron-Core's own layers, padded. All of it by stage 2's own path, so that the log-ratio of
a first step is seen as well: it must be exactly 0 on Megatron-Core's own layers, and on Transformer Engine's within
what the learner allows. Limits are what the number format explains (`limits`). A minute or two on one GPU. `--quick`: a
dense family and a mixture, without FP8.
"""

from __future__ import annotations

import argparse
from math import pi
from typing import Any

from megatron_apo.config import RecipeError
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.runtime.topology import Topology
from tests.gpu.common import (
    FP8_RECIPES,
    Errors,
    Measured,
    errors,
    free_memory,
    job,
    measure,
    random_batch,
    recipe_of,
    spec_of,
)
from tests.gpu.report import Verdict, parse

COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 1003,  # no multiple of anything
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
_LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Four experts a token: a sum of two is the same in any order.
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "qwen3_moe": _EXPERTS,
}
# What else FP8 can be asked for, none of which rounds more; packed, with scales by tensor.
_FP8_SETTINGS = ("model.fp8.param_gather=true", "model.fp8.bf16_first_layers=1", "model.fp8.bf16_last_layers=1")
_FP8_SETTINGS += ("train.recompute=selective", "train.recompute=full")
_QUICK = ("qwen3", "qwen3_moe")
# Bits of a significand, the leading one among them: of what enters a product going forward, and coming backward.
BITS = {"fp32": (24, 24), "bf16": (8, 8), "fp8": (4, 3)}  # FP8: E4M3, and E5M2 for gradients
# Values of a layer that are rounded on a path through it. bf16: norm, QKV, norm and rotation of Q or K, probabilities,
# attention, projection, sum; norm, gate, up, activation, their product, down, sum. FP8: the inputs and the weights of
# four products, beside which bf16's are small. fp32: a sum's every term; 16- and 8-bit products are added in fp32.
_ROUNDINGS = {"bf16": 15, "fp8": 8}
# By how much another expert in the place of the last of a token's four changes their sum (`limits`).
_OTHER_EXPERT = 0.39
# What the estimate leaves out: softmax and gate multiply errors by the size of their inputs.
_MARGIN = 1.5


def main() -> None:
    args = parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    lengths = [(1, 1), (7, 30), (20, 3), (3, 60)] if args.tiny else [(1, 1), (9, 700), (40, 200), (3, 33), (64, 1500)]
    verdict = Verdict()
    with job() as topology:
        columns = f"{'mean':>9}{'bias':>9}{'largest':>9}{'gradient':>10}{'worst':>9}{'log-ratio':>11}"
        print(f"{'':53}{'log-prob, nats':>20}{'':7}{'gradient, share of its norm':>28}\n{'':53}{columns}")
        for family in ["qwen3"] if args.tiny else _QUICK if args.quick else FAMILIES:
            spec = spec_of(COMMON | {"model_type": family} | FAMILIES[family])
            compare(family, spec, lengths, topology, verdict, with_fp8=not args.quick)
    verdict.finish()


def compare(
    family: str,
    spec: ModelSpec,
    lengths: list[tuple[int, int]],
    topology: Topology,
    verdict: Verdict,
    with_fp8: bool = True,
) -> None:
    """Every row of a family."""
    worst: dict[str, list[float]] = {}  # of a precision's rows: mean, gradient, log-ratio
    batch = random_batch(spec, lengths)
    common = ["train.minibatches=1", f"train.prompts_per_step={len(batch)}", "objective.loss_scale=unit"]
    common.append("optimizer.clip_grad=0")

    def row(kind: str, packing: bool, truth: Measured | None, *overrides: str) -> Measured | None:
        precision = [override.split("=")[1] for override in overrides[:2]]
        rest = [override.partition(".")[2].removeprefix("fp8.") for override in overrides[2:]]
        name = " ".join([family, *precision, *rest, "packed" if packing else "padded"])
        try:
            recipe = recipe_of([*common, *overrides, f"train.packing={packing}", "train.tokens_per_micro_batch=16384"])
            found = measure(recipe, spec, topology, batch)
        except RecipeError as error:
            print(f"{name:<53}not run: {error}", flush=True)
            return None
        if truth is not None:
            e = errors(found, truth)
            figures = judged(kind, spec, e, found)
            cells = f"{e.mean:9.1e}{e.bias:9.1e}{e.largest:9.1e}{e.gradient:10.1e}{e.worst_gradient:9.1e}"
            met = verdict.of(name, **figures)
            print(f"{name:<53}{cells}{found.first_log_ratio:11.1e}  {e.worst_tensor}  {met}", flush=True)
            kept = worst.setdefault(" ".join(precision), [0.0, 0.0, 0.0])
            kept[:] = map(max, kept, [e.mean, e.gradient, found.first_log_ratio])
        return found

    truth = row("fp32", False, None, "model.dtype=fp32", "model.layers=local")
    row("fp32", True, truth, "model.dtype=fp32", "model.layers=local")
    for packing in (True, False):
        for layers in ("local", "te"):
            row("bf16", packing, truth, "model.dtype=bf16", f"model.layers={layers}")
        for fp8 in FP8_RECIPES if with_fp8 else ():
            row("fp8", packing, truth, "model.dtype=bf16", f"model.fp8.recipe={fp8}")
    for setting in _FP8_SETTINGS if with_fp8 else ():
        row("fp8", True, truth, "model.dtype=bf16", "model.fp8.recipe=tensorwise", setting)
    free_memory()
    figures = [f"{name} {mean:.1e}, {gradient:.1e}, {ratio:.1e}" for name, (mean, gradient, ratio) in worst.items()]
    verdict.note(f"{family} (log-prob, gradient, first log-ratio): {'; '.join(figures)}")


def judged(kind: str, spec: ModelSpec, found: Errors, measured: Measured) -> dict[str, tuple[float, float]]:
    """(value, limit) of what is limited in a row."""
    limited = {
        name: (getattr(found, name), limit) for name, limit in limits(kind, spec, len(measured.log_prob_R)).items()
    }
    return limited | {"log-ratio": (measured.first_log_ratio, measured.log_ratio_tolerance)}


def limits(kind: str, spec: ModelSpec, num_tokens: int) -> dict[str, float]:
    """The largest errors that rounding explains, of log-probs of `num_tokens` tokens and of gradients.

    Rounding to b bits moves a value by at most 2^-b of it, evenly spread: 2^-b / sqrt(3) in the root mean square. Such
    errors are independent and of either sign, so that n of them on a path add up to sqrt(n) of one; each counts in
    full, as if the residual carried nothing past a layer.
    """
    forward_bits, backward_bits = BITS[kind]
    count = spec.num_layers * (_ROUNDINGS["bf16"] * spec.hidden_size if kind == "fp32" else _ROUNDINGS[kind])
    hidden = 2.0**-forward_bits * (count / 3) ** 0.5
    # Half of what backward's products take are gradients, the other half forward's inputs and weights.
    backward = (hidden**2 / 2 + 2.0 ** (-2 * backward_bits) * count / 6) ** 0.5
    # A router sends a token elsewhere where the last expert it takes and the first that it does not are closer than
    # their errors: with 4 of 8, 0.305 deviations of a score apart on average, 1.85 x the error of its input, which
    # averages 2/3 of the last layer's. The fourth expert is 0.15 of a sum of weights 0.41, 0.26, 0.19 and 0.15, and
    # another in its place changes the sum by sqrt(2) x 0.15 / |(0.41, 0.26, 0.19, 0.15)| = 0.39 of its norm. In fp32
    # this hardly happens.
    switched = 1.23 * spec.num_layers * hidden if spec.num_experts and kind != "fp32" else 0.0
    # A normed hidden state is sqrt(hidden size) long, hence this deviation of a logit.
    logit = spec.initializer_range * spec.hidden_size**0.5
    error = logit * ((_MARGIN * hidden) ** 2 + switched * _OTHER_EXPERT**2) ** 0.5
    gradient = (_MARGIN**2 * (hidden**2 + backward**2) + switched * _OTHER_EXPERT**2) ** 0.5
    return {
        # sqrt(2 / pi): of a normal variable's deviation, the mean of its absolute value.
        "mean": (2 / pi) ** 0.5 * logit * (_MARGIN * hidden + min(1.0, switched) * _OTHER_EXPERT),
        # A mean has an error's deviation over sqrt(tokens), and four times that once in 16,000 cases. And noise raises
        # the log of a sum of exponentials by half its variance.
        "bias": 4 * error / num_tokens**0.5 + error**2 / 2,
        "gradient": gradient,
        # Noise has next to nothing along the gradient. Where a part gives way to another of its size, as tokens that go
        # to another expert do, half of the error's square is missing there. Sums in fp32 have errors of their own.
        "scale": gradient**2 / 2 + 1e-5,
    }


if __name__ == "__main__":
    main()
