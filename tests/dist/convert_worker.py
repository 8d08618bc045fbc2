"""One rank of the conversion tests: loads converted models in its layout. Started by test_convert.py.

    main(WORK, LAYOUT, NAME...)

Rank 0 writes WORK/loaded-LAYOUT.pt: {NAME: {Hugging Face name: tensor}} of each WORK/megatron/NAME.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_apo.learner.checkpoint import MODEL
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.topology import distributed
from megatron_apo.weights import torch_dist
from megatron_apo.weights.stream import WeightStream
from tests.dist.ranks import parallel_of


def main(work: str, layout: str, *names: str) -> None:
    parallel = parallel_of(layout)
    found = {}
    with distributed(parallel) as topology:
        for name in names:
            folder = Path(work) / "megatron" / name
            spec = read_hf_config(folder / MODEL)
            chunks = build_model(spec, parallel, topology)
            torch_dist.load_model(chunks, folder)
            found[name] = dict(WeightStream(chunks, spec, topology))
        if topology.is_driver:
            torch.save(found, Path(work) / f"loaded-{layout}.pt")
