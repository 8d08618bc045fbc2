"""What is sampled beside other work: a step, taken in waves while the rest is still generated, or an evaluation.

    with Arrivals(sampling, fleet, enough=4096) as arrivals:
        while requests := arrivals.take(): ...

On the driver. The fleet is driven by a thread, so that the caller can compute.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.sampler import GradedSampling


class Arrivals(AbstractContextManager["Arrivals"]):
    """enough: positions in the model that are worth a wave. It has all that has come by then, the last one the rest."""

    def __init__(self, sampling: GradedSampling, fleet: Fleet, enough: int):
        self.sampling = sampling
        self._fleet = fleet
        self._enough = enough
        self._ungraded = list(sampling.queue.sizes)  # responses of each request
        self._ready: list[int] = []
        self._size = 0  # positions of what is ready
        self._taken: set[int] = set()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Have the engines asked, if they are not; `take` does so by itself."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._advance, name="sampling", daemon=True)
            self._thread.start()

    def take(self) -> list[int]:
        """The requests, ascending, whose responses have all been graded since the last call; none: all were taken.

        Blocks until they are enough, or the last ones. Raises what `GradedSampling.advance` does; called again after
        that, it goes on with what is unanswered.
        """
        if len(self._taken) == len(self._ungraded):
            return []
        self.begin()
        graded = self.sampling.graded
        while self._thread and (self._size < self._enough or not graded.empty()):
            self._note(graded.get())
        if self._error:
            error, self._error = self._error, None
            raise error
        ready, self._ready, self._size = sorted(self._ready), [], 0
        self._taken.update(ready)
        if self._thread and len(self._taken) == len(self._ungraded):
            self._thread.join()  # the engines are free for something else
            self._thread = None
        return ready

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """What is still generated is dropped: the run ends."""
        if self._thread is not None:
            self._fleet.interrupt()
            self._thread.join()

    def _advance(self) -> None:
        try:
            self.sampling.advance(self._fleet)
        except BaseException as error:  # `take` raises it
            self._error = error
        finally:
            self.sampling.graded.put(None)

    def _note(self, row: int | None) -> None:
        if row is None:
            assert self._thread
            self._thread.join()
            self._thread = None
            if not self._error:  # all are graded, also those of which the queue has not told yet
                self._ready = [n for n in range(len(self._ungraded)) if n not in self._taken]
            return
        queue, prompts = self.sampling.queue, self.sampling.prompts
        request = queue.request_of(row)
        self._ungraded[request] -= 1
        if self._ungraded[request]:
            return
        self._ready.append(request)
        for row, completion in zip(queue.rows_of(request), queue.answers[request], strict=True):
            self._size += len(prompts[row].token_ids) + len(completion.token_ids) - 1
