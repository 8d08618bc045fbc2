"""What is compared: methods, settings, seeds and learning rates on one recipe, and the recipe of each run.

A method is written as LABEL=NAME:KEY=VALUE,KEY=VALUE; the label and what follows the colon may be left out:

    grpo    apo-k4=apo:objective.samples_per_prompt=4    kernel=reinforce:objective.baseline.source=kernel
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_apo.config import Recipe, RecipeError, build_recipe
from megatron_apo.runtime.files import write_whole

FILE_NAME = "compare.json"
LOCK = ".lock"
FORMAT = 1
PREFLIGHT = "preflight"  # run.dir of what is checked before work
Setting = Literal["equal-prompts", "equal-samples"]

_METHOD = re.compile(r"(?:(?P<label>[A-Za-z][\w.+-]*)=)?(?P<name>\w+)(?::(?P<own>.+))?")
_OWN = ("objective.", "optimizer.", "vstar.")  # sections that may differ between methods
_OWN_KEYS = ("train.minibatches", "train.importance", "train.importance_cap", "train.streamed")
_NOT_OWN = ("objective.name", "optimizer.lr", "vstar.dir", "vstar.filter", "vstar.success_rate")  # these choose prompts


@dataclass(frozen=True)
class Method:
    """label: by which it is shown, and its folder. own: its KEY=VALUE."""

    label: str
    name: str
    own: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Method:
        """Raises a ValueError of one line."""
        match = _METHOD.fullmatch(text)
        if not match:
            raise ValueError(f"--methods: {text!r} is no method; write NAME, or LABEL=NAME:SECTION.KEY=VALUE,...")
        # a comma parts settings where a key follows it: a value may have some of its own
        own = tuple(re.split(r",(?=[a-z_]+\.[\w.]+=)", match["own"])) if match["own"] else ()
        for setting in own:
            key, equals, _ = setting.partition("=")
            may_differ = key.startswith(_OWN) and key not in _NOT_OWN or key in _OWN_KEYS
            if not equals or not may_differ:
                raise ValueError(
                    f"--methods: {setting!r} of {text!r} is not a method's own; give keys of objective, optimizer "
                    f"(but its lr), vstar (but its dir, and filters of prompts), or {', '.join(_OWN_KEYS)}; put others "
                    "after the options"
                )
        return cls(match["label"] or match["name"], match["name"], own)


@dataclass(frozen=True)
class Job:
    """One run that there is to be. is_trial: of a learning rate, and no result."""

    setting: Setting
    method: Method
    seed: int
    rate: float
    is_trial: bool = False

    @property
    def folder(self) -> Path:
        """Below the comparison's; its attempts are in there."""
        own = f"rate-{self.rate:g}" if self.is_trial else f"seed-{self.seed}"
        return Path(self.setting) / self.method.label / own


@dataclass(frozen=True)
class Plan:
    """recipe: what all runs share, resolved. rates: learning rates to choose from by trials; of one there are none."""

    recipe: dict[str, Any]
    methods: tuple[Method, ...]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    trial_steps: int
    trial_seed: int
    attempts: int  # of one run, at most

    @classmethod
    def parse(
        cls,
        recipe: Recipe,
        methods: str,
        settings: str,
        seeds: str,
        rates: str | None,
        trial_steps: int,
        trial_seed: int,
        attempts: int,
    ) -> Plan:
        """Of a command's words, which spaces part. Raises `RecipeError` with a line for each that is none."""
        found: list[str] = []

        def read(key: str, text: str, kind: type, allowed: str) -> list[Any]:
            values = []
            for word in text.split():
                try:
                    values.append(kind(word))
                    if not 0 <= values[-1] < float("inf"):
                        raise ValueError
                except ValueError:
                    found.append(f"{key}: {word!r} is not allowed; use {allowed}")
            return values

        parsed = []
        for word in methods.split():
            try:
                parsed.append(Method.parse(word))
            except ValueError as error:
                found.append(str(error))
        lr = recipe.optimizer.lr
        usual = " ".join(f"{factor * lr:.2g}" for factor in (1 / 3, 1, 3))
        read_seeds = read("--seeds", seeds, int, 'whole numbers from 0, as "0 1 2"')
        read_rates = read("--rates", rates or usual, float, 'learning rates, as "1e-4 2e-4 4e-4"')
        for word in settings.split():
            if word not in get_args(Setting):
                found.append(f"--settings: {word!r} is not allowed; use {' or '.join(get_args(Setting))}")
        labels = [method.label for method in parsed]
        for key, values in (("--methods", labels), ("--seeds", read_seeds), ("--settings", settings.split())):
            if not values and not any(line.startswith(key) for line in found):
                found.append(f"{key}: nothing there; give at least one")
            for value in sorted({value for value in values if values.count(value) > 1}):
                fix = ", or a label, as grpo-8=grpo:objective.samples_per_prompt=8" if key == "--methods" else ""
                found.append(f"{key}: {value} is there twice; give it once{fix}")
        if trial_seed in read_seeds:
            found.append(f"--trial-seed: {trial_seed} is one of --seeds, whose results would be tuned on; use another")
        if found:
            raise RecipeError(found)
        return cls(
            recipe.model_dump(mode="json"),
            tuple(parsed),
            tuple(settings.split()),  # type: ignore[arg-type]
            tuple(read_seeds),
            tuple(dict.fromkeys(read_rates)),
            trial_steps,
            trial_seed,
            attempts,
        )

    @property
    def target(self) -> float | None:
        """The reward that runs are timed to."""
        return self.recipe["train"]["target_reward"]

    def window(self, setting: Setting, method: Method) -> int:
        """Steps of `train.target_responses`, whose mean reward stands for that of the last one: no method is nearer to
        a target by the chance of few responses."""
        return self.recipe_of(Job(setting, method, self.seeds[0], self.rates[0]), Path(PREFLIGHT)).target_window

    def recipe_of(self, job: Job, run_dir: Path) -> Recipe:
        """Raises `RecipeError`."""
        shared = [f"objective.name={job.method.name}", f"run.dir={run_dir}", f"run.seed={job.seed}"]
        shared += ["eval.overlapped=false", "vstar.at_start=false"]  # nobody's time has another's work in it
        shared += [f"optimizer.lr={job.rate!r}", *job.method.own]
        if job.is_trial:  # nothing is said of its evaluations
            shared += [f"train.steps={self.trial_steps}", "train.target_reward=null", "train.max_minutes=null"]
            shared += ["eval.every=0", "eval.samples=1", "eval.max_prompts=1"]
        recipe = build_recipe(self.recipe, shared)
        responses, samples = recipe.train.prompts_per_step, recipe.objective.samples_per_prompt
        if job.setting == "equal-prompts" or samples == 1:
            return recipe
        if responses % samples:
            raise RecipeError(
                [
                    f"train.prompts_per_step: {responses} responses a step do not divide by "
                    f"objective.samples_per_prompt={samples}; use a multiple of {samples}"
                ]
            )
        return build_recipe(self.recipe, [*shared, f"train.prompts_per_step={responses // samples}"])

    def trials(self, setting: Setting) -> list[Job]:
        """In the order in which they are run; none where there is nothing to choose."""
        if len(self.rates) == 1:
            return []
        return [Job(setting, method, self.trial_seed, rate, True) for rate in self.rates for method in self.methods]

    def jobs(self, setting: Setting, seed: int, rates: Mapping[str, float]) -> list[Job]:
        """A seed's, in the order in which they are run: each seed begins with another method."""
        first = self.seeds.index(seed) % len(self.methods)
        order = self.methods[first:] + self.methods[:first]
        return [Job(setting, method, seed, rates[method.label]) for method in order]

    def problems(self, out: Path, check: Any) -> list[str]:
        """What keeps runs from starting, one line each, with the label of a method where it is not of all.

        check: a recipe -> lines, asked where all recipes can be read.
        """
        recipes, said = dict[Job, Recipe](), dict[str, list[str]]()

        def tell(job: Job, lines: Sequence[str]) -> None:
            for line in lines:
                said.setdefault(line, []).append(job.method.label)

        places = product(self.settings, self.methods, self.rates)
        runs = [Job(setting, method, self.seeds[0], rate) for setting, method, rate in places]
        for job in [*runs, *(trial for setting in self.settings for trial in self.trials(setting))]:
            try:
                recipes[job] = self.recipe_of(job, out / PREFLIGHT)
            except RecipeError as error:
                tell(job, error.problems)
        if replay := self.recipe["train"]["replay"]:
            line = f"train.replay: {replay} samples nothing; leave it out, each method samples"
            said[line] = [method.label for method in self.methods]
        if not said:
            for job, recipe in recipes.items():
                if job.rate == self.rates[0] and not job.is_trial:  # which the others differ from in what is not asked
                    tell(job, check(recipe))
        labels = {method.label for method in self.methods}
        return [line if set(of) == labels else f"{', '.join(dict.fromkeys(of))}: {line}" for line, of in said.items()]

    def check(self, out: Path) -> None:
        """Hold the plan against OUT/compare.json, if that is there. Seeds may have been added.

        Raises `RecipeError`, a line for each field that differs.
        """
        path, own = out / FILE_NAME, self._tree()
        if not path.is_file():
            if out.exists() and any(one for one in out.iterdir() if one.name not in (PREFLIGHT, LOCK)):
                raise RecipeError([f"--out: {out} is not empty and no comparison; give a new folder"])
            return
        theirs = json.loads(path.read_text())
        with suppress(RecipeError):  # whose keys are no more: the lines below name them
            theirs["recipe"] = build_recipe(theirs["recipe"], []).model_dump(mode="json")  # and keys that came since
        fields = [one for one in differences(own, theirs) if one[0] != "seeds"]
        if own["seeds"][: len(theirs["seeds"])] != theirs["seeds"]:
            fields.append(("seeds", own["seeds"], theirs["seeds"]))
        if fields:
            raise RecipeError(
                [
                    f"{key}: {ours!r}, but the comparison in {out} has {other!r}; set it back or give another --out"
                    for key, ours, other in fields
                ]
            )

    def keep(self, out: Path) -> None:
        """Write OUT/compare.json."""
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / FILE_NAME, json.dumps(self._tree(), indent=1) + "\n")

    def _tree(self) -> dict[str, Any]:
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}))


def differences(ours: Any, theirs: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, ours, theirs) of what two trees of JSON differ in; a list is a whole."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [(key, ours, theirs)]
    found: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*ours, *theirs]):
        found += differences(ours.get(name), theirs.get(name), f"{key}.{name}".lstrip("."))
    return found


def best_rate(scores: Sequence[tuple[float, float | None]]) -> float | None:
    """Of (learning rate, score) the rate of the highest score, the lower one of equals; None where all have failed."""
    known = sorted((-score, rate) for rate, score in scores if score is not None)
    return known[0][1] if known else None
