"""vLLM's side: the weight-transfer engine that loads what a transport brings, and says what the model then holds.

Runs inside vLLM's workers; registered by `vllm_plugin`. Written against vLLM 0.32 (distributed/weight_transfer/base.py,
ipc_engine.py; model_executor/model_loader/reload/layerwise.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from megatron_apo.rollout.transport.base import Reader, TransferError, heard
from megatron_apo.rollout.transport.collective import CollectiveReader
from megatron_apo.rollout.transport.content import ModelContent, tied_heads
from megatron_apo.rollout.transport.ipc import IpcReader, place_of
from megatron_apo.rollout.transport.shm import ShmReader
from megatron_apo.telemetry.units import some
from megatron_apo.weights.digest import DigestKind
from megatron_apo.weights.plan import Bucket

READERS = {"shm": ShmReader, "collective": CollectiveReader, "ipc": IpcReader}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What every update has in common. `buckets`: the plan (`transport.base.told`)."""

    transport: str
    digest: DigestKind
    buckets: list[dict[str, Any]]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One update. `where`: of the transport's sender."""

    where: dict[str, Any]


class BucketTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads buckets through vLLM's layerwise reload, which repacks CPU linears: they keep no plain weight."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        buckets = heard(init_info.buckets)
        self.reader: Reader = READERS[init_info.transport](buckets, self.parallel_config.rank, self.device)
        tensors = [meta for bucket in buckets for meta in bucket.tensors]
        self.content = ModelContent(self.model, tensors, init_info.digest)
        _repack_experts(self.model)

    def start_weight_update(self) -> None:
        self.tied_heads = tied_heads(self.model)
        self.broken: dict[str, Any] | None = None

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one update.

        Raises ValueError naming what is unknown to the model or does not fit. After a failed load the model is not
        usable: restart the server. A transfer that breaks off raises nothing: vLLM would be out of protocol, and mix
        what its layers have buffered with the next update. It is closed here, and told with `held_weights`.
        """
        try:
            self._receive(update_info)
        except TransferError as error:
            self.broken = {"broken": str(error), "alone": bool(error.silent)}
            self.reader.give_up(update_info.where)
            finalize_layerwise_reload(self.model, self.model_config)
        except BaseException:
            self.reader.give_up(update_info.where)
            raise

    def _receive(self, update_info: UpdateInfo) -> None:
        current = ""

        def tensors(giving: Any, buckets: Iterator[tuple[Bucket, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal current
            first = 0
            while True:
                with self.content.watch.phase("wait"):
                    found = next(buckets, None)
                if found is None:
                    return
                bucket, buffer = found
                views = bucket.views(buffer)
                for number, (meta, view) in enumerate(zip(bucket.tensors, views, strict=True), first):
                    current = meta.name
                    giving(number, view)
                    yield meta.name, view
                self.content.loaded(first, views)
                _keep_unfinished(self.model, buffer)
                first += len(views)

        self.content.begin()
        initialize_layerwise_reload(self.model)
        with self.content.watch.phase("load"), self.content.watched() as giving:
            given = tensors(giving, self.reader.buckets(update_info.where))
            try:
                self.model.load_weights(given)
            except TransferError:
                raise
            except (ValueError, KeyError, AssertionError, RuntimeError, AttributeError) as error:
                raise ValueError(f"{current}: vLLM could not load it: {error or type(error).__name__}") from error
            if unread := [name for name, _ in given]:
                raise ValueError(f"vLLM did not read {some(unread)}")

    def finish_weight_update(self) -> None:
        with self.content.watch.phase("load"):
            self._finish()

    def _finish(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # A tied head gets no weights of its own, so the reload leaves its packed CPU copy of the *old* embeddings
        # (model_executor/layers/utils.py:588, dispatch_cpu_unquantized_gemm), and every route answers 200.
        for head in self.tied_heads:
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass


def _repack_experts(model: torch.nn.Module) -> None:
    """Have the CPU's mixtures pack their experts in every reload.

    vLLM does so when it makes a layer's kernel and never again (model_executor/layers/fused_moe/
    unquantized_fused_moe_method.py, `_setup_kernel`): a reload would put plain values where packed ones are expected,
    and every route answers 200.
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and "_setup_kernel" not in vars(method):

            def set_up(layer: torch.nn.Module, method: UnquantizedFusedMoEMethod = method, **weights: Any) -> None:
                is_reload = method.moe_kernel is not None
                type(method)._setup_kernel(method, layer, **weights)
                if is_reload:
                    method.moe_kernel.fused_experts.process_weights_after_loading(layer)

            method._setup_kernel = set_up  # type: ignore[method-assign]


class WorkerExtension:
    """What vLLM's workers can be asked beside their own (`--worker-extension-cls`, POST /collective_rpc)."""

    weight_transfer_engine: BucketTransferEngine

    def place(self) -> dict[str, Any]:
        """Where this worker has its weights."""
        return asdict(place_of(self.weight_transfer_engine.device))

    def broken_transfer(self) -> dict[str, Any]:
        """Of the present update, {"broken": why, "alone": whether this worker is to blame}; empty if it did not."""
        return self.weight_transfer_engine.broken or {}

    def held_weights(self) -> dict[str, Any]:
        """`broken_transfer`, `ModelContent.report`, or {"error": ...}: with several workers an exception would leave
        the answers of the others to be taken for those of a later question (v1/executor/multiproc_executor.py)."""
        if broken := self.broken_transfer():
            return broken
        try:
            return self.weight_transfer_engine.content.report()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def _keep_unfinished(model: torch.nn.Module, buffer: torch.Tensor) -> None:
    """Copy what vLLM's reload still has of a bucket, whose memory the next one gets: of layers that lack a part."""
    memory = buffer.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            for name, value in bound.arguments.items():
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == memory:
                    bound.arguments[name] = value.clone()
