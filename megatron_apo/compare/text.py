"""The results as words and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from megatron_apo.compare.campaign import MOST_DEVIATION, Attempt
from megatron_apo.compare.plan import Plan, Setting
from megatron_apo.compare.results import Line
from megatron_apo.compare.statistics import LEAST_SEEDS, Estimate

NOTHING = "-"

Tell = Callable[[float], str]


def number(value: float) -> str:
    """ "0.84", "12.3", "4,096"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(value: float) -> str:
    return f"{value:.3f}"


def difference(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # no -0.000


def estimate(found: Estimate | None, tell: Tell = number, of: int = 0) -> str:
    """ "2.1 [1.7, 2.6]" with an interval, "2.1 (1.7 to 2.6)" with a range, ">= 2.1" of a bound, and ", 3 seeds" where
    it is of fewer than `of`."""
    if found is None or found.value is None:
        return NOTHING
    if found.count < of:
        return f"{estimate(found, tell)}, {found.count} seed{'s' * (found.count > 1)}"
    value = tell(found.value)
    if found.kind in ("at least", "at most"):
        return f"{'>=' if found.kind == 'at least' else '<='} {value}"
    if found.low is None or found.high is None or found.count == 1:
        return value
    low, high = tell(found.low), tell(found.high)
    return f"{value} [{low}, {high}]" if found.kind == "interval" else f"{value} ({low} to {high})"


def headline(plan: Plan, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of results."""
    head, rows = ["method", "rate"], []
    if plan.target is not None:
        head += ["reached", "s to target", "of these stage 1", "x first", "x, steps alone"]
        head += ["x, steps in evaluations", "samples", "tokens"]
    head += ["reward at equal time", "final held-out", "over prompts"]
    head += ["above first", "above first, over prompts", "KL", "s a step"]
    for line in lines:
        seeds, row = len(line.runs), [line.label, f"{line.rate:g}"]
        if plan.target is not None:
            got = [run.target.step for run in line.runs if run.target and run.target.step]
            row += [
                f"{len(got)} of {seeds}",
                estimate(line.seconds, of=seeds),
                number(line.stage_1.seconds) if line.stage_1.samples else NOTHING,
                estimate(line.ratio, of=seeds),
                estimate(line.ratio_of_steps, of=seeds),
                estimate(line.ratio_by_evaluations, of=seeds),
                estimate(line.samples, of=seeds),
                estimate(line.tokens, of=seeds),
            ]
        row += [
            estimate(line.at_equal_time, share, seeds),
            estimate(line.final, share, seeds),
            _range(line.final_of_prompts),
            estimate(line.gained, difference, seeds),
            _range(line.gained_of_prompts),
            estimate(line.kl, of=seeds),
            estimate(line.step_s, of=seeds),
        ]
        rows.append(row)
    return head, rows


def phases(lines: Sequence[Line], kind: str) -> tuple[list[str], list[list[str]]]:
    """Seconds of a run by phase, means over seeds. kind: wall_s or cpu_s."""
    found = {line.label: getattr(line, kind) for line in lines if line.runs}
    names = dict.fromkeys(name for one in found.values() for name in one)
    rows = [[name, *(f"{one.get(name, 0.0):,.1f}" for one in found.values())] for name in names]
    rows.append(["all", *(f"{sum(one.values()):,.1f}" for one in found.values())])
    if kind == "wall_s":
        own = [line.stage_1.seconds if line.stage_1.samples else None for line in lines if line.runs]
        rows.append(["stage 1, once for all of a store", *(NOTHING if one is None else f"{one:,.1f}" for one in own)])
    return ["phase", *found], rows


def trials(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """All trials of learning rates; the chosen one has a star."""
    head = ["method", "rate", "reward at its end", "s of steps", "folder"]
    rows = [
        [
            line.label,
            f"{trial.rate:g}{' *' if trial.rate == line.rate else ''}",
            "failed" if trial.score is None else share(trial.score),
            number(trial.seconds),
            trial.folder,
        ]
        for line in lines
        for trial in line.trials
    ]
    return head, rows


def runs(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Every run, also those that do not count, and the machine's reference around it."""
    head = ["method", "seed", "attempt", "sitting", "reference before", "after", "target at step", "final", "what"]
    rows = []
    for line in lines:
        for run in line.runs:
            for one in run.attempts:
                counts = one.number == run.attempt
                step = (run.target.step or "missed") if run.target else NOTHING
                noisy = f", reference off by {run.deviation:.0%}" if run.deviation > MOST_DEVIATION else ""
                rows.append(
                    [
                        line.label,
                        str(run.seed),
                        str(one.number),
                        one.sitting,
                        *(f"{seconds:.2f} s" for seconds in one.reference_s or ()),
                        str(step) if counts else NOTHING,
                        share(run.final) if counts and run.final is not None else NOTHING,
                        ("failed, " if one.failure else "") + (f"counts{noisy}" if counts else "does not count"),
                    ]
                )
    return head, rows


def notes(plan: Plan, setting: Setting, lines: Sequence[Line]) -> list[str]:
    """What the table does not say of itself."""
    prompts = plan.recipe["train"]["prompts_per_step"]
    each = f"{prompts} prompts" if setting == "equal-prompts" else f"{prompts} responses"
    num_seeds = max((len(line.runs) for line in lines), default=0)
    windows = ", ".join(f"{line.label} {line.window} step{'s' * (line.window > 1)}" for line in lines)
    found = [f"Each method takes {each} a step, of the same prompts in the same order."]
    if plan.target is not None:
        found.append(
            f"The target is a mean training reward of {plan.target:g} over the last "
            f"{plan.recipe['train']['target_responses']} responses, rounded up to whole steps ({windows}; none can be "
            "there sooner). Seconds, samples and "
            "tokens have the store's whole stage 1 in them where a method asks for it; a step's time has no start, "
            "evaluation or save in it. A run that missed the target counts with what it spent, which is a bound. While "
            "the reward rises, a mean over more steps reaches the target later."
        )
        if any(line.ratio_by_evaluations for line in lines):
            found.append(
                "Steps in evaluations: each run's seconds divided by those of an evaluation of its own, which tells "
                "how fast the machine was in that run, where the methods' responses are of about the same length."
            )
        if any(line.stage_1.samples for line in lines):
            found.append("Stage 1 was timed once, so no interval includes its error.")
    if num_seeds >= LEAST_SEEDS:
        spread = "[ , ]: 95 % over seeds, paired t on logarithms for ratios."
    elif num_seeds > 1:
        spread = f"( to ): the range over {num_seeds} seeds, which are too few for an interval."
    else:
        spread = "One seed has neither interval nor range."
    found.append(f"{spread} Of final reward over prompts: 95 % by bootstrap.")
    if failed := [f"{line.label} of seed {run.seed}" for line in lines for run in line.runs if run.failure]:
        found.append(
            f"Failed: {', '.join(failed)}. Such a run counts in what is spent until the target, as a bound, and in "
            "nothing else."
        )
    for line in lines:
        if line.trials and all(trial.score is None for trial in line.trials):
            found.append(f"Every trial of {line.label} failed; its learning rate is the middle one.")
    for what in ("host", "sitting"):
        parted = [str(seed) for seed, of in _by_seed(lines).items() if len({getattr(one, what) for one in of}) > 1]
        if parted:
            found.append(f"Runs of several {what}s: those of seed {', '.join(parted)}.")
    return found


def _by_seed(lines: Sequence[Line]) -> dict[int, list[Attempt]]:
    """The attempts that count."""
    found: dict[int, list[Attempt]] = {}
    for line in lines:
        for run in line.runs:
            found.setdefault(run.seed, []).extend(one for one in run.attempts if one.number == run.attempt)
    return found


def tables(plan: Plan, setting: Setting, lines: Sequence[Line]) -> list[Table]:
    """For a terminal: the results, and seconds by phase."""
    found = [
        _table(setting, *turned(*headline(plan, lines))),
        _table("wall seconds of a run", *phases(lines, "wall_s")),
        _table("CPU seconds of a run", *phases(lines, "cpu_s")),
    ]
    return [table for table in found if table.row_count]


def turned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Methods beside each other: a page is narrower than what there is to say of one."""
    first, *others = (list(column) for column in zip(head, *rows, strict=True))
    return first, others


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=None, title_justify="left")
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _range(found: tuple[float, float] | None) -> str:
    return NOTHING if found is None else f"[{found[0]:.3f}, {found[1]:.3f}]"
