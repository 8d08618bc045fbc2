"""Graded responses from vLLM for every trainer rank, and vLLM kept on the policy's weights.

    with Rollouts(recipe, topology, policy, spec, inputs, offloaded=...) as rollouts:
        rollouts.sync(0)                          # the engines serve the trainer's weights
        batch = rollouts.sample(prompts, step)    # a RolloutBatch on the driver, None elsewhere
        for rows, wave in rollouts.stream(prompts, step, enough=4096): ...     # the same as it comes
        evaluation = rollouts.evaluate(step)      # or beside other work, from begin_evaluation to end_evaluation

Every method is called on every rank; graders, tokenizer and the fleet live on the driver (global rank 0). What happens
when an engine fails:

- One that dies while others serve is started again beside them. The next sync gives it the weights, and it serves again
  once these are proven.
- When none is left, all are restarted, given the weights and proven, and the work goes on. A second time in the same
  step ends the run. An evaluation beside other work is lost then.
- One in which a weight update raised is restarted at once, for it can hold a mixture of two versions. A second such
  failure in the same step ends the run.
- Weights that are not the trainer's (`SyncError`) end the run.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from itertools import chain, cycle, islice
from types import TracebackType

from megatron_apo.config import Difference, Recipe
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.model.build import LogProbModel
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout.arrivals import Arrivals
from megatron_apo.rollout.engine import State
from megatron_apo.rollout.engines import Engines
from megatron_apo.rollout.evaluation import begin_evaluation, evaluated_prompts, finished_evaluation
from megatron_apo.rollout.fleet import Fleet
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.placement import transport_of
from megatron_apo.rollout.proof import policy_log_probs, prove
from megatron_apo.rollout.sampler import GradedSampling, begin_step, finished_batch, require_version
from megatron_apo.rollout.server import ServerDied
from megatron_apo.rollout.sharing import MemorySharing
from megatron_apo.rollout.transport.base import Ranks
from megatron_apo.rollout.weight_sync import SyncError, SyncReport, UpdateFailed, WeightSync
from megatron_apo.runtime.collective import Answer, driver_only, on_driver
from megatron_apo.runtime.ending import Interrupted, request
from megatron_apo.runtime.job import is_below_node
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.recorder import Evaluation
from megatron_apo.telemetry.samples import write_samples
from megatron_apo.weights.gather import Gather

_PASSED_ON_S = 5.0  # that the run is to end


def _evaluation_of(step: int) -> str:
    return f"the evaluation after step {step}"


def _is_ending() -> bool:
    """On the driver, whether the run is asked to end. SLURM signals engines and nodes at once when it preempts a job,
    and the nodes pass it on."""
    end = time.monotonic() + (_PASSED_ON_S if is_below_node() else 0.0)
    while request.why is None and time.monotonic() < end:
        time.sleep(0.05)
    return request.why is not None


class Rollouts:
    """Use as a context manager. `policy`: this rank's model chunks; `inputs` is None except on the driver;
    `offloaded()`: a context within which this rank's device has room for vLLM; `phase(name)`: measures "generate" and
    "evaluate", which are vLLM's work alone, "wait", which is that of a streamed step, and "offload", in which the two
    change places; `engines`: those that were entered before, and may be starting (None: they are its own)."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        policy: Sequence[LogProbModel],
        spec: ModelSpec,
        inputs: Inputs | None,
        offloaded: Callable[[], AbstractContextManager[None]] = nullcontext,
        phase: Callable[[str], AbstractContextManager[None]] = nullcontext,
        engines: Engines | None = None,
    ):
        self._recipe = recipe
        self._topology = topology
        self._policy = policy
        self._inputs = inputs
        self._phase = phase
        self._stack = ExitStack()
        self._engines, self._owns_engines = engines or Engines(recipe, topology), engines is None
        self._fleet = self._engines.fleet
        self._pool: RewardPool | None = None
        self._memory = MemorySharing(
            topology,
            self._fleet,
            offloaded,
            phase,
            sleeps=recipe.rollout.sleep_while_training,
            is_shared=self._engines.shares_memory,
        )
        self._sync = WeightSync(
            Gather(policy, spec, topology, bucket_bytes=recipe.sync.bucket_mib * 2**20),
            self._fleet.engines if self._fleet else (),
            ranks=Ranks.of(topology),
            transport=transport_of(recipe, self._engines.placement, on_gpu=topology.device.type == "cuda"),
            timeout_s=recipe.sync.timeout_s,
        )
        self._version = 0
        self._report: SyncReport | None = None  # of the last sync
        self._probes: list[list[int]] = []
        self._answered_by: Counter[int] = Counter()  # of the last step's draws
        self._beside: Arrivals | None = None  # on the driver, an evaluation that is beside other work
        self._activity = "the start"
        self._all_lost_in: str | None = None
        self._update_failed_in: str | None = None

    def __enter__(self) -> Rollouts:
        try:
            if self._owns_engines:
                self._stack.enter_context(self._engines)
            on_driver(self._topology, self._start_graders)
            self._stack.callback(self._drop_evaluation)
            self._memory.start_engines()
            on_driver(self._topology, lambda: self.fleet.connect(self._sync.init_info))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._stack.__exit__(kind, error, trace)

    def interrupt(self) -> None:
        """On the driver, from any thread: what waits for engines raises Interrupted on every rank, now and later."""
        self.fleet.interrupt()

    @property
    def fleet(self) -> Fleet:
        """The engines, on the driver."""
        assert self._fleet is not None
        return self._fleet

    @property
    def pool(self) -> RewardPool:
        """The graders, on the driver."""
        assert self._pool is not None
        return self._pool

    @property
    def inputs(self) -> Inputs:
        """Tokenizer and prompts, on the driver."""
        assert self._inputs is not None
        return self._inputs

    @property
    def grader_failures(self) -> dict[str, int]:
        """How often graders failed, by reason; nothing except on the driver."""
        return dict(self._pool.failures) if self._pool else {}

    def memory_pids(self) -> dict[str, int | None]:
        """The root process of each engine that runs here, by name; nothing except on the driver."""
        return self._fleet.pids() if self._fleet else {}

    def step_metrics(self) -> dict[str, float]:
        """How many of the last step's responses each of several engines gave; nothing except on the driver."""
        engines = self._fleet.engines if self._fleet else []
        numbers = [engine.number for engine in engines] if len(engines) > 1 else []
        return {f"rollout/engine{number}/responses": self._answered_by.get(number, 0) for number in numbers}

    def sync(self, version: int) -> SyncReport:
        """Give the engines the policy's present weights and call them `version`."""
        assert self._beside is None, "an evaluation of the last weights is not ended"
        self._version = version
        for engine in self._fleet.engines if self._fleet else ():
            engine.version = None
        return self._with_restart(self._give_weights)

    def prove(self) -> float:
        """Largest |log-prob difference| between vLLM and the policy on the probes, which are the same all the run.

        Raises SyncError past sync.probe_tolerance or its mean, or where vLLM was sent other weights than the policy's
        present ones. Both sides are at temperature 1.
        """
        return self._with_restart(lambda: self._prove(State.SERVING)).max

    def sample(
        self, prompts: Sequence[Prompt], step: int, *, num_samples: int = 1, draw: int = 0
    ) -> RolloutBatch | None:
        """So many graded responses for each prompt, in their order; prompts and batch on the driver, None elsewhere.

        draw: how often the step was sampled for before.
        """
        self._begin(f"step {step}")
        sampling = self._sampled(
            "generate",
            lambda: begin_step(self._recipe, self.inputs, self.pool, prompts, step, num_samples=num_samples, draw=draw),
        )
        if sampling:
            self._answered_by = sampling.queue.answered_by + (self._answered_by if draw else Counter())
        return driver_only(self._topology, lambda: finished_batch(sampling, self._version, step))

    def stream(
        self, prompts: Sequence[Prompt], step: int, *, num_samples: int = 1, enough: int
    ) -> Iterator[tuple[list[int], RolloutBatch | None]]:
        """What `sample` gives, in waves while the rest is still generated: rows of its batch, on every rank, and these
        alone as a batch, on the driver.

        enough: see `Arrivals`. To be closed. Who computes between waves must leave the engines' memory alone, and the
        policy's weights as they are: all engines may die, and those that are started again are given them.
        """
        self._begin(f"step {step}")

        def begin() -> Arrivals:
            sampling = begin_step(self._recipe, self.inputs, self.pool, prompts, step, num_samples=num_samples)
            return Arrivals(sampling, self.fleet, enough)

        arrivals = driver_only(self._topology, begin)
        with arrivals or nullcontext():

            def take() -> tuple[list[int], RolloutBatch | None]:
                """This wave's requests and rows."""
                requests = driver_only(self._topology, lambda: arrivals.take())
                wave = driver_only(
                    self._topology,
                    lambda: finished_batch(arrivals.sampling, self._version, step, requests) if requests else None,
                )
                rows = [row for request in requests or () for row in arrivals.sampling.queue.rows_of(request)]
                return self._topology.broadcast(rows), wave

            while True:
                with self._phase("wait"):
                    rows, wave = self._with_restart(take)
                if not rows:
                    break
                yield rows, wave
            self._answered_by = arrivals.sampling.queue.answered_by if arrivals else Counter()

    def evaluate(self, step: int) -> Evaluation:
        """avg@k and greedy of the weights that the engines hold, on the recipe's held-out prompts."""
        self._begin(_evaluation_of(step))
        sampling = self._sampled("evaluate", self._evaluation)
        return on_driver(self._topology, lambda: self._evaluated(sampling, step))

    def begin_evaluation(self, step: int) -> None:
        """Have engines work on `evaluate(step)` beside what the ranks compute. Until `end_evaluation` the fleet is a
        thread's: nothing else is to be asked of engines, and no weights given."""

        def begin() -> Arrivals:
            assert self._beside is None
            arrivals = Arrivals(self._evaluation(), self.fleet, enough=sys.maxsize)
            arrivals.begin()
            return arrivals

        self._beside = driver_only(self._topology, begin)

    def end_evaluation(self, step: int) -> Evaluation | None:
        """What `begin_evaluation(step)` began, once it is there; None where no engine was left to answer, since those
        that are started again would have other weights. Raises Interrupted, on every rank."""

        def end() -> Evaluation | None:
            assert self._beside
            try:
                self._beside.take()
            except ServerDied as death:
                print(f"{_evaluation_of(step)} is lost: no engine is left ({death})", flush=True)
                return None
            except Interrupted as ending:
                print(f"{_evaluation_of(step)} is lost: {ending}", flush=True)
                raise
            finally:
                sampling = self._beside.sampling
                self._drop_evaluation()
            return self._evaluated(sampling, step)

        return on_driver(self._topology, end)

    def _evaluation(self) -> GradedSampling:
        """On the driver."""
        return begin_evaluation(self._recipe, self.inputs, self.pool)

    def _evaluated(self, sampling: GradedSampling, step: int) -> Evaluation:
        """On the driver, of what is answered and graded."""
        require_version(sampling.completions, self._version, _evaluation_of(step))
        write_samples(self._recipe.run.dir, step, evaluated_prompts(self._recipe, sampling))
        return finished_evaluation(self._recipe, self.inputs, sampling)

    def _drop_evaluation(self) -> None:
        """With what is still generated, when a run ends."""
        if self._beside:
            self._beside.close()
            self._beside = None

    def _start_graders(self) -> None:
        self._pool = self._stack.enter_context(RewardPool(self._recipe.reward, self._recipe.graders))

    def _begin(self, activity: str) -> None:
        assert self._beside is None, f"an evaluation is not ended, and {activity} begins"
        self._activity = activity
        if self._fleet:
            self._fleet.activity = activity

    def _sampled(self, phase: str, begin: Callable[[], GradedSampling]) -> GradedSampling | None:
        """What `begin` begins, answered and graded; on the driver, None elsewhere."""
        sampling = driver_only(self._topology, begin)

        def advance() -> None:
            assert sampling
            sampling.advance(self.fleet)

        def work() -> None:
            with self._memory.for_engines(), self._phase(phase):
                on_driver(self._topology, advance)

        self._with_restart(work)
        return sampling

    def _give_weights(self) -> SyncReport:
        """Bring the engines that answer to the last version, and prove those that were restarted."""

        def prepare() -> bool:
            self.fleet.finish_starts()
            self.fleet.connect(self._sync.init_info)
            return bool(self.fleet.lacking(self._version))

        if on_driver(self._topology, prepare):
            self._memory.wake("weights")
            with suppress(ServerDied, UpdateFailed):  # of all engines, which have noted it
                engines = self._fleet.lacking(self._version) if self._fleet else None
                self._report = self._sync.sync(self._version, engines)
        if reasons := on_driver(self._topology, lambda: self.fleet.failures(State.UNUSABLE)):
            if self._update_failed_in == self._activity:
                raise SyncError(f"a weight update failed twice in {self._activity}: {reasons[0]}")
            self._update_failed_in = self._activity
            if self._topology.is_driver:
                print(f"a weight update failed in {self._activity} ({reasons[0]}); restarting its engine", flush=True)
            self._memory.start_engines()
            return self._give_weights()
        on_driver(self._topology, lambda: self.fleet.require_one())
        if restarted := on_driver(self._topology, lambda: self.fleet.numbers(State.UNPROVEN)):
            worst = self._prove(State.UNPROVEN)
            for number in on_driver(
                self._topology, lambda: [n for n in self.fleet.numbers(State.SERVING) if n in restarted]
            ):
                if self._topology.is_driver:
                    print(
                        f"rollout engine {number} serves again, with the weights of version {self._version}; its "
                        f"log-probs differ from the trainer's by at most {worst.max:.2g}",
                        flush=True,
                    )
        assert self._report is not None
        return self._report

    def _prove(self, state: State) -> Difference:
        """`prove` of the engines in this state."""
        if not self._probes:
            self._probes = self._topology.broadcast(self._make_probes() if self._topology.is_driver else None)
        ours = policy_log_probs(self._recipe, self._topology, self._policy, self._probes)
        expected = self._sync.source_digests()
        tolerance = self._recipe.sync.tolerance(self._recipe.model, self._recipe.rollout)
        with self._memory.for_engines():
            engines = self._fleet.in_state(state) if self._fleet else None
            worst = prove(self._sync, self._probes, ours, tolerance, expected, engines)
            on_driver(self._topology, lambda: self.fleet.attend_to_lost())
        return worst

    def _make_probes(self) -> list[list[int]]:
        """sync.probe_sequences sequences of sync.probe_tokens tokens: prompts, one after the other, over and over."""
        sync = self._recipe.sync
        tokens = chain.from_iterable(
            prompt.token_ids for prompt in cycle(self.inputs.evaluation.prompts or self.inputs.training.prompts)
        )
        length = min(sync.probe_tokens, self._recipe.max_sequence_tokens)
        return [list(islice(tokens, length)) for _ in range(sync.probe_sequences)]

    def _with_restart(self, work: Callable[[], Answer]) -> Answer:
        """Do collective `work`. When no engine is left, restart all once a step, give them the weights and go on."""
        try:
            return work()
        except ServerDied as death:
            if on_driver(self._topology, _is_ending):
                raise Interrupted("the run was asked to end") from None
            who = "the rollout server" if self._recipe.rollout.replicas == 1 else "the last rollout engine"
            if self._all_lost_in == self._activity:
                tail = on_driver(self._topology, lambda: self.fleet.log_tail())
                raise ServerDied(f"{death}; it died twice in {self._activity}. The end of its log:\n{tail}") from None
            self._all_lost_in = self._activity
            if self._topology.is_driver:
                print(f"{who} died in {self._activity} ({death}); restarting it once", flush=True)
            self._memory.start_engines()

            def go_on() -> Answer:
                self._give_weights()
                return work()

            return self._with_restart(go_on)
