"""One rank of the conversion tests: loads converted models in its layout. Started by test_convert.py.

    RANK=.. WORLD_SIZE=.. python -m tests.dist.convert_worker WORK TP PP DP

Rank 0 writes WORK/loaded-tp{TP}pp{PP}.pt: {model: {Hugging Face name: tensor}} for every WORK/megatron/{model}.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_apo.checkpoint import MODEL
from megatron_apo.config import ParallelConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.topology import distributed
from megatron_apo.weights.stream import WeightStream
from megatron_apo.weights.torch_dist import load_model


def main() -> None:
    work, tp, pp, dp = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    parallel = ParallelConfig(tp=tp, pp=pp, dp=dp, timeout_s=120)
    found = {}
    with distributed(parallel) as topology:
        for folder in sorted((work / "megatron").iterdir()):
            spec = read_hf_config(folder / MODEL)
            model = build_model(spec, parallel, topology, dtype="fp32")
            load_model(model, folder)
            found[folder.name] = dict(WeightStream(model, spec, topology))
        if topology.is_driver:
            torch.save(found, work / f"loaded-tp{tp}pp{pp}.pt")


if __name__ == "__main__":
    main()
