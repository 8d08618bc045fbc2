"""A store's samples are of the prompts that a run renders, or it is refused: by training, and by who would add some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_apo.config import Recipe, load_recipe
from megatron_apo.preflight import open_evaluation, open_sampling, open_training
from megatron_apo.rollout.filling import Filling, SamplingJob
from megatron_apo.values.fingerprint import StoreError
from megatron_apo.values.shards import StoreRow
from tests.runs import NUM_PROMPTS, SAMPLES, write_run

OTHER = "ab" * 16
SHARD = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_run(folder, f"vstar.prompts_per_shard={SHARD}", f"eval.prompts_per_shard={SHARD}", f"eval.samples={SAMPLES}")
    return folder


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> Recipe:
    """With a store of its own, which is not there yet."""
    return load_recipe(made / "recipe.yaml", [f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}"])


def write_shard(filling: Filling, index: int, others: dict[int, str], reward: float = 1.0) -> None:
    """others: in place of the hash of a prompt's text, by its number in the shard."""
    num = filling.writer.fingerprint.samples_per_prompt
    rows = [
        StoreRow(p.prompt_id, others.get(i, p.text_hash), [reward] * num, [9] * num, ["stop"] * num)
        for i, p in enumerate(filling.of_shard(index))
    ]
    filling.writer.write_shard(index, rows)


def told_of(check: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as caught:
        check()
    (line,) = str(caught.value).splitlines()
    return line


def test_a_run_is_not_trained_on_values_of_other_prompts(recipe: Recipe) -> None:
    """Rows 5 and 6 were other text; unless a filter leaves them out."""
    (filling,) = open_sampling(recipe).stores
    for index in range(NUM_PROMPTS // SHARD):
        write_shard(filling, index, {1: OTHER, 2: OTHER} if index == 1 else {}, reward=float(index != 1))
    filling.writer.finish()
    prompt = filling.of_shard(1)[1]
    assert told_of(lambda: open_training(recipe)) == (
        f"{recipe.vstar.dir}: 2 of {NUM_PROMPTS} prompts were other text or token ids when they were sampled, the "
        f"first is row 5, {prompt.prompt_id}; use the versions of transformers, tokenizers and this program that it "
        "was sampled with, or use another vstar.dir"
    )
    filtered = recipe.model_copy(update={"vstar": recipe.vstar.model_copy(update={"filter": "all_wrong"})})
    assert len(open_training(filtered).prompts) == NUM_PROMPTS - SHARD
    assert "2 of 64 prompts were other text" in told_of(filling.finish)


@pytest.mark.parametrize(("begin", "elsewhere"), [(open_sampling, "vstar.dir"), (open_evaluation, "run.dir")])
def test_a_worker_adds_no_samples_to_those_of_other_prompts(
    begin: Callable[[Recipe], SamplingJob], elsewhere: str, recipe: Recipe
) -> None:
    """The last store of the job: of an evaluation, the greedy one."""
    filling = begin(recipe).stores[-1]
    write_shard(filling, 0, {})
    assert begin(recipe).written() == {begin(recipe).num_shards - filling.writer.num_shards}
    write_shard(filling, 1, {3: OTHER})
    path = filling.writer.folder / "shard-00001.parquet"
    line = told_of(lambda: begin(recipe))
    assert line.startswith(f"{path}: 1 of {SHARD} prompts were other text or token ids when they were sampled, the ")
    assert f"{filling.of_shard(1)[3].prompt_id}; " in line and line.endswith(f"or use another {elsewhere}")


def test_a_shard_with_a_damaged_page_is_told_of_where_it_is_read_whole(recipe: Recipe) -> None:
    (filling,) = open_sampling(recipe).stores
    write_shard(filling, 0, {})
    path = filling.writer.folder / "shard-00000.parquet"
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first column's page
    path.write_bytes(data)
    assert open_sampling(recipe).written() == {0}
    for index in range(1, NUM_PROMPTS // SHARD):
        write_shard(filling, index, {})
    assert "shard-00000.parquet: damaged" in told_of(filling.finish)
