"""The arithmetic-with-thinking task: data, tokenizer and an untrained model small enough to learn on a laptop.

    12+34+56=    ->    <think>12+34=46;46+56=102</think>102

Nothing is downloaded; everything follows from a seed. The files are read like any user's (see `prompts.py`).
"""

from __future__ import annotations

import json
import random
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST, LAST = 10, 99  # operands
NUM_PROBLEMS = comb(LAST - FIRST + 3, 3)  # three operands, whatever their order
CHARACTERS = "0123456789+=;"
THINK_TAGS = ("<think>", "</think>")  # ordinary tokens: text keeps them when special tokens are dropped
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


def write_task(folder: Path | str, seed: int, num_train: int, num_eval: int, num_sft: int) -> dict[str, Path]:
    """Write train.jsonl, eval.jsonl (prompt, answer) and sft.jsonl (prompt, response, answer); paths by stem.

    No problem is in two files, not even with its operands in another order. Raises `ValueError` if there are too few.
    """
    total = num_train + num_eval + num_sft
    if total > NUM_PROBLEMS:
        raise ValueError(f"the arithmetic task has {NUM_PROBLEMS} problems, {total} were asked for; ask for fewer")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    problems = iter(_problems(random.Random(seed), total))
    paths = {}
    for name, size in (("train", num_train), ("eval", num_eval), ("sft", num_sft)):
        paths[name] = folder / f"{name}.jsonl"
        with open(paths[name], "w") as file:
            for _ in range(size):
                file.write(json.dumps(_row(next(problems), with_response=name == "sft")) + "\n")
    return paths


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the task, plus the think tags; `<eos>`, `<pad>` and `<unk>` are special."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *THINK_TAGS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def write_model(folder: Path | str, seed: int, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write an untrained Qwen3 of 790,144 parameters (fp32, tied embeddings) and its tokenizer, in Hugging Face form.

    Four heads in two key-value groups, four layers: it divides into two tensor-parallel ranks and up to four stages.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _problems(rng: random.Random, number: int) -> list[tuple[int, int, int]]:
    """Distinct problems, each with its operands in random order. The first n are the same for every `number` >= n."""
    seen: set[tuple[int, ...]] = set()
    problems: list[tuple[int, int, int]] = []
    while len(problems) < number:
        operands = (rng.randint(FIRST, LAST), rng.randint(FIRST, LAST), rng.randint(FIRST, LAST))
        if (unordered := tuple(sorted(operands))) not in seen:
            seen.add(unordered)
            problems.append(operands)
    return problems


def _row(operands: tuple[int, int, int], with_response: bool) -> dict[str, str]:
    a, b, c = operands
    answer = str(a + b + c)
    row = {"prompt": f"{a}+{b}+{c}=", "answer": answer}
    if with_response:
        row["response"] = f"<think>{a}+{b}={a + b};{a + b}+{c}={answer}</think>{answer}"
    return row
