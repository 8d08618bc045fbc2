"""The demonstration's task by TRL's experimental A2PO, A*-PO in one process, to be put beside our own run of it.

    python3.11 -m venv TRL && TRL/bin/pip install torch==2.13.0+cpu trl==1.16.0 transformers==5.19.0 pyyaml
    TRL/bin/python tests/benchmarks/trl_a2po.py QUICKSTART --out FOLDER [--target 0.85 --stop-at-target] [--threads 2]

It runs in that environment and imports nothing of ours. QUICKSTART: the folder of a `megatron-apo quickstart` run, of
which it takes recipe, reference, prompts and answers; paths in a recipe are relative to the working directory. --steps,
--prompts-per-step, --lr and --seed stand in for the recipe's. So small a model may be faster with one thread: try both.

The same as ours: token ids of prompts, reward, sampling, samples a prompt of stage 1, b1, b2, Adam, the learning rate
of each step, gradient clipping, fp32. What differs:

- One process with --threads threads. Ours is two ranks and an engine, of one thread each, and graders.
- `generate` of transformers: a batch goes on until its longest response ends. Ours is vLLM's engine.
- V* is in memory, without a store, resume or checks, and stage 1 runs in the process that trains.
- Log-probs come from the logits of the whole batch at once, padded; ours from packed micro-batches.
- Each optimizer step has prompts and responses of its own. Ours learns all minibatches of a step from one batch, which
  is the same with the demonstration's one. The order of prompts, and all samples, are others.
- Text is graded without special tokens. Ours keeps a <pad> or <unk> within a response, which is then wrong.
- Nothing is saved, and nothing evaluated before training: held-out prompts are at the end, in no time that is told.

FOLDER/steps.jsonl has a line for each step, FOLDER/summary.json what is printed. Seconds are from this file's first
line on. start_up_s: imports, model, data and trainer. target_s: when the mean reward of the last --target-responses, in
whole steps, was first at least --target, at the end of a step, as ours judges train.target_reward; null: never.
"""

# ruff: noqa: E402

from __future__ import annotations

import time

START = time.perf_counter()  # before the imports, which take seconds

import argparse
import json
import os
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
import transformers
import trl
import yaml
from datasets import Dataset
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.experimental.a2po import A2POConfig, A2POTrainer

ONLY = {  # what this trainer, or this file, has in one way alone
    "data": {"template": "raw"},
    "sampling": {"temperature": 1.0, "stop_token_ids": None},  # its log-probs know of no temperature
    "reward": {"name": "arithmetic", "truncated": "grade"},
    "vstar": {"adaptive": None, "estimator": "log_mean_exp", "filter": "none"},
    "objective": {"name": "apo", "loss_scale": "paper", "samples_per_prompt": 1},
    "optimizer": {"schedule": "constant"},
    "train": {"importance": "none"},
}
GIVEN = {"steps": ("train", int), "prompts_per_step": ("train", int), "lr": ("optimizer", float), "seed": ("run", int)}
EVALUATED_AT_ONCE = 64  # held-out prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    for key, (section, kind) in GIVEN.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, help=f"in place of {section}.{key}")
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--target-responses", type=int, default=1024)
    parser.add_argument("--stop-at-target", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="torch's, whatever OMP_NUM_THREADS says")
    args = parser.parse_args()
    if (args.out / "steps.jsonl").exists():
        parser.error(f"--out: {args.out} has a run; give a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    recipe = read_recipe(args)
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["path"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32)
    prompts = read_prompts(recipe, "train", recipe["data"]["max_prompts"], tokenizer)
    reward = Reward(tokenizer, recipe["sampling"]["max_response_tokens"])
    watch = Watch(args, recipe["train"], reward)
    trainer = A2POTrainer(
        model=model,
        reward_funcs=reward,
        args=trainer_settings(args.out, recipe),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[watch],
        optimizers=adam(model, recipe["optimizer"]),
    )
    trainer.remove_callback(PrinterCallback)
    assert trainer.eos_token_ids == [tokenizer.eos_token_id], "ours ends a response at the model's ids alone"
    start_up_s = watch.lap()
    trainer.train()  # stage 1 first
    summary = {
        **{package.__name__: package.__version__ for package in (trl, transformers, torch)},
        "threads": torch.get_num_threads(),
        **{key: recipe[section][key] for key, (section, _) in GIVEN.items()},
        "start_up_s": round(start_up_s, 2),
        "stage_1_s": round(watch.stage_1_s, 2),
        "stage_1_prompts": len(prompts),
        "stage_1_reward": watch.stage_1_reward,
        "vstar_mean": fmean(trainer._optimal_values.values()),
        "steps_done": len(watch.step_s),
        "step_s_median": round(median(watch.step_s), 3),
        "target": args.target,
        "target_s": watch.target_s,
    }
    rows = read_prompts(recipe, "eval", recipe["eval"]["max_prompts"], tokenizer)
    for name, one in (("before", trainer.ref_model), ("after", trainer.model)):
        summary[f"held_out_{name}"] = evaluate(one, tokenizer, rows, recipe, reward)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def read_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The quickstart's recipe, which has every key, with what the command line says instead."""
    recipe = yaml.safe_load((args.quickstart / "recipe.yaml").read_text())
    for section, values in ONLY.items():
        for key, value in values.items():
            if recipe[section][key] != value:
                raise SystemExit(f"{section}.{key}: {recipe[section][key]} cannot be run here; only {value} can")
    for key, (section, _) in GIVEN.items():
        if getattr(args, key) is not None:
            recipe[section][key] = getattr(args, key)
    if recipe["train"]["prompts_per_step"] % recipe["train"]["minibatches"]:
        raise SystemExit("--prompts-per-step: not divided by train.minibatches")
    return recipe


def read_prompts(recipe: dict[str, Any], part: str, most: int | None, tokenizer: Any) -> list[dict[str, str]]:
    """The first rows of a file, prompt and answer, but for those that are too long. Template raw shows a prompt as it
    is, and the demonstration's tokenizer puts nothing before it."""
    rows = [json.loads(line) for line in Path(recipe["data"][part]).read_text().splitlines()][:most]
    ids = tokenizer([row["prompt"] for row in rows], add_special_tokens=False)["input_ids"]
    return [row for row, own in zip(rows, ids, strict=True) if len(own) <= recipe["data"]["max_prompt_tokens"]]


class Reward:
    """Ours (`ArithmeticReward`): 1 if what follows the closing think tag is exactly the answer. An unfinished response
    is wrong: TRL tells nothing of that, but a response without EOS is as long as the limit."""

    def __init__(self, tokenizer: Any, most_tokens: int):
        self._tokenizer, self._most_tokens = tokenizer, most_tokens
        self._graded: list[float] = []

    def __call__(self, prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        ids = self._tokenizer(completions, add_special_tokens=False)["input_ids"]
        for text, own, right in zip(completions, ids, answer, strict=True):
            _, tag, given = text.partition("</think>")
            self._graded.append(float(len(own) < self._most_tokens and bool(tag) and given == right))
        return self._graded[-len(completions) :]

    def taken(self) -> list[float]:
        """The rewards since this was last called."""
        found, self._graded = self._graded, []
        return found


def adam(model: torch.nn.Module, config: dict[str, Any]) -> tuple[AdamW, LambdaLR]:
    """Adam and our warm-up, which is linear and, unlike transformers' own, not 0 at the first step."""
    betas, steps = (config["beta1"], config["beta2"]), config["warmup_steps"]
    found = AdamW(model.parameters(), config["lr"], betas, config["eps"], config["weight_decay"])
    return found, LambdaLR(found, lambda done: min(1.0, (done + 1) / (steps + 1)))


def trainer_settings(out: Path, recipe: dict[str, Any]) -> A2POConfig:
    train, sampling, vstar = recipe["train"], recipe["sampling"], recipe["vstar"]
    return A2POConfig(
        output_dir=str(out),
        max_prompt_length=recipe["data"]["max_prompt_tokens"],
        max_completion_length=sampling["max_response_tokens"],
        temperature=sampling["temperature"],
        top_k=0,  # none: transformers takes null for 50
        num_value_samples=vstar["samples_per_prompt"],
        beta1=vstar["beta1"],
        filter_all_incorrect=False,
        beta2=recipe["objective"]["beta2"],
        per_device_train_batch_size=train["prompts_per_step"] // train["minibatches"],  # stage 1: prompts at once
        dataloader_drop_last=True,  # every step has all its prompts
        max_steps=train["steps"] * train["minibatches"],
        max_grad_norm=recipe["optimizer"]["clip_grad"],
        seed=recipe["run"]["seed"],
        use_cpu=True,
        bf16=False,  # TRL's defaults are bf16 and gradient checkpointing, also on a CPU
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Watch(TrainerCallback):
    """Times stage 1 and each step, of as many optimizer steps as it has minibatches, and looks at the target after it.
    A step lasts from the end of the one before to its own: drawing prompts, generation, grading, learning."""

    def __init__(self, args: argparse.Namespace, train: dict[str, Any], reward: Reward):
        self._args, self._reward, self._minibatches = args, reward, train["minibatches"]
        self._window = -(-args.target_responses // train["prompts_per_step"])  # steps
        self._last, self._means = START, []
        self.stage_1_s, self.stage_1_reward, self.step_s, self.target_s = 0.0, 0.0, [], None

    def lap(self) -> float:
        """Seconds since the last lap, at first since START."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before

    def on_train_begin(self, args, state, control, **kwargs):  # after stage 1
        self.stage_1_s, self.stage_1_reward = self.lap(), fmean(self._reward.taken())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._minibatches:
            return
        rewards, seconds = self._reward.taken(), self.lap()
        self.step_s.append(seconds)
        self._means.append(fmean(rewards))
        row = {"step": len(self.step_s), "seconds": round(self._last - START, 3), "step_s": round(seconds, 3)}
        with open(self._args.out / "steps.jsonl", "a") as file:
            file.write(json.dumps(row | {"reward": self._means[-1], "responses": len(rewards)}) + "\n")
        last = self._means[-self._window :]
        if self.target_s is None and len(last) == self._window and fmean(last) >= self._args.target:
            self.target_s = row["seconds"]
            control.should_training_stop |= self._args.stop_at_target


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, rows: list[dict[str, str]], recipe: dict[str, Any], reward: Reward) -> dict:
    """avg@k at the sampling temperature, and greedy; standard errors are over prompts."""
    model.eval()
    limit, found = recipe["sampling"]["max_response_tokens"], {}
    sampled = {"do_sample": True, "temperature": recipe["sampling"]["temperature"], "top_k": 0, "top_p": 1.0}
    for name, count, how in (("avg_at_k", recipe["eval"]["samples"], sampled), ("greedy", 1, {"do_sample": False})):
        means: list[float] = []
        for first in range(0, len(rows), EVALUATED_AT_ONCE):
            block = [row for row in rows[first : first + EVALUATED_AT_ONCE] for _ in range(count)]
            texts, answers = [row["prompt"] for row in block], [row["answer"] for row in block]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            ids = model.generate(**inputs, max_new_tokens=limit, **how)
            responses = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            grades = reward(texts, responses, answers)
            means += [fmean(grades[start : start + count]) for start in range(0, len(grades), count)]
        found |= {name: fmean(means), f"{name}_stderr": stdev(means) / len(means) ** 0.5}
    return found


if __name__ == "__main__":
    main()
