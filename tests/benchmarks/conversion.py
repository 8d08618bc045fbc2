"""Both directions of a conversion beside a plain copy of the same bytes to disk: seconds and private memory.

    python -m tests.benchmarks.conversion [--shape 1.5B|7B|tiny] [--ranks 2] [--dir FOLDER] [--rounds 1]

Makes a random bf16 checkpoint in the shape of Qwen2.5 (1.5B: 3.1 GB, 7B: 15 GB) under a temporary folder in FOLDER. The
copy reads the weights files and writes them with an fsync, as each conversion ends with its files on disk. Conversions
are commands of their own, their start included; memory is the sum over their processes (telemetry/memory.py). Targets:
at most 2.5 x the copy in each direction, and the model's size + 2 GiB.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import median

import torch

from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.telemetry.memory import MemorySampler
from megatron_apo.telemetry.units import data_size
from megatron_apo.weights.families import hf_tensors
from megatron_apo.weights.hf_writer import HFWriter
from megatron_apo.weights.plan import TensorMeta

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
GROUPS = {"tiny": 2, "1.5B": 2, "7B": 4}
VOCABULARY = {"tiny": 1000, "1.5B": 151936, "7B": 152064}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="conversion-") as folder:
        run(Path(folder), args.shape, args.ranks, args.rounds)


def run(work: Path, shape: str, ranks: int, rounds: int) -> None:
    source = work / "hf"
    size = make_checkpoint(source, shape)
    print(f"Qwen2.5 {shape} shape, {data_size(size)}, bf16, {ranks} ranks")
    convert = [sys.executable, "-m", "megatron_apo.cli", "convert"]
    forth = [*convert, "hf-to-megatron", "--hf", source, "--out", work / "megatron", "--ranks", ranks]
    back = [*convert, "megatron-to-hf", "--megatron", work / "megatron", "--out", work / "back", "--ranks", ranks]
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        parts: dict[str, Callable[[], int]] = {
            "copy and fsync": lambda: copy(source, work / "copy"),
            "HF -> Megatron": lambda: command(forth),
            "Megatron -> HF": lambda: command(back),
        }
        for name, part in parts.items():
            os.sync()
            start = time.perf_counter()
            peaks[name] = max(peaks.get(name, 0), part())
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            if name == "copy and fsync":
                shutil.rmtree(work / "copy")
        files = [file.name for file in source.glob("*.safetensors")]
        same = all(filecmp.cmp(source / file, work / "back" / file, shallow=False) for file in files)
        shutil.rmtree(work / "megatron")
        shutil.rmtree(work / "back")
    base = median(seconds["copy and fsync"])
    for name, values in seconds.items():
        taken = median(values)
        memory = f", peak private memory {data_size(peaks[name])}" if peaks[name] else ""
        print(f"  {name:<16}{taken:7.1f} s   {taken / base:5.2f} x the copy   {data_size(size / taken)}/s{memory}")
    print(f"  weights files after both directions {'are the same bytes' if same else 'DIFFER'}")


def make_checkpoint(folder: Path, shape: str) -> int:
    """Random weights in the files and layout of a downloaded model. Returns their bytes."""
    folder.mkdir()
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_key_value_heads": GROUPS[shape],
        "vocab_size": VOCABULARY[shape],
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": shape != "7B",
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
    } | SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_hf_config(folder)
    metadata = [TensorMeta(name, torch.bfloat16, tensor_shape) for name, tensor_shape in hf_tensors(spec).items()]
    writer = HFWriter(metadata)
    writer.create(folder)
    torch.manual_seed(0)
    with writer.opened(folder) as write:
        for meta in metadata:
            bits = torch.randint(-(2**15), 2**15, (prod(meta.shape),), dtype=torch.int16)
            write(meta.name, bits.view(torch.bfloat16).view(meta.shape))
    return writer.num_bytes


def copy(source: Path, target: Path) -> int:
    target.mkdir()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as reading, (target / file.name).open("wb") as writing:
            shutil.copyfileobj(reading, writing, 16 * 2**20)
            writing.flush()
            os.fsync(writing.fileno())
    return 0


def command(words: list[object]) -> int:
    """Run it. Returns the peak private memory of its processes, bytes."""
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    with MemorySampler(interval_s=0.2) as memory, memory.watch("conversion", process.pid):
        assert process.wait() == 0
    return memory.peaks()["conversion"]


if __name__ == "__main__":
    main()
