"""A step of stage 2 with responses of 16,384 tokens, end to end on the CPU: seconds and peak memory of each phase.

    python -m tests.benchmarks.long_step [--tokens 16384] [--prompts 4] [--out DIR] [SECTION.KEY=VALUE ...]

The quickstart's model with room for such sequences, untrained; nothing ends a response but the cap, and its reward is
the share of sevens in it. Stage 1 samples one response a prompt; stage 2 makes one step, and before and after it
evaluates on one prompt, greedily and with one sample. That is six times 16,384 tokens, one after the other, most of the
half hour that it takes on two cores. The commands are those that a user runs. With train.steps=2 the last is shown; the
first alone has the proof of the weights in it, in no phase of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig

from megatron_apo.config import build_recipe
from megatron_apo.data.arithmetic import build_tokenizer, write_model, write_task
from megatron_apo.rewards import GradeRequest
from megatron_apo.telemetry.metrics import read_metrics
from megatron_apo.telemetry.summary import read_summary

ROOT = Path(__file__).parents[2]
_BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU
_SHOWN = ("tokens_per_s", "mismatch", "kl", "loss", "grad_norm")


class Sevens:
    """A reward that an untrained model earns some of."""

    name, version = "sevens", "1"

    def __call__(self, request: GradeRequest) -> float:
        return request.response.count("7") / len(request.response)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="long-step-"))
    path = write_run(out, args.tokens, args.prompts, args.overrides)
    for stage in ("estimate-vstar", "train"):
        command = [sys.executable, "-m", "megatron_apo.cli", stage, "--recipe", str(path)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # graders import the reward
    report(out, args.tokens)


def write_run(out: Path, tokens: int, prompts: int, overrides: list[str]) -> Path:
    """Model, prompts and recipe under `out`; the recipe's path."""
    write_task(out / "data", seed=0, num_train=prompts, num_eval=1, num_sft=1)
    write_model(out / "model", 0, build_tokenizer())
    config = AutoConfig.from_pretrained(out / "model")
    config.max_position_embeddings = 2 * tokens
    config.save_pretrained(out / "model")
    longest = tokens + 16
    # Keys and values in fp32, of every sequence and one more for what vLLM keeps to itself.
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    cache_bytes = (prompts + 1) * (longest // _BLOCK + 1) * _BLOCK * token_bytes
    settings = [
        f"run.dir={out}",
        f"model.path={out / 'model'}",
        f"data.train={out / 'data' / 'train.jsonl'}",
        f"data.eval={out / 'data' / 'eval.jsonl'}",
        "eval.samples=1",
        "data.template=raw",
        "data.max_prompt_tokens=16",
        f"sampling.max_response_tokens={tokens}",
        "sampling.stop_token_ids=[]",
        "reward.name=tests.benchmarks.long_step:Sevens",
        f"vstar.dir={out / 'vstar'}",
        "vstar.samples_per_prompt=1",
        "parallel.pp=2",
        "train.steps=1",
        f"train.prompts_per_step={prompts}",
        "train.minibatches=2",
        f"train.tokens_per_micro_batch={longest}",
        f"rollout.max_num_batched_tokens={2 * longest}",
        f"rollout.max_num_seqs={prompts}",
        "rollout.threads=1",
        f"rollout.kv_cache_gib={math.ceil(100 * cache_bytes / 2**30) / 100}",
        "sync.probe_sequences=1",
        "telemetry.tensorboard=false",
        *overrides,
    ]
    build_recipe({}, settings).save(out / "recipe.yaml")
    return out / "recipe.yaml"


def report(out: Path, tokens: int) -> None:
    row = [row for row in read_metrics(out) if "time/step_s" in row][-1]
    step_s = row["time/step_s"]
    print(
        f"responses of {row['response/mean_tokens']:.0f} tokens, {row['response/truncated']:.0%} at the cap of {tokens}"
    )
    print(f"  {'':22}{'seconds':>10}{'share':>6}{'a rank, at most':>18}")
    for phase in (name[5:-2] for name in row if name.startswith("time/")):
        seconds, peak = row[f"time/{phase}_s"], row[f"memory/{phase}_bytes"]
        print(f"  {phase:<22}{seconds:10.1f}{seconds / step_s:6.0%}{peak / 2**30:14.2f} GiB")
    print("peak of the whole run:")
    for name, peak in read_summary(out)["peak_memory_bytes"].items():
        print(f"  {name:<38}{peak / 2**30:14.2f} GiB")
    print(json.dumps({name: value for name, value in row.items() if name.startswith(_SHOWN)}))


if __name__ == "__main__":
    main()
