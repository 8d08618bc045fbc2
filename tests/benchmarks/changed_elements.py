"""How many elements an optimizer step changes in bf16, and what sending only those would save.

    python -m tests.benchmarks.changed_elements MODEL [--rates 1e-6 1e-5] [--steps 6] [--sequences 8] [--tokens 96]

Stage 2's own learner trains a real model in bf16, with fp32 main weights, on random responses with random rewards: what
a step changes is then Adam's doing, whose first steps move every main weight by about the learning rate, and the
rounding's. A delta is priced at 4 bytes for where an element is and 2 for its value, beside 2 bytes for every element.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from megatron_apo.learner.learner import Learner
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import alone
from megatron_apo.weights.hf_io import HFReader
from tests.batches import no_values
from tests.gpu.common import random_batch, recipe_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    for rate in args.rates:
        measure(args, rate)


def measure(args: argparse.Namespace, rate: float) -> None:
    spec, reader = read_hf_config(args.model), HFReader(args.model)
    settings = [f"optimizer.lr={rate}", "model.dtype=bf16", "rollout.dtype=bfloat16", "train.minibatches=1"]
    settings += [f"train.prompts_per_step={args.sequences}", "data.max_prompt_tokens=16"]
    settings += [f"sampling.max_response_tokens={args.tokens}", "train.tokens_per_micro_batch=1024"]
    recipe = recipe_of([*settings, "parallel.threads_per_rank=2"])
    draw = random.Random(0)
    with alone() as topology:
        learner = Learner.build(recipe, topology, spec=spec, policy_weights=reader, reference_weights=reader)
        weights = [parameter for chunk in learner.policy for parameter in chunk.parameters()]
        total = sum(parameter.numel() for parameter in weights)
        print(f"{args.model.name}, {total / 1e6:.0f} M elements, lr {rate:g}")
        for step in range(args.steps):
            before = [parameter.detach().clone() for parameter in weights]
            lengths = [(8, draw.randint(args.tokens // 2, args.tokens)) for _ in range(args.sequences)]
            batch = random_batch(spec, lengths)
            learner.learn(batch, no_values(batch), step)
            changed = sum(int((old != new).sum()) for old, new in zip(before, weights, strict=True))
            share = changed / total
            print(f"  step {step + 1}: {share:.2%} changed, a delta is {3 * share:.1%} of the whole", flush=True)
            del before


if __name__ == "__main__":
    main()
