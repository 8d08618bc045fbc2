"""One rank that holds a checkpoint of the real model in a layout.

    main(WORK, LAYOUT, CHECKPOINT, HF)

Rank 0 writes WORK/LAYOUT.pt: {"log_probs": {chat: its response's, by HF's tokenizer}, "tensors": names of what the
model holds, in Hugging Face's terms, "differing": those of other bits, dtype or shape than in HF}.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_apo.data.batch import make_micro_batch
from megatron_apo.data.sequences import Sequences
from megatron_apo.learner.checkpoint import MODEL
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import distributed
from megatron_apo.parallel.pipeline import forward_only
from megatron_apo.weights import torch_dist
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.stream import WeightStream
from tests.dist.ranks import parallel_of
from tests.real.chats import tokenized


def main(work: str, layout: str, checkpoint: str, hf: str) -> None:
    parallel, folder = parallel_of(layout), Path(checkpoint)
    sequences = Sequences.of(*tokenized(Path(hf)))
    with distributed(parallel) as topology:
        spec = read_hf_config(folder / MODEL)
        chunks = build_model(spec, parallel, topology)
        torch_dist.load_model(chunks, folder)
        micro = [make_micro_batch([index], sequences, packing=True) for index in range(len(sequences))]
        log_probs = topology.broadcast(forward_only(chunks, micro), src=topology.last_stage_rank)
        reader, differing, names = HFReader(Path(hf)), [], []
        for name, tensor in WeightStream(chunks, spec, topology):
            names.append(name)
            expected = reader.get(name)
            if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape) or not torch.equal(tensor, expected):
                differing.append(name)
        if topology.is_driver:
            found = {"log_probs": dict(enumerate(log_probs)), "tensors": names, "differing": differing}
            torch.save(found, Path(work) / f"{layout}.pt")
