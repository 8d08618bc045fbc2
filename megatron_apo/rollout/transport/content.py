"""What a vLLM model holds after an update, told by the tensors that were sent.

    content = ModelContent(model, tensors, kind)      # once, in a worker
    content.begin(); ... content.loaded(first, tensors) ...; content.report()

Which part of which parameter a tensor fills is learned from vLLM's own loaders, by watching them copy in the first
update. What a parameter holds is told

- by its digest at the end, where it keeps the plain values;
- where a layer packs or quantizes them (the CPU's linears keep no plain weight), by the digest of what the layer was
  given to pack, and by what the packed layer computes: applied to rows of the identity it gives columns of its weight,
  bit for bit. Columns are read back, in rows that are drawn by chance of every tensor that it packs: a few columns of
  chance, and for every tensor one in which the update changed something in these rows, as far as a block of them that
  moves from update to update tells; where that tells of none, all columns are.
- The packed copy that an output head computes with counts as a layer of its own, whose weight is the embedding's or its
  own plain one.

Runs in vLLM's workers, on any of its devices. Written against vLLM 0.32 (model_executor/layers/utils.py,
`dispatch_cpu_unquantized_gemm`; model_executor/model_loader/reload/).

Shapes: N output features, K input features; R rows and C columns that are read back.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

from megatron_apo.telemetry.timers import Stopwatch
from megatron_apo.weights.digest import DigestKind, digest
from megatron_apo.weights.plan import TensorMeta

BLOCK_COLUMNS = 16  # kept of every packed weight from one update to the next, to see in them what has changed
SAMPLED_ROWS = 64  # of every tensor that is packed, at least, where it has so many
# Read back of every packed layer, whatever has changed, as far from each other as they can be; in the first update as
# many as a block has.
MIN_COLUMNS = 2
_AT_ONCE = 256  # columns
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of an element

Key = tuple[str, str]  # a layer's name and its parameter's


@dataclass(frozen=True)
class View:
    """A part of a tensor, as `torch.as_strided` takes it. `offset`: elements from the tensor's first."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, part: Tensor, whole: Tensor) -> View:
        return cls(part.storage_offset() - whole.storage_offset(), tuple(part.shape), part.stride())

    def within(self, whole: Tensor) -> Tensor:
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def rows(self) -> slice:
        """Of a matrix, those that it has elements of."""
        first = self.offset // self.stride[0]
        return slice(first, first + self.shape[0])


@dataclass(frozen=True)
class Region:
    """A part of a parameter, and the part of a sent tensor that fills it."""

    tensor: int  # its number among those that are sent
    target: View
    source: View | None  # None: what vLLM fills it with is no part of the tensor as it was sent
    whole: bool  # all of the tensor as it is, so that the trainer's digest is this part's


@dataclass
class _Kept:
    """What is kept of a packed weight [N, K] from one update to the next."""

    start: int = 0
    rows: list[np.ndarray] = field(default_factory=list)  # numbers of some, by region
    block: np.ndarray | None = None  # [R, BLOCK_COLUMNS] of these rows, from column `start` on
    digests: list[str] = field(default_factory=list)  # of its regions


@dataclass(frozen=True)
class _Columns:
    """Columns of a weight that is packed, as they were given to be packed."""

    rows: list[np.ndarray]  # numbers of some, by region
    numbers: Tensor  # [C]
    values_RC: Tensor
    num_features: int  # K
    regions: list[Region]


class ModelContent:
    """`tensors`: all that every update sends, in order; `kind`: how the trainer digests them."""

    def __init__(self, model: torch.nn.Module, tensors: Sequence[TensorMeta], kind: DigestKind):
        self._tensors = tensors
        self._names = [meta.name for meta in tensors]
        self._tp_rank, self._tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self._kind = kind
        self._layers = dict(model.named_modules())
        self._parts_of = getattr(model, "packed_modules_mapping", {})  # {"qkv_proj": ["q_proj", ...], ...}
        self._heads = tied_heads(model)
        self._parameters = self._loadable()
        self._regions: dict[Key, list[Region]] = {key: [] for key in self._parameters}
        self._by_tensor: dict[int, list[tuple[Key, Region]]] = defaultdict(list)
        self._is_learned = False
        self._kept: dict[str, _Kept] = defaultdict(_Kept)
        self._chance = random.Random(0)
        # of the present update
        self.watch = Stopwatch()
        self._sent: dict[int, str] = {}
        self._expected: dict[Region, str] = {}
        self._given_to_pack: dict[Key, list[str]] = {}
        self._columns: dict[str, _Columns] = {}
        self._watch_packing()

    # --- an update, step by step

    def begin(self) -> None:
        """An update begins."""
        for found in (self._sent, self._expected, self._given_to_pack, self._columns):
            found.clear()
        if not self._is_learned:
            self._regions = {key: [] for key in self._parameters}
            self._by_tensor.clear()
            self._kept.clear()
        self.watch = Stopwatch()

    @contextmanager
    def watched(self) -> Iterator[Callable[[int, Tensor], None]]:
        """Within, vLLM loads. Yields what is to be called with each tensor before vLLM has it: its number, and itself.

        In the first update, and in others until one is right, it is noted what vLLM's loaders copy where.
        """
        if self._is_learned:
            yield lambda number, tensor: None
            return
        with _Copies(self._present, self._learn) as copies:
            yield copies.giving

    def loaded(self, first: int, tensors: Sequence[Tensor]) -> None:
        """vLLM has loaded some tensors, which still are in memory. `first`: the number of the first."""
        with self.watch.phase("content"):
            self._digest_sent(first, tensors)

    def _digest_sent(self, first: int, tensors: Sequence[Tensor]) -> None:
        for number, tensor in enumerate(tensors, first):
            regions = [region for _, region in self._by_tensor[number]]
            if not regions or not all(region.whole for region in regions):
                self._sent[number] = digest(tensor, self._kind)
            for key, region in self._by_tensor[number]:
                if not region.whole and region.source:
                    part = region.source.within(tensor).to(self._parameters[key].dtype)
                    self._expected[region] = digest(part, self._kind)

    def report(self) -> dict[str, Any]:
        """What the model holds, once vLLM is done with an update:

        held: a digest of each tensor that was sent, in order. Where this worker has a part of the tensor only, or has
        it in another type, it is of the tensor as it was read, and the part is compared here.
        wrong: what is wrong, by tensor, or by layer or parameter.
        unheld: numbers of tensors that fill no parameter of this worker; each must fill one of some worker.
        seconds: "load", in which vLLM loaded and packed, and "content", in which it was looked at what it loaded.
        """
        held, wrong = dict(self._sent), {}
        digests_of: dict[Key, list[str]] = {}
        for key, regions in self._regions.items():
            name = ".".join(key)
            if (filled := sum(region.target.numel for region in regions)) != (size := self._size(key)):
                wrong[name] = f"{filled} of its {size} elements are filled"
                continue
            digests = self._digests(key)
            if digests is None:
                wrong[name] = "nothing was loaded into it"
                continue
            digests_of[key] = digests
            for region, found in zip(regions, digests, strict=True):
                if region.whole:
                    held.setdefault(region.tensor, found)
                if region.source and found != (held[region.tensor] if region.whole else self._expected.get(region)):
                    wrong[self._names[region.tensor]] = f"{name} has other values"
                if region.source is None:
                    wrong[self._names[region.tensor]] = f"vLLM fills {name} with something that is no part of it"
                elif not self._is_learned and (misplaced := self._misplaced(key, region)):
                    wrong[self._names[region.tensor]] = misplaced
        self._look_at_heads(digests_of)
        for name, columns in self._columns.items():
            wrong |= self._read_back(name, columns)
        self._is_learned = self._is_learned or not wrong
        return {
            "held": [held.get(number, "") for number in range(len(self._names))],
            "wrong": wrong,
            "unheld": [number for number in range(len(self._names)) if not self._by_tensor[number]],
            "seconds": dict(self.watch.seconds),
        }

    # --- which part of which parameter a tensor fills

    def _loadable(self) -> dict[Key, Tensor]:
        """vLLM's parameters as their loaders see them; a tied head's weight is the embedding's."""
        found: dict[Key, Tensor] = {}
        for name, layer in self._layers.items():
            if layer not in self._heads and not is_deferred_attention_layer(layer):
                as_loaded = get_layerwise_info(layer).restore_metadata[0]  # without memory
                stays = {key: value for key, value in layer._parameters.items() if key in SKIP_TENSORS}
                found |= {(name, key): value for key, value in (as_loaded | stays).items() if value is not None}
        return found

    def _present(self) -> dict[Key, Tensor]:
        """The parameters that vLLM's loaders fill now."""
        found = {key: self._layers[key[0]]._parameters.get(key[1]) for key in self._parameters}
        return {key: value for key, value in found.items() if value is not None}

    def _size(self, key: Key) -> int:
        """Elements of a parameter that are loaded; rows of padding are not, and a worker may hold nothing else."""
        layer = self._layers[key[0]]
        if isinstance(layer, VocabParallelEmbedding):
            return layer.shard_indices.num_org_elements * layer.embedding_dim
        return self._parameters[key].numel()

    def _learn(self, number: int, key: Key, target: View, source: View | None, tensor: Tensor) -> None:
        whole = source is not None and source.numel == tensor.numel() and _is_dense(source) and _is_dense(target)
        region = Region(number, target, source, whole and self._parameters[key].dtype == tensor.dtype)
        # A parameter that never was without memory is copied into twice, the second time when all of a layer is there.
        if target.numel and all(known.target != target for known in self._regions[key]):
            self._regions[key].append(region)
            self._by_tensor[number].append((key, region))

    def _misplaced(self, key: Key, region: Region) -> str | None:
        """Why a tensor does not belong where vLLM put it, as far as names and shapes tell: what is learned from loaders
        that are wrong from the first update on is wrong itself."""
        layer, tensor = key[0], self._names[region.tensor]
        parent, _, part = tensor.rpartition(".")[0].rpartition(".")
        if ".experts." in tensor:
            expected = layer.startswith(tensor.partition(".experts.")[0] + ".")
        else:  # vLLM's layers have Hugging Face's names, but for those that are several in one
            place, _, name = layer.rpartition(".")
            expected = place == parent and part in (name, *self._parts_of.get(name, ()))
        if not expected:
            return f"vLLM put it into {layer}"
        in_place = sorted(self._regions[key], key=lambda region: region.target.offset)
        in_order = sorted(in_place, key=lambda region: self._order(layer, self._names[region.tensor]))
        if in_order.index(region) != in_place.index(region):
            other = self._names[in_order[in_place.index(region)].tensor]
            return f"vLLM put it where {other} belongs"
        if region.source and not self._is_own_share(layer, self._tensors[region.tensor], region.source):
            return f"vLLM took another worker's share of it for {layer}"
        return None

    def _order(self, layer: str, tensor: str) -> tuple[int, int]:
        """Where a tensor comes within a layer that is several in one: its expert's number, and its part's."""
        before, _, part = tensor.rpartition(".")[0].rpartition(".")
        _, is_expert, expert = before.rpartition(".experts.")
        parts = ("gate_proj", "up_proj") if is_expert else tuple(self._parts_of.get(layer.rpartition(".")[2], ()))
        return int(expert) if is_expert else 0, parts.index(part) if part in parts else 0

    def _is_own_share(self, layer: str, tensor: TensorMeta, source: View) -> bool:
        """Whether a part of a tensor lies where this worker's rank does. Of heads that are fewer than the workers
        several have the same; a vocabulary is cut by its padded length."""
        module, offset, stride = self._layers[layer], source.offset, prod(tensor.shape)
        if len(source.shape) != len(tensor.shape):
            return True
        for size, part in zip(tensor.shape, source.shape, strict=True):
            stride //= size
            first, offset = divmod(offset, stride)
            if isinstance(module, VocabParallelEmbedding) and part < size:
                if first != module.shard_indices.org_vocab_start_index:
                    return False
            elif part < size and size % part == 0 and (count := size // part) <= self._tp_size:
                if first != self._tp_rank * count // self._tp_size * part:
                    return False
        return True

    # --- what parameters hold

    def _watch_packing(self) -> None:
        """Look at each weight when a layer is about to pack or quantize it, the last time that it is there."""
        for name, layer in self._layers.items():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                method.process_weights_after_loading = _Watched(self, name, method)  # type: ignore[method-assign]

    def _packing(self, name: str, layer: torch.nn.Module, pack: Callable[[torch.nn.Module], None]) -> None:
        given = {parameter: value.data for parameter, value in layer._parameters.items() if value is not None}
        pack(layer)
        with self.watch.phase("content"):
            self._look_at_packed(name, layer, given)

    def _look_at_packed(self, name: str, layer: torch.nn.Module, given: dict[str, Tensor]) -> None:
        for parameter, data in given.items():
            key = (name, parameter)
            if key in self._regions and _place(getattr(layer, parameter).data) != _place(data):
                regions = self._regions[key]
                digests = [digest(region.target.within(data), self._kind) for region in regions]
                self._given_to_pack[key] = digests
                if regions and data.dim() == 2 and hasattr(layer, "cpu_linear"):
                    self._columns[name] = self._choose(name, data, regions, digests)

    def _digests(self, key: Key) -> list[str] | None:
        """Of a parameter's regions; None where it was to be packed and was not."""
        if key in self._given_to_pack:
            return self._given_to_pack[key]
        parameter, meta = self._layers[key[0]]._parameters.get(key[1]), self._parameters[key]
        if parameter is None or parameter.is_meta or (parameter.shape, parameter.dtype) != (meta.shape, meta.dtype):
            return None
        return [digest(region.target.within(parameter.data), self._kind) for region in self._regions[key]]

    def _look_at_heads(self, digests_of: dict[Key, list[str]]) -> None:
        """Choose columns of the heads, which keep the plain weight beside the packed copy that they compute with."""
        present = self._present()
        for name, layer in self._layers.items():
            if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
                key = next((key for key, value in present.items() if value is layer.weight), None)
                regions = self._regions[key] if key is not None and key in digests_of else []
                if regions:  # a worker may have no row of the vocabulary
                    self._columns[name] = self._choose(name, layer.weight.data, regions, digests_of[key])

    def _choose(self, name: str, weight_NK: Tensor, regions: list[Region], digests: list[str]) -> _Columns:
        """Columns to read back: of each region that has changed one that has, or all; and a few others."""
        kept, num_features = self._kept[name], weight_NK.shape[1]
        # As numpy's integers, on which hundreds of small operations cost a tenth of torch's.
        bits_NK = weight_NK.view(_INTEGERS[weight_NK.itemsize]).numpy()
        width = min(BLOCK_COLUMNS, num_features)
        count = width if kept.block is None else min(MIN_COLUMNS, num_features)
        first = self._chance.randrange(num_features)
        numbers = {(first + i * num_features // count) % num_features for i in range(count)}
        rows = kept.rows or self._some_rows(regions)
        if kept.block is not None:
            changed_RC = bits_NK[np.concatenate(rows), kept.start : kept.start + width] != kept.block
            of_regions = np.split(changed_RC, np.cumsum([len(each) for each in rows[:-1]]))
            for changed, new, old in zip(of_regions, digests, kept.digests, strict=True):
                if new != old:
                    found = np.flatnonzero(changed.any(0)).tolist()
                    numbers |= {kept.start + self._chance.choice(found)} if found else set(range(num_features))
        chosen = np.array(sorted(numbers))
        values_RC = torch.from_numpy(bits_NK[np.ix_(np.concatenate(rows), chosen)]).view(weight_NK.dtype)
        is_at_end = kept.start + width == num_features
        kept.start = 0 if is_at_end else min(kept.start + width, num_features - width)
        kept.rows = self._some_rows(regions)
        kept.block = bits_NK[np.concatenate(kept.rows), kept.start : kept.start + width]
        kept.digests = digests
        return _Columns(rows, torch.from_numpy(chosen), values_RC, num_features, regions)

    def _some_rows(self, regions: list[Region]) -> list[np.ndarray]:
        """Numbers of some rows of each region, as far from each other as they can be."""
        found = []
        for rows in (region.target.rows for region in regions):
            step = max(1, (rows.stop - rows.start) // SAMPLED_ROWS)
            found.append(np.arange(rows.start + self._chance.randrange(step), rows.stop, step))
        return found

    def _read_back(self, name: str, columns: _Columns) -> dict[str, str]:
        """What is wrong with the packed copy of a weight, by the tensors that it is made of."""
        layer, stale = self._layers[name], set()
        for numbers, values_RC in zip(
            columns.numbers.split(_AT_ONCE), columns.values_RC.split(_AT_ONCE, dim=1), strict=True
        ):
            ones_CK = values_RC.new_zeros(len(numbers), columns.num_features)
            ones_CK[torch.arange(len(numbers)), numbers] = 1
            found_NC = layer.quant_method.apply(layer, ones_CK).t()
            found_RC = found_NC[torch.from_numpy(np.concatenate(columns.rows))]
            differs_R = (_normal(found_RC) != _normal(values_RC)).any(1)
            of_regions = differs_R.split([len(each) for each in columns.rows])
            stale |= {
                region.tensor for region, differs in zip(columns.regions, of_regions, strict=True) if differs.any()
            }
        return {
            name if isinstance(layer, ParallelLMHead) else self._names[number]: (
                f"the packed copy that {name} computes with is not of {self._names[number]} as it was sent"
            )
            for number in stale
        }


class _Watched:
    """A layer's own `process_weights_after_loading`, watched. Whatever its class has at the time is called."""

    def __init__(self, content: ModelContent, name: str, method: QuantizeMethodBase):
        self._content, self._name, self._method = content, name, method

    def __call__(self, layer: torch.nn.Module) -> None:
        pack = type(self._method).process_weights_after_loading
        self._content._packing(self._name, layer, lambda layer: pack(self._method, layer))


class _Copies(TorchDispatchMode):
    """Notes what is copied into parameters, of which most have no memory yet: vLLM's reload calls each loader on such
    first, to count (model_loader/reload/meta.py, `get_numel_loaded`).

    `learn(number, key, target, source, tensor)`: `source` is None where what is copied is no part of the tensor.
    """

    def __init__(
        self,
        parameters: Callable[[], dict[Key, Tensor]],
        learn: Callable[[int, Key, View, View | None, Tensor], None],
    ):
        super().__init__()
        self._find, self._learn = parameters, learn
        self._parameters: dict[int, tuple[Key, Tensor]] = {}  # by their storage
        self._giving: tuple[int, Tensor] | None = None

    def giving(self, number: int, tensor: Tensor) -> None:
        """vLLM gets the tensor next."""
        if not self._parameters:
            self._parameters = {value.untyped_storage()._cdata: (key, value) for key, value in self._find().items()}
        self._giving = (number, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and self._giving:
            target, source = (args[index].untyped_storage()._cdata for index in range(2))
            found = self._parameters.get(target)
            if found is not None and source != target:
                (key, parameter), (number, tensor) = found, self._giving
                is_part = source == tensor.untyped_storage()._cdata
                view = View.of(args[1], tensor) if is_part and args[1].dtype == tensor.dtype else None
                self._learn(number, key, View.of(args[0], parameter), view, tensor)
        return func(*args, **(kwargs or {}))


def _normal(tensor: Tensor) -> Tensor:
    """With zeros in place of denormals, which a processor's bf16 instructions take for zeros."""
    return tensor.masked_fill(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0)


def tied_heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Output heads whose weight is an embedding's."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {id(layer.weight) for layer in layers if not isinstance(layer, ParallelLMHead)}
    return [layer for layer in layers if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _is_dense(view: View) -> bool:
    """Its elements lie one after the other."""
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
