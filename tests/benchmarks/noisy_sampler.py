"""Logits processors for vLLM that make its sampler another one than the policy: Gaussian noise on the logits.

    --logits-processors tests.benchmarks.noisy_sampler:Std0p2

The noise of a token is a fixed function of the request's seed and of the token's position in the response, and
independent from one token to the next: the same whatever is batched with it, and fresh in every response, whose seed is
its own. Requests without a seed, such as proofs, have none. Imported in vLLM's workers.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from tests.benchmarks.noise import noise


class _Noisy(AdapterLogitsProcessor):
    std: float

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        if params.seed is None:
            return None
        seed, std = params.seed, self.std

        def add(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits + noise(seed, len(output_ids), len(logits), std).to(logits)

        return add


class Std0p05(_Noisy):
    std = 0.05


class Std0p2(_Noisy):
    std = 0.2
