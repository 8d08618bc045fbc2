"""vLLM's weight-transfer engine `shm`: each worker loads a safetensors file that the trainer wrote.

The folder is in shared memory, or on a file system that trainer and workers share. Runs inside vLLM's workers;
registered by `vllm_plugin`. Written against vLLM 0.32 (distributed/weight_transfer/base.py, ipc_engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_apo.rollout.payload import weights_path, write_loaded
from megatron_apo.telemetry.units import some
from megatron_apo.weights.safetensors_file import DTYPE_CODES, checksum


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update says where it lies."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One update: `folder` holds the payload, the lists say what must be in it, in this order."""

    folder: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Loads payloads through vLLM's layerwise reload, which repacks CPU linears: they keep no plain weight."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        """The reload begins in `receive_weights`, so that a bad payload is refused while the old weights are whole."""

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Check, load and checksum one payload.

        Raises ValueError naming what is missing, extra, of another shape or dtype, unknown to the model, or was not
        enough to fill one of its layers. After a failed load the model is not usable: restart the server.
        """
        folder = Path(update_info.folder)
        with safe_open(weights_path(folder), framework="pt", device="cpu") as payload:
            _check_payload(payload, update_info)
            checksums: dict[str, str] = {}
            current = ""

            def tensors() -> Iterator[tuple[str, torch.Tensor]]:
                nonlocal current
                for current in update_info.names:  # noqa: B007 - read when the load fails
                    tensor = payload.get_tensor(current)
                    checksums[current] = checksum(tensor)
                    yield current, tensor

            self.tied_heads = _tied_heads(self.model)
            initialize_layerwise_reload(self.model)
            try:
                self.model.load_weights(tensors())
            except (ValueError, KeyError, AssertionError, RuntimeError, AttributeError) as error:
                raise ValueError(f"{current}: vLLM could not load it: {error or type(error).__name__}") from error
            unread = [name for name in update_info.names if name not in checksums]
            if unread:
                raise ValueError(f"vLLM did not read {some(unread)}")
            incomplete = _incomplete_layers(self.model, self.tied_heads)
            if incomplete:
                raise ValueError(f"the payload does not fill {some(incomplete)}")
        write_loaded(folder, self.parallel_config.rank, checksums)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # A tied head gets no weights of its own, so the reload leaves its packed CPU copy of the *old* embeddings
        # (model_executor/layers/utils.py:588, dispatch_cpu_unquantized_gemm), and every route answers 200.
        for head in self.tied_heads:
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass


def _check_payload(payload: Any, update_info: ShmUpdateInfo) -> None:
    present, expected = set(payload.keys()), set(update_info.names)
    problems = [f"missing {some(sorted(expected - present))}"] if expected - present else []
    problems += [f"extra {some(sorted(present - expected))}"] if present - expected else []
    codes = {str(dtype): code for dtype, code in DTYPE_CODES.items()}
    for name, dtype, shape in zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True):
        if name in present:
            part = payload.get_slice(name)
            if part.get_dtype() != codes.get(dtype) or part.get_shape() != shape:
                problems.append(f"{name} is {part.get_dtype()} {part.get_shape()}, announced as {dtype} {shape}")
    if problems:
        raise ValueError(f"payload {update_info.folder}: {'; '.join(problems)}")


def _tied_heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Output heads whose weight is an embedding's."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {id(layer.weight) for layer in layers if not isinstance(layer, ParallelLMHead)}
    return [layer for layer in layers if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings]


def _incomplete_layers(model: torch.nn.Module, tied_heads: list[torch.nn.Module]) -> list[str]:
    """Layers that the payload did not fill, as "name (loaded of total elements)".

    vLLM itself would go on: with the old weight where nothing came, with uninitialized memory where a part is missing.
    """
    found = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        parameters = list(layer.parameters(recurse=False))
        if not info.can_load() or not parameters or layer in tied_heads or is_deferred_attention_layer(layer):
            continue
        total = info.load_numel_total or 0
        if isinstance(layer, VocabParallelEmbedding):  # rows of padding are not loaded; a worker may hold nothing else
            total = layer.shard_indices.num_org_elements * layer.embedding_dim
        if info.load_numel < total:
            found.append(f"{name} ({info.load_numel} of {total} elements)")
    return found
