"""From prompts to graded responses, whichever engines answer and whichever die."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from megatron_apo.config import Recipe
from megatron_apo.data.order import sample_seeds
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import FINISH_REASONS, RolloutBatch
from megatron_apo.data.sequences import Sequences
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.pool import Grade, RewardPool
from megatron_apo.rollout.client import Body, Completion, GenerateRequest, Sampling, generate_body
from megatron_apo.rollout.fleet import Fleet, RequestQueue
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.weight_sync import SyncError
from megatron_apo.runtime.ending import Interrupted

_LOOK_EVERY_S = 0.2  # at whether the run ends, while graders are waited for


class GradedSampling:
    """Responses that are graded as they arrive, over as many `advance` as it takes until no engine dies any more.

    prompts: each response's, in the order of the requests. graded: the number of each response, once it is graded.
    masks: see `RewardPool.submit`; for training, whose rewards may be NaN then.
    """

    def __init__(
        self,
        inputs: Inputs,
        pool: RewardPool,
        prompts: Sequence[Prompt],
        bodies: Sequence[Body],
        *,
        masks: bool = False,
        explained: int = 0,
    ):
        """explained: of how many, the last, `explained` tells what was compared."""
        self.prompts = prompts
        self._first_explained = len(prompts) - explained
        self._requests: dict[int, GradeRequest] = {}  # of these
        self.queue = RequestQueue(bodies)
        self._inputs = inputs
        self._pool = pool
        self._masks = masks
        self._grading: dict[int, Future[Grade]] = {}
        self.graded: SimpleQueue[int | None] = SimpleQueue()  # None is for who reads it

    def advance(self, fleet: Fleet) -> None:
        """Returns when all responses are there and graded. Raises ServerDied when no engine is left, Interrupted once
        the fleet was interrupted."""
        fleet.generate(self.queue, self._grade)
        for grade in self._grading.values():
            while not grade.done():
                wait([grade], _LOOK_EVERY_S)
                if fleet.is_interrupted:
                    raise Interrupted("the run was asked to end")
            grade.result()

    @property
    def completions(self) -> list[Completion]:
        return self.queue.completions

    @property
    def reward_B(self) -> NDArray[np.float64]:
        return np.array([self.grade(index).reward for index in range(len(self.prompts))], dtype=np.float64)

    def explained(self) -> list[tuple[GradeRequest, Grade]]:
        """Responses as the grader saw them, and their grades with what was compared."""
        places = sorted(self._requests)
        requests = [self._requests[place] for place in places]
        return list(zip(requests, self._pool.explain(requests, [self.grade(place) for place in places]), strict=True))

    def grade(self, index: int) -> Grade:
        return self._grading[index].result()

    def _grade(self, index: int, completion: Completion) -> None:
        request = self._inputs.grade_request(self.prompts[index], completion.token_ids, completion.finish_reason)
        if index >= self._first_explained:
            self._requests[index] = request
        self._grading[index] = self._pool.submit(request, masks=self._masks)
        self._grading[index].add_done_callback(lambda _: self.graded.put(index))


def begin_step(
    recipe: Recipe,
    inputs: Inputs,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    step: int,
    *,
    num_samples: int = 1,
    draw: int = 0,
) -> GradedSampling:
    """A step's sampling: so many responses for each prompt, by one request. draw: how often the step drew before."""
    purpose = f"train-{draw}" if draw else "train"
    bodies = generate_bodies(recipe, purpose, step, prompts, inputs.sampling(recipe.sampling), num_samples=num_samples)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    return GradedSampling(inputs, pool, repeated, bodies, masks=True)


def generate_bodies(
    recipe: Recipe,
    purpose: str,
    step: int,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    num_samples: int = 1,
) -> list[Body]:
    """Requests for so many samples each, with seeds that are a function of run, purpose, step and prompt; a prompt's
    repeats have others."""
    ids = [prompt.prompt_id for prompt in prompts]
    seeds = sample_seeds(recipe.run.seed, purpose, step, ids, num_samples)
    pairs = zip(prompts, seeds, strict=True)
    return [generate_body(GenerateRequest(prompt.token_ids, seed), sampling, num_samples) for prompt, seed in pairs]


def require_version(completions: Sequence[Completion], version: int, activity: str) -> None:
    """Raise SyncError for a response of other weights."""
    if stale := {completion.weight_version for completion in completions} - {str(version)}:
        raise SyncError(f"{activity}: responses of weight versions {sorted(stale)}, expected {version}")


def finished_batch(
    sampling: GradedSampling, version: int, step: int, requests: Sequence[int] | None = None
) -> RolloutBatch:
    """The graded responses in the order of the prompts, those of a request as a group; requests: of these alone. Raises
    SyncError for a response of other weights."""
    queue = sampling.queue
    numbers = range(len(queue.sizes)) if requests is None else requests
    rows = [row for number in numbers for row in queue.rows_of(number)]
    completions = [one for number in numbers for one in queue.answers[number]]
    prompts = [sampling.prompts[row] for row in rows]
    require_version(completions, version, f"step {step}")
    sizes = [queue.sizes[number] for number in numbers]
    return RolloutBatch(
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        group_B=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        sequences=Sequences.of([prompt.token_ids for prompt in prompts], [one.token_ids for one in completions]),
        log_prob_R=np.array([value for one in completions for value in one.log_probs], dtype=np.float32),
        reward_B=np.array([sampling.grade(row).reward for row in rows], dtype=np.float64),
        finish_reason_B=np.array([FINISH_REASONS.index(one.finish_reason) for one in completions], dtype=np.uint8),
        weight_version_B=np.array([int(one.weight_version) for one in completions], dtype=np.int64),
        seconds_B=np.array([one.seconds for one in completions], dtype=np.float64),
        wave_B=np.zeros(len(rows), dtype=np.int32),
    )
