"""What a step still does when its run is asked to end.

    with Deadline(topology, fleet.interrupt) as deadline:
        for step in ...:
            deadline.require_time()
            with deadline.sampling(): ...
            with deadline.learning(): ...
        ...

These raise `Interrupted`, on every rank: where it was asked before the step, where what is sampled has to be dropped,
and where there is no time to learn from it. A step that has begun to learn is finished.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from megatron_apo.runtime.collective import Ranks, on_driver
from megatron_apo.runtime.ending import Interrupted, Request, request


class Deadline(AbstractContextManager["Deadline"]):
    """On every rank; the driver decides, by what the last step and the last save took.

    interrupt: drops what the engines are asked, on the driver, from any thread: what waits for them raises Interrupted.
    """

    def __init__(self, ranks: Ranks, interrupt: Callable[[], None], of: Request = request):
        self._ranks = ranks
        self._interrupt = interrupt
        self._request = of
        self._sample_s: float | None = None
        self._learn_s: float | None = None
        self._save_s: float | None = None
        self._sampling_since: float | None = None
        self._timer: threading.Timer | None = None
        self._heard = of.heard_by(self._hear)

    def __enter__(self) -> Deadline:
        if self._ranks.is_driver:
            self._heard.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._ranks.is_driver:
            self._heard.__exit__(kind, error, trace)
        if self._timer is not None:
            self._timer.cancel()

    def expect(self, step_s: float | None, sample_s: float | None, save_s: float | None) -> None:
        """What a step, its sampling and a save took before this process, seconds; None: nobody knows."""
        self._sample_s, self._save_s = sample_s, save_s
        self._learn_s = None if step_s is None or sample_s is None else step_s - sample_s

    def has_saved(self, seconds: float) -> None:
        self._save_s = seconds

    @property
    def is_asked(self) -> bool:
        """Collective."""
        return on_driver(self._ranks, lambda: self._request.why is not None)

    def require_time(self) -> None:
        """Collective."""
        if self.is_asked:
            raise Interrupted

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Of what belongs to a step that is learned: an Interrupted is kept for the next `require_time`, which is to
        come once the step is written down."""
        try:
            yield
        except Interrupted:
            pass

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Collective at its end."""
        self._sampling_since = start = time.monotonic()
        if self._ranks.is_driver and self._request.why is not None:
            self._hear()
        try:
            yield
        finally:
            self._sampling_since = None
        self._sample_s = time.monotonic() - start
        if not on_driver(self._ranks, lambda: self._fits(self._learn_s)):
            raise Interrupted

    @contextmanager
    def learning(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._learn_s = time.monotonic() - start

    def _fits(self, *work_s: float | None) -> bool:
        """Whether there is time for work and a save."""
        left_s = self._request.left_s
        return left_s == math.inf or left_s > self._needed(*work_s)

    def _needed(self, *work_s: float | None) -> float:
        """Seconds for work and a save; without end where one of them was never seen."""
        known = [seconds for seconds in (*work_s, self._save_s) if seconds is not None]
        return sum(known) if len(known) > len(work_s) else math.inf

    def _hear(self) -> None:
        """From any thread: drop what is sampled, now or when there is no time left to learn from it."""
        sample_s, since = self._sample_s, self._sampling_since
        if sample_s is not None and since is not None:
            sample_s = max(0.0, sample_s - (time.monotonic() - since))
        if not self._fits(sample_s, self._learn_s):
            self._interrupt()
            return
        if self._request.left_s == math.inf:
            return
        self._timer = threading.Timer(self._request.left_s - self._needed(self._learn_s), self._interrupt)
        self._timer.daemon = True
        self._timer.start()
