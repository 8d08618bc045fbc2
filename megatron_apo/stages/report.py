"""RUN/report.html: one page, without outside assets, of what a run did; also of one that is not finished.

Reads recipe.yaml, metrics.jsonl, summary.json and the V* store. What its method should have and is not there is said in
its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from megatron_apo.stages import report_method
from megatron_apo.stages.report_method import Method
from megatron_apo.stages.report_samples import samples_section
from megatron_apo.telemetry import page, plots
from megatron_apo.telemetry.figures import Figure, Rows, line_figure, named, series
from megatron_apo.telemetry.gpu_page import gpu_figures
from megatron_apo.telemetry.metrics import FILE_NAME, own_seconds, read_metrics
from megatron_apo.telemetry.summary import read_summary
from megatron_apo.telemetry.units import data_size, duration

Tree = Mapping[str, Any]

_PARTS = ("generate", "reference", "forward_backward", "train")  # whose rates are in metrics.jsonl
_RATES = {"tokens_per_s": ("tokens/s", ",.0f"), "tflops_per_rank": ("TFLOP/s of a rank", ".3g"), "mfu": ("MFU", ".1%")}
_OF_SOURCES = {"training reward by source": "/reward", "avg@k by source, held-out prompts": "/avg_at_k"}


def write_report(run_dir: Path) -> Path:
    """Write the page and return its path. Raises `ValueError` if `run_dir` is not the folder of a run."""
    names = ("recipe.yaml", FILE_NAME, "summary.json")
    if not any((run_dir / name).is_file() for name in names):
        raise ValueError(f"{run_dir}: not the folder of a run; it has none of {', '.join(names)}")
    recipe = _read_yaml(run_dir / "recipe.yaml")
    summary = read_summary(run_dir)
    rows = read_metrics(run_dir)
    method = Method.of(recipe)
    sections = {
        "Reward": _reward(rows, recipe),
        "Samples": samples_section(run_dir),
        f"What {method.title or 'the method'} learns from": report_method.targets(rows, method),
        "Critic": report_method.critic(rows, method),
        "Distance from the reference": report_method.distance(rows, method),
        "Optimization": report_method.optimization(rows, method),
        "V*": _vstar(run_dir, recipe, method),
        "Responses": _responses(rows),
        "Time": _time(rows, summary),
        "Trainer and rollouts": _agreement(rows, summary, method),
        "Machine": gpu_figures(rows) + _machine(summary),
        "Recipe": _recipe(recipe),
    }
    written = [page.section(title, body) for title, body in sections.items() if body]
    name, kind = run_dir.resolve().name, f"{method.title} run".strip()
    path = run_dir / "report.html"
    headline = _headline(summary, rows, recipe, method)
    path.write_text(page.document(name, kind, _subtitle(recipe, rows, method), [headline, *written]))
    return path


# ---- sections


def _subtitle(recipe: Tree, rows: Rows, method: Method) -> str:
    done = max((row["step"] for row in rows if "reward/mean" in row), default=None)
    parts = [method.title] if method.title else []
    if recipe:
        parallel, train = recipe["parallel"], recipe["train"]
        parts.append(f"tp {parallel['tp']} × pp {parallel['pp']} × dp {parallel['dp']}")
        parts.append(f"{train['prompts_per_step']} prompts a step")
        parts.append(f"seed {recipe['run']['seed']}")
    parts.append("no training step yet" if done is None else f"last step {done}")
    return " · ".join(parts)


def _headline(summary: Tree, rows: Rows, recipe: Tree, method: Method) -> str:
    headings = {"before": "before training", "after": f"after {method.title or 'training'}"}
    results = summary.get("pass_at_1", {})
    k = recipe["eval"]["samples"] if recipe else "k"
    cards = []
    if {"before", "after"} <= results.keys():
        before, after = results["before"], results["after"]
        gain = after["mean"] - before["mean"]
        # As of independent means, though the prompts are the same: where both go together the true error is smaller.
        error = ((after["stderr"] or 0) ** 2 + (before["stderr"] or 0) ** 2) ** 0.5
        cards.append(page.card(f"avg@{k} gained", f"{gain:+.3f}", f"± {error:.3f}, pairing ignored" if error else ""))
    for name, result in results.items():
        title, value = f"avg@{k} {headings.get(name, name)}", page.with_error(result["mean"], result["stderr"])
        cards.append(page.card(title, value, f"greedy {result['greedy']:.3f}"))
    if warned := _warned_steps(rows):
        cards.append(page.card("mismatch warned of", f"{len(warned)} steps", f"the first is step {warned[0]}"))
    phases = summary.get("phases_s", {})
    if phases:
        count = len(phases.keys() - {"total"})
        cards.append(page.card("wall clock", duration(_total(phases)), "1 phase" if count == 1 else f"{count} phases"))
    if not cards:
        reward = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
        if reward:
            cards.append(page.card("training reward", f"{reward[-1]:.3f}", f"first step {reward[0]:.3f}"))
        if not summary:
            cards.append(page.missing("summary.json: not there, the run has not ended"))
    return page.cards(cards)


def _reward(rows: Rows, recipe: Tree) -> str:
    reward = series(rows, "reward/mean")
    k = recipe["eval"]["samples"] if recipe else "k"
    names = {f"avg@{k}, held-out prompts": "eval/avg_at_k", "greedy, held-out prompts": "eval/greedy"}
    evaluations = {}
    for label, name in names.items():
        steps, means = series(rows, name)
        if steps:
            errors = [row.get(f"{name}_stderr") or 0.0 for row in rows if row.get(name) is not None]
            evaluations[label] = (steps, means, errors)
    if not reward[0] and not evaluations:
        return page.missing("no reward in metrics.jsonl")
    return page.figure(
        plots.reward_chart(reward, evaluations), "Bars are one standard error over prompts.", wide=True
    ) + _by_source(rows)


def _by_source(rows: Rows) -> str:
    """Of a run of several sources."""
    names = sorted(
        {name for row in rows for name in row if name.startswith(("source/", "eval/")) and name.count("/") == 2}
    )
    lines = {title: [name for name in names if name.endswith(end)] for title, end in _OF_SOURCES.items()}
    return "".join(line_figure(rows, Figure(title, named(own, part=1))) for title, own in lines.items() if own)


def _vstar(run_dir: Path, recipe: Tree, method: Method) -> str:
    """Nothing of a run that has no store."""
    from megatron_apo.values.page import lengths_figure, values_figure
    from megatron_apo.values.store import VStarStore
    from megatron_apo.values.summary import summarize

    settings = recipe["vstar"] if recipe else {}
    folder = Path(settings.get("dir", run_dir / "vstar"))
    if not (folder.is_dir() if method.needs_store is None else method.needs_store):
        return ""
    try:
        store = VStarStore.open(folder, settings.get("samples_used"))
        found = summarize(store, [settings.get("beta1", 0.5)], settings.get("estimator", "log_mean_exp"))
    except ValueError as error:  # of the store, or of an estimator that its rewards do not suit
        return page.missing(f"V*: {error}")
    wrong, right = (found.left_out[name].share for name in ("all_wrong", "all_right"))
    caption = f"{found.prompts} prompts, {found.samples} samples of each; {wrong:.0%} all wrong, {right:.0%} all right."
    return values_figure(found, found.values[0], caption) + lengths_figure(found, "All stage-1 samples.")


def _responses(rows: Rows) -> str:
    slowest = "share of the step with the slowest response, the slowest 1 % of responses alone"
    figures = [
        Figure("response length, tokens", named(f"response/{name}_tokens" for name in ("mean", "p50", "p95", "max"))),
        Figure("responses cut at the length cap", named(["response/truncated"]), percent=True),
        Figure(slowest, named(["rollout/slowest_share", "rollout/slowest_1pct_share"]), percent=True),
    ]
    return "".join(line_figure(rows, figure) for figure in figures)


def _time(rows: Rows, summary: Tree) -> str:
    blocks = ""
    timed = [row for row in rows if row.get("time/step_s") is not None]
    if timed:
        names = sorted({name for row in timed for name in row if name.startswith("time/") and name != "time/step_s"})
        parts = {name[5:-2]: [own_seconds(row, name) for row in timed] for name in names}
        step_s = [row["time/step_s"] for row in timed]
        parts["other"] = [max(0.0, whole - sum(of)) for whole, *of in zip(step_s, *parts.values(), strict=True)]
        parts = dict(sorted(parts.items(), key=lambda item: -sum(item[1])))
        total = sum(step_s)
        table = [(name, f"{sum(of) / len(timed):.3f} s", f"{sum(of) / total:.0%}") for name, of in parts.items()]
        table.append(("step", f"{total / len(timed):.3f} s", ""))
        steps = [row["step"] for row in timed]
        blocks += page.figure(
            plots.stacked_chart("time of a step by phase", steps, parts),
            "Running mean of five steps.",
            title="time of a step by phase",
        )
        blocks += page.table("A step, mean", ("phase", "seconds", "share"), table)
    else:
        blocks += page.missing("time of a step: nothing in metrics.jsonl")
    phases = summary.get("phases_s", {})
    if phases:
        total = _total(phases)
        blocks += page.table(
            "The run", ("phase", "time", "share"), [(n, duration(s), f"{s / total:.0%}") for n, s in phases.items()]
        )
    return blocks + _rates(rows)


def _rates(rows: Rows) -> str:
    found = {
        (part, rate): fmean(values)
        for part in _PARTS
        for rate in _RATES
        if (values := series(rows, f"{rate}/{part}")[1])
    }
    rates = {rate: how for rate, how in _RATES.items() if any(rate == of for _, of in found)}
    table = [
        (part, *(format(found[part, rate], how) if (part, rate) in found else "" for rate, (_, how) in rates.items()))
        for part in _PARTS
        if any(part == of for of, _ in found)
    ]
    if not table:
        return ""
    blocks = page.table("Rates, mean over steps", ("part", *(title for title, _ in rates.values())), table)
    if ("train", "mfu") in found:
        blocks += line_figure(rows, Figure("MFU of training", named(["mfu/train"]), percent=True))
    return blocks


def _total(phases_s: Mapping[str, float]) -> float:
    return phases_s.get("total", sum(phases_s.values()))


def _agreement(rows: Rows, summary: Tree, method: Method) -> str:
    limits = {f"limit of the mean, {name}": f"mismatch/{name}_limit" for name in ("warn", "stop")}
    differences = named(["mismatch/max", "mismatch/mean"])
    difference = Figure("|log-prob difference| trainer − vLLM, nats", differences, beside=limits)
    names = ("token_mult_prob_error", "sequence_ratio_mean", "sequence_ratio_max", "sequence_ess")
    ratio = Figure("probability ratio trainer / vLLM", named(f"mismatch/{name}" for name in names))
    blocks = line_figure(rows, difference, log=True) + line_figure(rows, ratio)
    blocks += report_method.importance(rows, method)
    facts = []
    if warned := _warned_steps(rows):
        facts.append(("steps above the mean's warning limit", f"{len(warned)}, the first is {warned[0]}"))
    if "max_log_prob_difference" in summary:
        facts.append(("largest log-prob difference", f"{summary['max_log_prob_difference']:.2e}"))
    if "sync" in summary:
        facts.append(("weight sync, mean", f"{summary['sync']['seconds_mean']:.3f} s"))
        facts.append(("weights sent each sync", data_size(summary["sync"]["bytes"])))
        for name, seconds in summary["sync"].get("phase_seconds_mean", {}).items():
            facts.append((f"of a sync, {name}", f"{seconds:.3f} s"))
    return blocks + (page.table("Agreement and weight sync", ("what", "value"), facts) if facts else "")


def _warned_steps(rows: Rows) -> list[int]:
    """Steps whose mismatch was above mismatch.warn's limit."""
    return [step for step, warned in zip(*series(rows, "mismatch/warned"), strict=True) if warned]


def _machine(summary: Tree) -> str:
    memory, versions = summary.get("peak_memory_bytes", {}), summary.get("versions", {})
    if not memory and not versions:
        return page.missing("memory and versions are in summary.json, which is not there yet")
    phases = summary.get("peak_phase_bytes", {})
    return "".join(
        page.table(title, (what, "memory"), [(name, data_size(size)) for name, size in sizes.items()])
        for title, what, sizes in (
            ("Peak private memory", "process", memory),
            ("Peak memory of a rank by phase", "phase", phases),
        )
        if sizes
    ) + page.table("Versions", ("package", "version"), list(versions.items()))


def _recipe(recipe: Tree) -> str:
    if not recipe:
        return page.missing("recipe.yaml: not there")
    text = escape(yaml.safe_dump(recipe, sort_keys=False))
    return f'<details class="wide"><summary>recipe.yaml, resolved</summary><pre>{text}</pre></details>'


def _read_yaml(path: Path) -> Tree:
    return yaml.safe_load(path.read_text()) if path.is_file() else {}
