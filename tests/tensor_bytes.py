"""Bytes of the tensors that are there, by what they are for: counted by storage, as torch's operations bring them.

    with TensorBytes() as counter:
        model = ...
        counter.label("weights", model.parameters())
        counter.restart()
        with counter.within("activations"):
            loss = model(x)
    counter.peak             # the instant at which most bytes were there, by part
    counter.most["weights"]  # a part's own maximum, which may have been at another instant

A storage is counted once however many tensors view it, from the operation that first gives or takes it until it is
freed. What autograd keeps for a backward pass is among them, since it is kept in storages. What an operation allocates
and frees within itself is not: no tensor of it is ever seen. A storage that is resized without an operation is found to
be when the next one uses it. `allocator_peak` is what torch's allocator says, which knows all that; it is there to be
held against.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REST = "rest"  # the part of what is labelled by nothing

# A part's name, or what says it when a storage first appears.
Part = str | Callable[[], str]


@dataclass(frozen=True)
class Instant:
    """What there was at one time: bytes by part."""

    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class _Held:
    """A storage that is there. alive: told when it is freed."""

    num_bytes: int
    part: str
    alive: Any


class TensorBytes(TorchDispatchMode):
    """Counts from when it is entered; frees are noticed afterwards as well. One thread, one device.

    peak: the instant of most bytes since `restart`. most: each part's own maximum since then.
    """

    def __init__(self, part: Part = REST) -> None:
        super().__init__()
        self._held: dict[int, _Held] = {}  # by a storage's address
        self._parts: list[Part] = [part]
        self._now: Counter[str] = Counter()
        self._total = 0
        self._peak_total = 0
        self.peak = Instant()
        self.most: defaultdict[str, int] = defaultdict(int)

    @property
    def now(self) -> Instant:
        return Instant({part: num_bytes for part, num_bytes in self._now.items() if num_bytes})

    def restart(self) -> None:
        """Forget maxima: the present is the highest so far."""
        self._peak_total, self.peak = self._total, self.now
        self.most = defaultdict(int, self.now.parts)

    @contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """What first appears inside is of this part."""
        self._parts.append(part)
        try:
            yield
        finally:
            self._parts.pop()

    def label(self, part: str, tensors: Iterable[Tensor]) -> None:
        """The storages of `tensors` are of this part from now on, whether they were seen before or not."""
        for tensor in tensors:
            held = self._see(tensor)
            if held is not None and held.part != part:
                self._change(held.part, -held.num_bytes)
                held.part = part
                self._change(part, held.num_bytes)

    def part_of(self, tensor: Tensor) -> str | None:
        """What a tensor's storage is counted as; None: it was never seen."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held.part if held else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs, found)):  # what it was given as well, which it may have made larger
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return found

    def _see(self, tensor: Tensor) -> _Held | None:
        """The record of a tensor's storage, made if it is new. None for what has no memory."""
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        held = self._held.get(key)
        if held is None:
            part = self._parts[-1]
            name = part if isinstance(part, str) else part()
            # torch keeps a storage's Python object for as long as the storage is there, whoever holds it.
            held = self._held[key] = _Held(0, name, weakref.ref(storage, lambda _: self._freed(key)))
        if num_bytes != held.num_bytes:
            added, held.num_bytes = num_bytes - held.num_bytes, num_bytes
            self._change(held.part, added)
        return held

    def _freed(self, key: int) -> None:
        held = self._held.pop(key)
        self._change(held.part, -held.num_bytes)

    def _change(self, part: str, num_bytes: int) -> None:
        self._now[part] += num_bytes
        self._total += num_bytes
        self.most[part] = max(self.most[part], self._now[part])
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, self.now


@contextmanager
def allocator_peak() -> Iterator[list[int]]:
    """Within: torch's own allocator for CPUs is listened to. Afterwards the list has how many bytes more than at the
    start it had given out at most, and how many at the end."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    found += [most, total]
