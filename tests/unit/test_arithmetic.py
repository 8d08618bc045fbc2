"""The arithmetic task: its problems, its tokenizer and its model as other programs read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_apo.data.arithmetic import PROBLEMS, STOPS_EARLY, build_tokenizer, write_model, write_task
from megatron_apo.rewards import GradeRequest, get_reward


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    return write_model(tmp_path_factory.mktemp("model"), 7, tokenizer)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def operands(row):
    return tuple(int(number) for number in re.findall(r"\d+", row["prompt"]))


def test_rows_are_right_and_the_grader_agrees(tmp_path):
    paths = write_task(tmp_path, 0, num_train=200, num_eval=50, num_sft=1000)
    assert {name: len(read(path)) for name, path in paths.items()} == {"train": 200, "eval": 50, "sft": 1000}
    assert [path.name for path in paths.values()] == ["train.jsonl", "eval.jsonl", "sft.jsonl"]
    grader = get_reward("arithmetic", {})
    for row in read(paths["train"]) + read(paths["eval"]):
        assert row.keys() == {"prompt", "answer"}
        assert re.fullmatch(r"\d\d\+\d\+\d=", row["prompt"])
        assert int(row["answer"]) == sum(operands(row))
    stopped_early = 0
    for row in read(paths["sft"]):
        a, b, c = operands(row)
        whole = f"<think>{a}+{b}={a + b};{a + b}+{c}={a + b + c}</think>{a + b + c}"
        early = f"<think>{a}+{b}={a + b}</think>{a + b}"
        assert row["response"] in (whole, early)
        is_early = row["response"] == early
        stopped_early += is_early
        assert grader(GradeRequest(row["prompt"], row["response"], row["answer"], "stop")) == (not is_early)
    assert stopped_early == pytest.approx(STOPS_EARLY * 1000, abs=60)


def test_no_problem_is_seen_twice_in_any_order(tmp_path):
    paths = write_task(tmp_path, 1, num_train=2048, num_eval=512, num_sft=len(PROBLEMS) - 2560)
    problems = [tuple(sorted(operands(row))) for path in paths.values() for row in read(path)]
    assert len(set(problems)) == len(problems) == len(PROBLEMS) == 90 * 45


def test_everything_follows_from_the_seed(tmp_path):
    first = write_task(tmp_path / "a", 5, 20, 10, 10)
    again = write_task(tmp_path / "b", 5, 20, 10, 10)
    other = write_task(tmp_path / "c", 6, 20, 10, 10)
    assert all(first[name].read_bytes() == again[name].read_bytes() != other[name].read_bytes() for name in first)


def test_more_problems_than_there_are(tmp_path):
    with pytest.raises(ValueError, match=f"has {len(PROBLEMS)} problems, {len(PROBLEMS) + 1} were asked for"):
        write_task(tmp_path, 0, len(PROBLEMS), 1, 0)


TEXT = "12+34+56=<think>12+34=46;46+56=102</think>102"


def test_one_token_per_character(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.replace("<think>", "t").replace("</think>", "t"))
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == TEXT
    assert [tokenizer.decode([token]) for token in ids][:3] == ["1", "2", "+"]
    # What a rollout's text is made of: the stop id goes, the think tags stay.
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == TEXT
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1 == 18
    assert tokenizer("1\nx ")["input_ids"] == [tokenizer("1")["input_ids"][0]] + [tokenizer.unk_token_id] * 3


def test_plain_transformers_reads_the_folder(model_folder, tokenizer):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from megatron_apo.data.rendering import tokenizer_hash

    loaded = AutoTokenizer.from_pretrained(model_folder)
    assert (
        loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"] and loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    )
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    generation = GenerationConfig.from_pretrained(model_folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    config = AutoConfig.from_pretrained(model_folder)
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == config.vocab_size % 2 == 0
    assert config.eos_token_id == tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    h, layers, mlp = 128, 4, 384
    per_layer = h * 128 + 2 * h * 64 + 128 * h + 2 * 32 + 3 * h * mlp + 2 * h  # q, k and v, o, q/k norms, MLP, norms
    assert sum(p.numel() for p in model.parameters()) == 18 * h + layers * per_layer + h == 790_144


def test_weights_follow_from_the_seed(model_folder, tokenizer, tmp_path):
    import torch

    state = torch.random.get_rng_state()
    name = "model.safetensors"
    assert (write_model(tmp_path / "a", 7, tokenizer) / name).read_bytes() == (model_folder / name).read_bytes()
    assert (write_model(tmp_path / "b", 8, tokenizer) / name).read_bytes() != (model_folder / name).read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are its own"


def test_importing_is_light():
    code = "import sys, megatron_apo.data.arithmetic, megatron_apo.data.prompts\n"
    code += "assert not {'torch', 'transformers', 'datasets', 'vllm', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
