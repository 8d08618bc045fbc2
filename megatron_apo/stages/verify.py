"""Holds a Megatron checkpoint against the Hugging Face folder that it should equal.

1. tensors: names, shapes and every bit, a tensor at a time on any number of ranks: models larger than memory too.
2. log-probs: of each token of some prompts, by the Megatron model in a layout, against transformers. In fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from megatron_apo.config import ParallelConfig
from megatron_apo.learner.checkpoint import MODEL, read_record, torch_dtype
from megatron_apo.model.hf_config import ModelConfigError, ModelSpec, check_layout, read_hf_config
from megatron_apo.runtime.job import is_rank
from megatron_apo.stages.convert import run_ranks, streamed_conversion
from megatron_apo.telemetry.units import some
from megatron_apo.weights.hf_io import HFReader

if TYPE_CHECKING:
    from megatron_apo.runtime.topology import Topology

Part = Literal["tensors", "log-probs"]


class VerifyError(RuntimeError):
    """The two sides differ."""


@dataclass(frozen=True)
class Layout:
    """Over which ranks the Megatron model computes log-probs."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(tp=self.tp, pp=self.pp, ep=self.ep, dp=self.ep)


def verify(
    hf: Path,
    megatron: Path,
    layout: Layout,
    prompts: Path | None,
    tolerance: float = 1e-4,
    ranks: int | None = None,
    only: Part | None = None,
) -> None:
    """Print what was compared; raises `VerifyError` on a difference, a ValueError for folders that cannot be compared.

    prompts: a text file, one prompt a line; None: no log-probs. `tolerance`: of a token's log-prob. `ranks`: of part 1.
    """
    if prompts is None and layout != Layout():
        raise ValueError("--prompts: missing; --tp, --pp and --ep are for the log-probs of a file of prompts")
    if is_rank() and prompts and only is None:
        raise ValueError("--only: missing; a job of ranks compares tensors or log-probs, start one for each")
    spec = _same_spec(hf, megatron)
    check_layout(spec, layout.parallel)
    lines = _read_prompts(prompts) if prompts else []
    both = ["verify", "--hf", str(hf), "--megatron", str(megatron)]
    if only in (None, "tensors"):
        run_ranks([*both, "--only", "tensors"], ranks, lambda topology: _tensors(spec, hf, megatron, topology))
    if only == "log-probs" or (only is None and prompts):
        if prompts is None:
            raise ValueError("--prompts: missing; log-probs are compared on a file of prompts")
        sizes = [f"--{name}={size}" for name, size in vars(layout).items()]
        arguments = [*both, "--only", "log-probs", "--prompts", str(prompts), f"--tolerance={tolerance}", *sizes]
        run_ranks(
            arguments,
            layout.parallel.world_size,
            lambda topology: _log_probs(spec, hf, megatron, layout, lines, tolerance, topology),
            layout.parallel,
        )


def _tensors(spec: ModelSpec, hf: Path, megatron: Path, topology: Topology) -> None:
    import torch.distributed as dist

    from megatron_apo.runtime.collective import on_all
    from megatron_apo.weights.conversion import CheckpointTensors, compare

    reader = HFReader(hf)
    reader.check(spec)
    with streamed_conversion(spec, topology, read_record(megatron).dtype) as conversion:
        tensors = CheckpointTensors(megatron)
        tensors.check(conversion)
        found = on_all(topology, lambda: list(compare(conversion, tensors, reader)))
        gathered: list[list[str]] = [[] for _ in range(topology.world_size)]
        dist.all_gather_object(gathered, found)
        differing = [name for names in gathered for name in names]
        count = len(conversion.metadata())
    dtype = read_record(megatron).dtype
    stored = {str(name).removeprefix("torch.") for name in reader.dtypes(spec)}
    rounded = "" if stored == {str(torch_dtype(dtype)).removeprefix("torch.")} else f", once they are {dtype}"
    rows = {
        "names and shapes": f"{count} tensors, the same on both sides",
        "stored as": f"{', '.join(sorted(stored))} here, {dtype} there",
        "bits": f"{count - len(differing)} of {count} tensors equal{rounded}",
    }
    _report(topology, rows, f"differ: {some(differing)}" if differing else None)


def _log_probs(
    spec: ModelSpec, hf: Path, megatron: Path, layout: Layout, lines: list[str], tolerance: float, topology: Topology
) -> None:
    from megatron_apo.data.batch import make_micro_batch
    from megatron_apo.data.sequences import Sequences
    from megatron_apo.model.build import build_model
    from megatron_apo.parallel.pipeline import forward_only
    from megatron_apo.runtime.collective import on_driver
    from megatron_apo.weights.torch_dist import load_model

    sequences = on_driver(topology, lambda: _tokenize(hf, lines, spec))
    chunks = build_model(spec, layout.parallel, topology)
    load_model(chunks, megatron)
    first, rest = [tokens[:1] for tokens in sequences], [tokens[1:] for tokens in sequences]
    batch = Sequences.of(first, rest)
    micro_batches = [
        make_micro_batch([index], batch, packing=True).to(topology.device) for index in range(len(sequences))
    ]
    found = [log_prob_R.tolist() for log_prob_R in forward_only(chunks, micro_batches)]
    found = topology.broadcast(found, src=topology.last_stage_rank)
    del chunks
    expected = on_driver(topology, lambda: _transformers_log_probs(hf, sequences))
    worst, line, position = max(
        (math.inf if math.isnan(ours - theirs) else abs(ours - theirs), index, position)
        for index, (row, other) in enumerate(zip(found, expected, strict=True))
        for position, (ours, theirs) in enumerate(zip(row, other, strict=True), start=1)
    )
    tokens = sum(map(len, rest))
    title = f"log-probs, TP {layout.tp} x PP {layout.pp} x EP {layout.ep}"
    rows = {title: f"{tokens} tokens, differ by {worst:.2g} at most"}
    problem = f"log-probs differ by {worst:.3g} at prompt {line + 1}, token {position} (allowed: {tolerance:g})"
    _report(topology, rows, problem if worst > tolerance else None)


def _report(topology: Topology, rows: dict[str, str], problem: str | None) -> None:
    if topology.is_driver:
        table = Table(show_header=False)
        for row in rows.items():
            table.add_row(*row)
        Console().print(table)
        if problem:
            raise VerifyError(problem)


def _same_spec(hf: Path, megatron: Path) -> ModelSpec:
    """The one architecture of both sides. Raises ModelConfigError listing what differs."""
    read_record(megatron)
    ours, theirs = read_hf_config(hf), read_hf_config(megatron / MODEL)
    # Not compared: how the Hugging Face side stores its weights.
    problems = [
        f"{megatron}: {name} is {theirs_value!r}, but {value!r} in {hf}"
        for (name, value), theirs_value in zip(vars(ours).items(), vars(theirs).values(), strict=True)
        if value != theirs_value and name != "fp8_blocks"
    ]
    if problems:
        raise ModelConfigError("\n".join(problems))
    return ours


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--prompts: {path} is not a file; give a text file, one prompt a line")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {path} is empty; give a text file, one prompt a line")
    return lines


def _tokenize(hf: Path, lines: list[str], spec: ModelSpec) -> list[list[int]]:
    from megatron_apo.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(hf, "--hf")
    sequences = [tokenizer(line)["input_ids"][: spec.max_positions] for line in lines]
    if short := [index + 1 for index, tokens in enumerate(sequences) if len(tokens) < 2]:
        raise ValueError(f"--prompts: prompts {short} are single tokens, which have no log-prob")
    return sequences


def _transformers_log_probs(hf: Path, sequences: list[list[int]]) -> list[list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True).eval()
    found = []
    with torch.no_grad():
        for tokens in sequences:
            log_probs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            found.append(log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist())
    return found
