"""FLOPs that a model's own mathematics needs, and the rates that follow (model FLOPs: PaLM, arXiv 2204.02311, B).

Of a sequence of P prompt and R response tokens, T = P + R - 1 positions are computed (the last token is only a label)
and the output head sees R of them. With L layers, hidden size H, Q = heads x head_dim, K = query groups x head_dim,
V rows of the head (1 for values), and an MLP of inner size F, or E experts of inner size M of which k are active:

    forward  = L (T (2 H (2 Q + 2 K) + mlp) + 4 Q T (T + 1) / 2) + 2 H V R
    mlp      = 6 H F    or    6 H M k + 2 H E
    training = 3 forward

A multiplication with its addition is 2; attention counts the T (T + 1) / 2 pairs that a causal mask leaves. Embedding,
norms, rotation, softmax, biases and the optimizer are left out, and what a layout or a memory setting adds, padding and
recomputation, is no useful work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_apo.model.hf_config import ModelSpec

_TRAINING = 3  # forward, and a backward with two products (for inputs and for weights) to each of the forward's


def forward_flops(spec: ModelSpec, sequences: Iterable[tuple[int, int]]) -> int:
    """FLOPs of the responses' log-probs or values; `sequences`: (prompt tokens, response tokens), neither 0."""
    hidden, query = spec.hidden_size, spec.num_heads * spec.head_dim
    key = spec.num_query_groups * spec.head_dim
    if spec.num_experts:
        mlp = 6 * hidden * spec.expert_ffn_size * spec.experts_per_token + 2 * hidden * spec.num_experts
    else:
        mlp = 6 * hidden * spec.ffn_size
    linear = 2 * hidden * (2 * query + 2 * key) + mlp
    outputs = 1 if spec.head == "value" else spec.vocab_size
    total = 0
    for prompt_tokens, response_tokens in sequences:
        positions = prompt_tokens + response_tokens - 1
        total += spec.num_layers * (positions * linear + 2 * query * positions * (positions + 1))
        total += 2 * hidden * outputs * response_tokens
    return total


def training_rates(
    spec: ModelSpec,
    sequences: Iterable[tuple[int, int]],
    seconds: Mapping[str, float],
    *,
    num_ranks: int,
    peak_flops: float | None,
    has_reference: bool,
    critic: ModelSpec | None = None,
) -> dict[str, float]:
    """A step's tokens/s of all ranks, TFLOP/s of one rank, and MFU where `peak_flops` (of one rank, a second) is known.

    By part: `reference` (its forward, where there is one), `forward_backward` (the phase "train" alone), `critic` (its
    values and its training, where there is one) and `train`, which is all of these, the optimizer, and the time but not
    the FLOPs of the old policy's forward where it takes one. `seconds` are those of the phases. Names as in
    metrics.jsonl. Under FP8 the peak is FP8's, though attention and the output head stay bf16: MFU then is of a peak
    that no such step reaches.
    """
    sequences = list(sequences)
    tokens = sum(prompt + response for prompt, response in sequences)
    forward = forward_flops(spec, sequences)
    parts = {"forward_backward": (_TRAINING * forward, seconds["train"])}
    if has_reference:
        parts["reference"] = forward, seconds["reference"]
    if critic:
        parts["critic"] = (1 + _TRAINING) * forward_flops(critic, sequences), seconds["critic"]
    others_s = seconds.get("old_policy", 0.0) + seconds["optimizer"]
    parts["train"] = sum(flops for flops, _ in parts.values()), sum(part_s for _, part_s in parts.values()) + others_s
    rates = {}
    for part, (flops, part_s) in parts.items():
        rates[f"tokens_per_s/{part}"] = tokens / part_s
        rates[f"tflops_per_rank/{part}"] = flops / part_s / num_ranks / 1e12
        if peak_flops:
            rates[f"mfu/{part}"] = flops / part_s / num_ranks / peak_flops
    return rates
