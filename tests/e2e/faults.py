"""Faults of a weight update, put into vLLM's workers from outside the code under test and switched at run time.

    --worker-extension-cls tests.e2e.faults.FaultyWorker
    --scheduler-cls tests.e2e.faults.FaultyScheduler
                                                 of a server that can be made faulty
    POST /collective_rpc switch_fault            args: a name of FAULTS, tensors (comma-separated, HF names), a worker
                                                 ("" for all); without a name honest again

A fault changes vLLM's own functions, what `load_weights` is given, or the memory of what was sent; what the models are
proven by (`transport/content.py`) is left alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from megatron_apo.rollout.transport import receiver
from megatron_apo.rollout.transport.base import TransferError

NUM_REMEMBERED = 3  # updates

Weights = Iterable[tuple[str, Tensor]]
Change = Callable[[Weights], Weights]


class FaultyWorker(receiver.WorkerExtension):
    """A worker whose `load_weights` remembers what it was given, and has one fault at a time."""

    def switch_fault(self, name: str = "", tensors: str = "", rank: str = "") -> dict[str, Any]:
        if not hasattr(self, "_fault"):
            self._fault, self._changes, self._past = ExitStack(), [], []
            _watch_loading(self)
        self._fault.close()
        if name and rank in ("", str(self.rank)):
            self._fault.enter_context(FAULTS[name](self, [tensor for tensor in tensors.split(",") if tensor]))
        return {"rank": self.rank}

    def held_weights(self) -> dict[str, Any]:
        report = super().held_weights()
        return getattr(self, "_replayed", None) or report


class FaultyScheduler(AsyncScheduler):
    """Keeps its prefix cache while it is told to, by a file, since it may live in another process than the workers."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        honest = self.kv_cache_manager.reset_prefix_cache
        self.kv_cache_manager.reset_prefix_cache = lambda: _keeps_cache().exists() or honest()


def _keeps_cache() -> Path:
    """In the folder that all processes of a server share."""
    return Path(tempfile.gettempdir()) / "keep-cache"


def _watch_loading(worker: Any) -> None:
    model = worker.weight_transfer_engine.model
    load = model.load_weights

    def remembered(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        latest: dict[str, Tensor] = {}
        worker._past = [latest, *worker._past[: NUM_REMEMBERED - 1]]
        for name, tensor in weights:
            latest[name] = tensor.clone()
            yield name, tensor

    def load_weights(weights: Weights) -> Any:
        weights = remembered(weights)
        for change in worker._changes:
            weights = change(weights)
        return load(weights)

    model.load_weights = load_weights


FAULTS: dict[str, Callable[[Any, list[str]], Any]] = {}


def fault(function: Callable[[Any, list[str]], Iterator[None]]) -> Callable[[Any, list[str]], Any]:
    FAULTS[function.__name__] = contextmanager(function)
    return FAULTS[function.__name__]


def stream_fault(function: Callable[[Any, list[str], Weights], Weights]) -> None:
    """A fault of what vLLM's `load_weights` is given."""

    @contextmanager
    def switched(worker: Any, tensors: list[str]) -> Iterator[None]:
        worker._changes.append(lambda weights: function(worker, tensors, weights))
        yield
        worker._changes.clear()

    FAULTS[function.__name__] = switched


# --- updates that move nothing


def _read(weights: Weights) -> set[str]:
    return {name for name, _ in weights}


@fault
def ignored(worker: Any, tensors: list[str]) -> Iterator[None]:
    """All that is sent is read, and nothing done; vLLM's reload is not even begun."""
    model = worker.weight_transfer_engine.model
    with (
        patch.object(receiver, "initialize_layerwise_reload", lambda model: None),
        patch.object(model, "load_weights", _read),
    ):
        yield


@fault
def not_loaded(worker: Any, tensors: list[str]) -> Iterator[None]:
    """All that is sent is read, and nothing loaded, so that vLLM's reload puts back what was there."""
    with patch.object(
        worker.weight_transfer_engine.model, "load_weights", lambda weights: {name for name, _ in weights}
    ):
        yield


@fault
def not_finalized(worker: Any, tensors: list[str]) -> Iterator[None]:
    """vLLM's reload is not ended."""
    with patch.object(receiver, "finalize_layerwise_reload", lambda model, config: None):
        yield


# --- what vLLM is given


@stream_fault
def exchanged(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    """Two tensors have each other's names; they lie in the same bucket or not."""
    one, other = tensors
    for name, tensor in weights:
        yield {one: other, other: one}.get(name, name), tensor


@stream_fault
def byte_in_slot(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    """A byte of what was sent is another when vLLM reads it."""
    for name, tensor in weights:
        if name in tensors:
            tensor.reshape(-1).view(torch.uint8)[tensor.nbytes // 2] ^= 1 << worker.rank  # all have the same slot
        yield name, tensor


@stream_fault
def byte_in_clone(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    """A byte is another in a copy that vLLM is given, so that what was sent is whole."""
    for name, tensor in weights:
        if name in tensors:
            tensor = tensor.clone()
            tensor.reshape(-1).view(torch.uint8)[tensor.nbytes // 2] ^= 1
        yield name, tensor


@stream_fault
def breaks_off(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    """Once, what brings weights fails right after these; the worker has them, and nothing of what follows."""
    for name, tensor in weights:
        yield name, tensor
        if name in tensors:
            worker._changes.clear()
            raise TransferError("the network is gone")


@stream_fault
def always_breaks_off(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    for name, tensor in weights:
        yield name, tensor
        if name in tensors:
            raise TransferError("the network is gone")


def _older(num_versions: int) -> Callable[[Any, list[str], Weights], Weights]:
    def change(worker: Any, tensors: list[str], weights: Weights) -> Weights:
        for name, tensor in weights:
            yield name, worker._past[num_versions][name].clone() if name in tensors or not tensors else tensor

    return change


@stream_fault
def one_version_old(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    """vLLM is given tensors (none: all) of the update before."""
    return _older(1)(worker, tensors, weights)


@stream_fault
def two_versions_old(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    return _older(2)(worker, tensors, weights)


@stream_fault
def other_in_clone(worker: Any, tensors: list[str], weights: Weights) -> Weights:
    """vLLM is given copies of other values."""
    for name, tensor in weights:
        yield name, tensor * 1.5 if name in tensors else tensor


# --- vLLM's loaders

PARTS = {  # of vLLM's merged layers, and what a loader is told to mean them
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def _loader_fault(function: Callable[..., None]) -> None:
    """A fault of the loaders that fill parameters with some tensors: `function(worker, name, load, parameter, tensor)`
    in place of `load(parameter, tensor)`, for the tensor of this name."""

    @contextmanager
    def switched(worker: Any, tensors: list[str]) -> Iterator[None]:
        with ExitStack() as faults:
            for name in tensors:
                faults.enter_context(_loading(worker, name, function))
            yield

    FAULTS[function.__name__] = switched


@contextmanager
def _loading(worker: Any, name: str, function: Callable[..., None]) -> Iterator[None]:
    path, leaf = name.rsplit(".", 1)
    parent, module = path.rsplit(".", 1) if "." in path else ("", path)
    module, part = PARTS.get(module, (module, None))
    layer = worker.weight_transfer_engine.model.get_submodule(f"{parent}.{module}".lstrip("."))
    # What vLLM's reload makes the parameter of, with its loader; a bias stays as it is.
    parameter = get_layerwise_info(layer).restore_metadata[0].get(leaf, layer._parameters[leaf])
    own = getattr(parameter, "weight_loader", None)
    honest = _get_original_loader(parameter)
    honest = honest.__func__.__get__(layer) if isinstance(honest, MethodType) else honest

    @wraps(honest)
    def loader(parameter: Tensor, tensor: Tensor, *rest: Any) -> None:
        if rest[:1] == (part,) or part is None:
            function(worker, name, lambda parameter, tensor: honest(parameter, tensor, *rest), parameter, tensor)
        else:
            honest(parameter, tensor, *rest)

    parameter.weight_loader = loader
    try:
        yield
    finally:
        if own is None:
            del parameter.weight_loader
        else:
            parameter.weight_loader = own


Load = Callable[[Tensor, Tensor], None]


@_loader_fault
def not_copied(worker: Any, name: str, load: Load, parameter: Tensor, tensor: Tensor) -> None:
    """vLLM counts a tensor as loaded, and does not load it, so that its memory is whatever was there: zeros here, since
    by chance it is the same tensor of an earlier update."""
    if parameter.is_meta:
        load(parameter, tensor)
    else:
        parameter.data.zero_()


@_loader_fault
def skipped(worker: Any, name: str, load: Load, parameter: Tensor, tensor: Tensor) -> None:
    """A loader does nothing at all."""


@_loader_fault
def half_the_rows(worker: Any, name: str, load: Load, parameter: Tensor, tensor: Tensor) -> None:
    """The first half of a tensor's rows stays that of the update before."""
    if not parameter.is_meta:
        tensor = tensor.clone()
        tensor[: len(tensor) // 2] = worker._past[1][name][: len(tensor) // 2]
    load(parameter, tensor)


@_loader_fault
def others_slice(worker: Any, name: str, load: Load, parameter: Any, tensor: Tensor) -> None:
    """A worker takes the other's part of a tensor."""
    with patch.object(parameter, "tp_rank", 1 - parameter.tp_rank):
        load(parameter, tensor)


# --- what vLLM packs


def _of_layer(worker: Any, tensors: list[str], layer: torch.nn.Module) -> bool:
    names = {name: module for name, module in worker.weight_transfer_engine.model.named_modules()}
    for tensor in tensors:
        parent, module = tensor.rpartition(".")[0].rpartition(".")[::2]
        if layer is names.get(f"{parent}.{PARTS.get(module, (module,))[0]}".lstrip(".")):
            return True
    return not tensors


@fault
def packed_copy_kept(worker: Any, tensors: list[str]) -> Iterator[None]:
    """Layers go on to compute with the packed copy that they had."""
    yield from _packing(worker, tensors, lambda layer, old, new: old)


@fault
def packed_copy_half_kept(worker: Any, tensors: list[str]) -> Iterator[None]:
    """The second half of the packed copy's columns is the old one's."""

    def half(layer: torch.nn.Module, old: Any, new: Any) -> Any:
        def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            first = torch.zeros_like(x)
            first[..., : x.shape[-1] // 2] = x[..., : x.shape[-1] // 2]
            return new(first, weight, bias) + old(x - first, weight, None)

        return cpu_linear

    yield from _packing(worker, tensors, half)


def _packing(worker: Any, tensors: list[str], choose: Callable[[torch.nn.Module, Any, Any], Any]) -> Iterator[None]:
    with ExitStack() as faults:
        for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            honest = kind.process_weights_after_loading

            def pack(self: Any, layer: torch.nn.Module, honest: Any = honest) -> None:
                old = getattr(layer, "cpu_linear", None)
                honest(self, layer)
                if old is not None and _of_layer(worker, tensors, layer):
                    layer.cpu_linear = choose(layer, old, layer.cpu_linear)

            faults.enter_context(patch.object(kind, "process_weights_after_loading", pack))
        yield


@fault
def head_not_packed(worker: Any, tensors: list[str]) -> Iterator[None]:
    """An output head's packed copy is not made anew, as vLLM leaves a tied one."""
    honest = UnquantizedEmbeddingMethod.process_weights_after_loading

    def pack(self: Any, layer: torch.nn.Module) -> None:
        if not isinstance(layer, ParallelLMHead):
            honest(self, layer)

    with patch.object(UnquantizedEmbeddingMethod, "process_weights_after_loading", pack):
        yield


# --- what is beside the weights


@fault
def cache_kept(worker: Any, tensors: list[str]) -> Iterator[None]:
    """vLLM says that its prefix cache is empty, and it is not."""
    _keeps_cache().touch()
    yield
    _keeps_cache().unlink(missing_ok=True)


@fault
def report_replayed(worker: Any, tensors: list[str]) -> Iterator[None]:
    """The worker says what it said before, and loads nothing."""
    worker._replayed = worker.held_weights()
    with patch.object(
        worker.weight_transfer_engine.model, "load_weights", lambda weights: {name for name, _ in weights}
    ):
        yield
    del worker._replayed


@fault
def layer_computes_with_copy(worker: Any, tensors: list[str]) -> Iterator[None]:
    """A layer's forward uses a copy of the output that it had: nothing of what it holds is wrong."""
    model = worker.weight_transfer_engine.model
    (layer,) = (layer for layer in model.modules() if tensors and _of_layer(worker, tensors, layer))
    old = layer.cpu_linear
    with patch.object(layer.quant_method, "apply", lambda layer, x, bias=None: old(x, layer.weight, bias)):
        yield
