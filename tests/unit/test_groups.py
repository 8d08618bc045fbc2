"""Which groups of responses a step learns from, and which prompts were used for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch.distributed as dist

from megatron_apo.config import build_recipe
from megatron_apo.data.prompt_source import PromptSource
from megatron_apo.data.prompts import Prompt
from megatron_apo.data.rollouts import RolloutBatch
from megatron_apo.objectives import DAPO, Objective
from megatron_apo.rollout.groups import Drawn, sample_groups
from megatron_apo.runtime.topology import Topology
from tests.batches import make_batch
from tests.unit.test_rollout_sharing import one_rank

PROMPTS = [Prompt(f"{n:032x}", "", "h", (5, n), "", n) for n in range(40)]


@dataclass(frozen=True)
class Spread(Objective):
    """Learns from groups whose rewards differ."""

    samples_per_prompt: int = 2
    max_draws: int = 3

    def learns_from(self, reward_G: Sequence[float]) -> bool:
        return max(reward_G) > min(reward_G)


@dataclass
class Sampler:
    """Rewards that differ where `is_spread` says so of the prompt, and responses that say whose they are."""

    is_spread: Sequence[bool]
    asked: list[list[int]] = field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], step: int, *, num_samples: int, draw: int) -> RolloutBatch:
        assert draw == len(self.asked)
        self.asked.append([prompt.row for prompt in prompts])
        rows = [prompt.row for prompt in prompts for _ in range(num_samples)]
        made = make_batch(
            [PROMPTS[row].token_ids for row in rows],
            [[row, place] for place, row in enumerate(rows)],
            rewards=[float(place % num_samples == 0 or not self.is_spread[row]) for place, row in enumerate(rows)],
            log_probs=[[-0.1 * row, -0.2] for row in rows],
            prompt_ids=[PROMPTS[row].prompt_id for row in rows],
            weight_version=step,
        )
        made.group_B[:] = np.repeat(np.arange(len(prompts)), num_samples)
        return made


def prompt_source() -> PromptSource:
    recipe = build_recipe({}, ["model.path=m", "data.train=t", "vstar.dir=v"])
    return PromptSource(recipe, PROMPTS)


def order(count: int) -> list[int]:
    """The rows that the walk gives first."""
    return [prompt.row for prompt in prompt_source().draw(count)]


@pytest.fixture
def topology() -> Iterator[Topology]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield one_rank()
    dist.destroy_process_group()


def rows_of(batch: RolloutBatch) -> list[int]:
    """The prompt of each group; a group's prompt, responses, log-probs and rewards belong together."""
    found = []
    for number, rows in enumerate(batch.groups):
        (row,) = {int(batch.sequences.response(member)[0]) for member in rows}
        assert len(rows) == 2 and {batch.prompt_ids[member] for member in rows} == {PROMPTS[row].prompt_id}
        assert batch.group_B[rows].tolist() == [number] * 2
        for member in rows:
            assert batch.sequences.prompt(member).tolist() == [5, row]
            assert batch.log_probs_of(member).tolist() == pytest.approx([-0.1 * row, -0.2])
        places = [int(batch.sequences.response(member)[1]) for member in rows]
        assert places[1] == places[0] + 1, "a group is one request's"
        found.append(row)
    return found


def told(drawn: Drawn) -> dict[str, float]:
    """Of prompts, rewards and tokens."""
    found = drawn.metrics(step_s=2.0, generate_s=1.0)
    return {name: value for name, value in found.items() if name.startswith(("prompts/", "reward/", "tokens/"))}


def test_groups_that_teach_nothing_are_drawn_again(topology) -> None:
    walk = order(20)
    spread = [True] * 40
    for row in (walk[1], walk[3], walk[4]):  # two of the first four, one of the next two
        spread[row] = False
    sampler, prompts = Sampler(spread), prompt_source()
    drawn = sample_groups(topology, sampler, prompts, Spread(), 4, step=7)
    assert sampler.asked == [walk[:4], walk[4:6], walk[6:7]]
    assert rows_of(drawn.batch) == [walk[0], walk[2], walk[5], walk[6]]
    assert told(drawn) == {"prompts/drawn": 7, "prompts/not_worth": 3, "reward/drawn": 10 / 14, "tokens/drawn": 28}
    assert drawn.batch.reward_B.tolist() == [1, 0] * 4 and drawn.batch.weight_version_B.tolist() == [7] * 8


def test_after_so_many_draws_the_others_fill_up(topology) -> None:
    walk = order(20)
    spread = [row == walk[2] for row in range(40)]
    sampler, prompts = Sampler(spread), prompt_source()
    drawn = sample_groups(topology, sampler, prompts, Spread(), 4, step=0)
    assert sampler.asked == [walk[:4], walk[4:7], walk[7:10]]
    assert rows_of(drawn.batch) == [walk[0], walk[1], walk[2], walk[3]]
    assert told(drawn) == {"prompts/drawn": 10, "prompts/not_worth": 9, "reward/drawn": 19 / 20, "tokens/drawn": 40}


def test_a_masked_response_is_no_reward_of_its_group(topology) -> None:
    """Of two responses one is cut: what is left cannot differ. DAPO draws another prompt."""
    walk, sampler, prompts = order(20), Sampler([True] * 40), prompt_source()
    sample = sampler.sample

    def with_masked(drawn: Sequence[Prompt], step: int, **options: int) -> RolloutBatch:
        made = sample(drawn, step, **options)
        cut = [row for row in range(0, len(made), 2) if made.prompt_ids[row] == PROMPTS[walk[1]].prompt_id]
        made.reward_B[cut] = np.nan
        return made

    sampler.sample = with_masked  # type: ignore[method-assign]
    drawn = sample_groups(topology, sampler, prompts, DAPO(9, samples_per_prompt=2), 4, step=0)
    assert rows_of(drawn.batch) == [walk[0], walk[2], walk[3], walk[4]]
    assert told(drawn) == {"prompts/drawn": 5, "prompts/not_worth": 1, "reward/drawn": 4 / 9, "tokens/drawn": 20}


def test_a_method_that_learns_from_all_draws_once(topology) -> None:
    @dataclass(frozen=True)
    class All(Objective):
        samples_per_prompt: int = 2

    sampler, prompts = Sampler([False] * 40), prompt_source()
    drawn = sample_groups(topology, sampler, prompts, All(), 4, step=0)
    assert rows_of(drawn.batch) == order(4)
    assert told(drawn) == {"prompts/drawn": 4, "prompts/not_worth": 0, "reward/drawn": 1, "tokens/drawn": 16}


def test_a_recorded_batch_is_taken_as_it_is(topology) -> None:
    """Also of more groups than a step of this recipe draws, none of which teaches anything."""
    sampler, prompts = Sampler([False] * 40), prompt_source()
    recorded = sampler.sample(PROMPTS[:6], 0, num_samples=2, draw=0)
    sampler.sample = lambda *_, **__: recorded  # type: ignore[method-assign]
    drawn = sample_groups(topology, sampler, prompts, Spread(), 4, step=0, may_redraw=False)
    assert drawn.batch is recorded and drawn.metrics(1.0, 1.0) == {}


def test_prompts_go_on_where_the_last_step_that_was_done_has_ended() -> None:
    walk, prompts = order(20), prompt_source()
    prompts.draw(5)
    prompts.step_is_done()
    prompts.draw(3)  # of a step that is ended before
    resumed = prompt_source()
    resumed.restore(prompts.drawn)
    assert [prompt.row for prompt in resumed.draw(6)] == walk[5:11] and resumed.drawn == 5


def test_sources_are_drawn_from_by_their_weights() -> None:
    """Not by their sizes, which are equal."""
    names = ["data.train_sources=[{name: a, path: a, weight: 3}, {name: b, path: b, weight: 1}]"]
    recipe = build_recipe({}, ["model.path=m", "vstar.dir=v", *names])
    prompts = PromptSource(recipe, [replace(prompt, source="ab"[prompt.row % 2]) for prompt in PROMPTS])
    assert [prompt.source for prompt in prompts.draw(8)].count("a") == 6


def batch_of(lengths: Sequence[int], seconds: Sequence[float]) -> RolloutBatch:
    """Responses of so many tokens, each there after so many seconds."""
    return make_batch([[5]] * len(lengths), [[7] * length for length in lengths], seconds=seconds)


def test_how_long_the_slowest_took() -> None:
    lengths = list(range(1, 201))
    # The last to arrive is the shortest; before it that of 20.0 s.
    found = Drawn(None, [batch_of(lengths, [24.0, *(n / 10 for n in lengths[1:])])]).metrics(50.0, 10.0)
    assert found["tokens_per_s/generate"] == 20100 / 10
    assert found["rollout/slowest_share"] == pytest.approx((24.0 - 20.0) / 50)
    # The slowest 1 % are two of 200: from the arrival at 19.9 s to that at 24.0 s.
    assert found["rollout/slowest_1pct_share"] == pytest.approx(4.1 / 50)
    assert Drawn(None, [batch_of([2], [3.0])]).metrics(4.0, 3.0)["rollout/slowest_share"] == 0.75


def test_every_draw_of_a_step_counts() -> None:
    """A second draw waits for its own slowest, and its tokens were generated, whether or not they are learned from."""
    draws = [batch_of([1, 2], [24.0, 0.2]), batch_of([3, 5, 4], [1.0, 2.0, 5.0])]
    found = Drawn(draws[0], draws, 3).metrics(step_s=100.0, generate_s=30.0)
    assert found["tokens_per_s/generate"] == 15 / 30
    assert found["rollout/slowest_share"] == pytest.approx((23.8 + 3.0) / 100)
