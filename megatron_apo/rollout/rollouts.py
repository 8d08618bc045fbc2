"""Graded responses from vLLM for every trainer rank, and vLLM kept on the policy's weights.

    with Rollouts(recipe, topology, policy, spec, inputs, parked=...) as rollouts:
        rollouts.sync(0)                          # vLLM serves the trainer's weights, proven
        batch = rollouts.sample(prompts, step)    # a RolloutBatch on the driver, None elsewhere

Every method is called on every rank. Server, graders and tokenizer live on the driver (global rank 0). A server that
dies is restarted once a step, given the weights again, proven and asked again; a second death in the same step ends the
run.

Trainer and vLLM take turns at a GPU's memory. vLLM has it within `parked`, where the trainer's is elsewhere: when a
server starts, samples, evaluates and scores probes. With rollout.sleep_while_training it sleeps otherwise; a sync wakes
the weights, and the KV cache follows at the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch

from megatron_apo.config import Recipe
from megatron_apo.data.layout import make_micro_batches
from megatron_apo.data.order import sample_seeds
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import FINISH_REASONS, RolloutBatch, groups_of
from megatron_apo.data.sequences import Sequences
from megatron_apo.model.build import LogProbModel, at_temperature
from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.parallel.pipeline import forward_log_probs
from megatron_apo.rewards.pool import Grade, RewardPool
from megatron_apo.rollout.client import Completion, GenerateRequest, RolloutClient
from megatron_apo.rollout.evaluation import evaluate_policy
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.server import ServerDied, VLLMServer
from megatron_apo.rollout.weight_sync import SyncError, SyncReport, WeightSync
from megatron_apo.runtime.collective import Answer, on_all, on_driver
from megatron_apo.runtime.topology import Topology
from megatron_apo.telemetry.recorder import Evaluation
from megatron_apo.weights.stream import WeightStream


class Rollouts:
    """Use as a context manager. `policy`: this rank's model chunks; `inputs` is None except on the driver; `parked()`:
    a context within which this rank's device has room for vLLM; `phase(name)`: measures "generate" and "evaluate",
    which are vLLM's work alone, and "offload", in which the two change places."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        policy: Sequence[LogProbModel],
        spec: ModelSpec,
        inputs: Inputs | None,
        parked: Callable[[], AbstractContextManager[None]] = nullcontext,
        phase: Callable[[str], AbstractContextManager[None]] = nullcontext,
    ):
        self._recipe = recipe
        self._topology = topology
        self._policy = policy
        self._stream = WeightStream(policy, spec, topology)
        self._inputs = inputs
        self._parked = parked
        self._phase = phase
        self._stack = ExitStack()
        self._server: VLLMServer | None = None
        self._client: RolloutClient | None = None
        self._pool: RewardPool | None = None
        self._sync: WeightSync
        self._version = 0
        self._moment = "the start"
        self._died_in: str | None = None
        self._probes: list[list[int]] = []  # the last that `prove` was given

    def __enter__(self) -> Rollouts:
        try:
            self._serve(self._start)
            self._meet()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def server_pid(self) -> int | None:
        """The server's root process, on the driver."""
        return self._server.process.pid if self._server and self._server.process else None

    @property
    def pool(self) -> RewardPool:
        """The graders, on the driver."""
        assert self._pool is not None
        return self._pool

    @property
    def grader_failures(self) -> dict[str, int]:
        """How often graders failed, by reason; nothing except on the driver."""
        return dict(self._pool.failures) if self._pool else {}

    def sync(self, version: int) -> SyncReport:
        """Give the server the policy's present weights and call them `version`."""
        self._version = version
        return self._surviving(self._give_weights)

    def _give_weights(self) -> SyncReport:
        """`sync` of the last version."""
        self._wake("weights")
        return self._sync.sync(self._version)

    def prove(self, batch: RolloutBatch) -> float:
        """Largest |log-prob difference| between vLLM and the policy on the first sequences of a batch.

        Raises SyncError past sync.probe_tolerance, or where vLLM was sent other weights than the policy's present ones.
        Both sides are at temperature 1. The driver's batch, which is held whole, counts.
        """
        rows = range(min(self._recipe.sync.probe_sequences, len(batch)))
        probes = [batch.sequences.row(row).tolist() for row in rows] if self._topology.is_driver else None
        self._probes = self._topology.broadcast(probes)
        return self._surviving(self._prove)

    def _prove(self) -> float:
        """`prove` on the last probes."""
        ours = self._own_log_probs(self._probes)
        expected = self._sync.source_checksums()
        tolerance = self._recipe.sync.tolerance(self._recipe.model, self._recipe.rollout)
        with self._turn():
            return self._sync.prove(self._probes, ours, tolerance, expected)

    def _own_log_probs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """The policy's log-probs of each sequence's tokens but the first, at temperature 1, on every rank."""
        first, rest = [s[:1] for s in sequences], [s[1:] for s in sequences]
        micro_batches = [
            micro.to(self._topology.device) for micro in make_micro_batches(self._recipe, Sequences.of(first, rest))
        ]
        with at_temperature(self._policy, 1.0):
            found = forward_log_probs(self._policy, micro_batches)
        ours: list[list[float]] = [[] for _ in sequences]
        for micro, log_prob_R in zip(micro_batches, found, strict=False):  # `found` is empty before the last stage
            parts = log_prob_R.split([len(rest[index]) for index in micro.indices])
            for index, values in zip(micro.indices, parts, strict=True):
                ours[index] = values.tolist()
        return self._topology.broadcast(ours, src=self._topology.last_stage_rank)

    def sample(self, prompts: Sequence[Prompt], step: int) -> RolloutBatch | None:
        """One graded response for each prompt (given on the driver), in their order; on the driver, None elsewhere."""
        self._moment = f"step {step}"
        sampled: list[RolloutBatch] = []
        self._surviving(lambda: self._on_turn("generate", lambda: sampled.append(self._sample(prompts, step))))
        return sampled[-1] if sampled else None

    def evaluate(self, step: int) -> Evaluation:
        """avg@k and greedy of the weights that the server holds, on the recipe's held-out prompts."""
        self._moment = f"the evaluation after step {step}"

        def work() -> Evaluation:
            assert self._client and self._inputs
            return evaluate_policy(self._recipe, self._inputs, self._client, self.pool)

        return self._surviving(lambda: self._on_turn("evaluate", work))

    def _sample(self, prompts: Sequence[Prompt], step: int) -> RolloutBatch:
        assert self._client and self._inputs
        grading: dict[int, Future[Grade]] = {}

        def grade(index: int, completion: Completion) -> None:
            request = self._inputs.grade_request(prompts[index], completion.token_ids, completion.finish_reason)
            grading[index] = self.pool.submit(request)

        seeds = sample_seeds(self._recipe.run.seed, "train", step, [prompt.prompt_id for prompt in prompts])
        requests = [GenerateRequest(prompt.token_ids, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        completions = self._client.generate(requests, self._inputs.sampling(self._recipe.sampling), grade)
        if stale := {completion.weight_version for completion in completions} - {str(self._version)}:
            raise SyncError(f"step {step}: responses of weight versions {sorted(stale)}, expected {self._version}")
        prompt_ids = tuple(prompt.prompt_id for prompt in prompts)
        return RolloutBatch(
            prompt_ids=prompt_ids,
            group_B=groups_of(prompt_ids),
            sequences=Sequences.of([prompt.token_ids for prompt in prompts], [one.token_ids for one in completions]),
            log_prob_R=np.array([value for one in completions for value in one.log_probs], dtype=np.float32),
            reward_B=np.array([grading[index].result().reward for index in range(len(prompts))], dtype=np.float64),
            finish_reason_B=np.array([FINISH_REASONS.index(one.finish_reason) for one in completions], dtype=np.uint8),
            weight_version_B=np.array([int(one.weight_version) for one in completions], dtype=np.int64),
            seconds_B=np.array([one.seconds for one in completions], dtype=np.float64),
        )

    def _start(self) -> None:
        """On the driver: graders and server."""
        recipe = self._recipe
        self._pool = self._stack.enter_context(RewardPool(recipe.reward))
        server = VLLMServer(
            recipe.rollout,
            recipe.model.path,
            log_path=recipe.run.dir / "logs" / "vllm.log",
            seed=recipe.run.seed,
            max_model_len=recipe.max_sequence_tokens,
            shm_dir=recipe.sync.dir,
        )
        self._stack.callback(server.stop)
        self._stack.callback(lambda: self._client and self._client.close())
        self._server = server
        self._start_server()

    def _start_server(self) -> None:
        assert self._server
        self._server.start()
        self._client = RolloutClient(
            self._server.url, self._server.token, timeout_s=self._recipe.rollout.request_timeout_s
        )

    def _restart(self) -> None:
        assert self._server and self._client
        self._client.close()
        self._client = None
        self._server.stop()
        self._start_server()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """vLLM's: it is awake within, and the trainer's memory comes back only when it sleeps again."""
        with ExitStack() as stack:
            with self._phase("offload"):
                stack.enter_context(self._parked())
                self._wake()
            yield
            with self._phase("offload"):
                self._sleep()
                stack.close()

    def _on_turn(self, phase: str, work: Callable[[], Answer]) -> Answer:
        with self._turn(), self._phase(phase):
            return on_driver(self._topology, work)

    def _wake(self, *tags: str) -> None:
        if self._recipe.rollout.sleep_while_training:
            self._make_room()
            on_driver(self._topology, lambda: self._client and self._client.wake_up(*tags))

    def _make_room(self) -> None:
        """Let go of the memory that torch has freed but keeps, on every rank before vLLM, on any device, takes it."""
        if self._topology.device.type == "cuda":
            on_all(self._topology, torch.cuda.empty_cache)

    def _sleep(self) -> None:
        if self._recipe.rollout.sleep_while_training:
            on_driver(self._topology, lambda: self._client and self._client.sleep())

    def _serve(self, start: Callable[[], None]) -> None:
        """Start a server, which takes all its memory at once."""
        with self._parked():
            self._make_room()
            on_driver(self._topology, start)
            self._sleep()

    def _meet(self) -> None:
        folder = self._server.payload_dir if self._server else None
        rank, group = self._topology.rank, self._topology.host_group
        self._sync = WeightSync(self._stream, client=self._client, folder=folder, rank=rank, group=group)
        self._sync.init()

    def _surviving(self, work: Callable[[], Answer]) -> Answer:
        """Do collective `work`; if the server dies in it, restart it, give it the weights, do the work again."""
        try:
            return work()
        except ServerDied as death:
            if self._died_in == self._moment:
                tail = on_driver(self._topology, lambda: self._server.log_tail() if self._server else "")
                raise ServerDied(f"{death}; it died twice in {self._moment}. The end of its log:\n{tail}") from None
            self._died_in = self._moment
            if self._topology.is_driver:
                print(f"the rollout server died in {self._moment} ({death}); restarting it once", flush=True)
            self._serve(self._restart)

            def again() -> Answer:
                self._meet()
                self._give_weights()
                if self._probes:
                    self._prove()
                return work()

            return self._surviving(again)
