"""One rank that trains nothing, and gives its weights to a running vLLM engine by `collective`.

    main(WORK, LAYOUT, MODEL, URL, TOKEN, COMPUTES)

MODEL is a folder with a model, and what transformers computes with it (log_probs.json: sequences, and their log-probs).
The engine is given twice the weights, and then these. Rank 0 writes WORK/found.json: {"wrong": tensors whose digest is
not the checkpoint's, "tensors": how many were sent, "worst": largest |log-prob difference| from transformers, nats};
the last of an engine that COMPUTES ("yes") with what it has.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_apo.config import ModelConfig
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import distributed
from megatron_apo.rollout.engine import Address, Engine
from megatron_apo.rollout.transport.base import Ranks
from megatron_apo.rollout.weight_sync import WeightSync
from megatron_apo.runtime.collective import on_driver
from megatron_apo.weights.digest import digest
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.parameters import load_weights
from tests.dist.ranks import parallel_of

BUCKET_BYTES = 100_000


def main(work: str, layout: str, model_folder: str, url: str, token: str, computes: str) -> None:
    model = ModelConfig(path=Path(model_folder))
    spec, reader = read_hf_config(model.path), HFReader(model.path)
    sequences, expected = json.loads((model.path / "log_probs.json").read_text())
    with distributed(parallel_of(layout)) as topology:
        chunks = build_model(spec, parallel_of(layout), topology)
        load_weights(chunks, spec, topology, reader)
        engines = [Engine(Address(url, token, Path(work)), timeout_s=120)] if topology.is_driver else []
        gather = Gather(chunks, spec, topology, bucket_bytes=BUCKET_BYTES)
        sync = WeightSync(gather, engines, ranks=Ranks.of(topology), transport="collective")

        def join() -> None:
            engines[0].start()
            engines[0].connect(sync.init_info)

        on_driver(topology, join)
        for version, scale in enumerate((2.0, 0.5)):
            with torch.no_grad():
                for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                    parameter.mul_(scale)  # a power of two: what it was comes back, bit for bit
            report = sync.sync(version)
        if topology.is_driver:
            scores = engines[0].client.score(sequences) if computes == "yes" else expected
            pairs = [pair for rows in zip(scores, expected, strict=True) for pair in zip(*rows, strict=True)]
            found = {
                "wrong": [name for name, value in report.digests.items() if value != digest(reader.get(name))],
                "tensors": len(report.digests),
                "worst": max(abs(ours - theirs) for ours, theirs in pairs),
            }
            (Path(work) / "found.json").write_text(json.dumps(found))
            engines[0].stop()
