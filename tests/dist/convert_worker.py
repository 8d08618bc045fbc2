"""One rank of the conversion tests: loads converted models in its layout. Started by test_convert.py.

    RANK=.. WORLD_SIZE=.. python -m tests.dist.convert_worker WORK TP PP EP VPP NAME...

Rank 0 writes WORK/loaded-tp{TP}pp{PP}vpp{VPP}ep{EP}.pt: {NAME: {Hugging Face name: tensor}} of each WORK/megatron/NAME.
VPP above 1: each stage holds that many pieces of the model, by Megatron-Core's own means (TP 1 only).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_apo.checkpoint import MODEL
from megatron_apo.config import ParallelConfig
from megatron_apo.model import build
from megatron_apo.model.hf_config import ModelSpec, read_hf_config, transformer_config
from megatron_apo.parallel.topology import distributed
from megatron_apo.weights import torch_dist
from megatron_apo.weights.families import model_entries
from megatron_apo.weights.stream import WeightStream


def main() -> None:
    work, tp, pp, ep, vpp = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    parallel = ParallelConfig(tp=tp, pp=pp, dp=ep, ep=ep, timeout_s=120)
    found = {}
    with distributed(parallel) as topology:
        for name in sys.argv[6:]:
            folder = work / "megatron" / name
            spec = read_hf_config(folder / MODEL)
            if vpp == 1:
                model = build.build_model(spec, parallel, topology, dtype="fp32")
                torch_dist.load_model(model, folder)
                found[name] = dict(WeightStream(model, spec, topology))
            else:
                found[name] = load_interleaved(spec, folder, pp, vpp)
        if topology.is_driver:
            torch.save(found, work / f"loaded-tp{tp}pp{pp}vpp{vpp}ep{ep}.pt")


def load_interleaved(spec: ModelSpec, folder: Path, pp: int, vpp: int) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of all ranks, loaded into `vpp` pieces on each of `pp` stages. Collective."""
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    config = transformer_config(spec, tp=1, pp=pp, ep=1, dtype="fp32")
    config.virtual_pipeline_model_parallel_size = vpp
    pieces = [
        build.GPTModel(
            config=config,
            transformer_layer_spec=build._layer_spec(spec),
            vocab_size=spec.vocab_size,
            max_sequence_length=spec.max_positions,
            pre_process=stage == 0 and piece == 0,
            post_process=stage == pp - 1 and piece == vpp - 1,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="rope",
            vp_stage=piece,
        )
        for piece in range(vpp)
    ]
    state = {f"model{index}": torch_dist.sharded_state(piece) for index, piece in enumerate(pieces)}
    loaded = torch_dist.read(folder, state)
    rows = {entry.megatron: entry for entry in model_entries(spec, pp=1)}
    own = {}
    for index, piece in enumerate(pieces):
        piece.load_state_dict(loaded[f"model{index}"])
        layers = [layer.layer_number - 1 for layer in piece.decoder.layers]
        for name, parameter in piece.named_parameters():
            words = name.split(".")
            if words[1] == "layers":
                words[2] = str(layers[int(words[2])])
            elif name == "output_layer.weight" and spec.tied:
                continue  # the embedding's copy
            entry = rows[".".join(words)]
            own.update(zip(entry.hf, entry.rule.merge([parameter.detach()], spec), strict=True))
    gathered: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    return {name: tensor for part in gathered for name, tensor in part.items()}


if __name__ == "__main__":
    main()
