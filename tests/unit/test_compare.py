"""What a comparison runs, in which order, what it refuses, and what counts: on runs that are written by hand."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_apo.compare import command, text, workload
from megatron_apo.compare.campaign import Attempt, Campaign, to_repeat
from megatron_apo.compare.measured import Curve, Measured, Stage1, Target, cpu_phases, wall_phases
from megatron_apo.compare.page import band, write_page
from megatron_apo.compare.plan import Job, Method, Plan
from megatron_apo.compare.results import Run, results, with_equal_time, write_results
from megatron_apo.compare.statistics import Cost
from megatron_apo.compare.workload import reference_s
from megatron_apo.config import Recipe, RecipeError, build_recipe
from megatron_apo.runtime import launch
from megatron_apo.telemetry.samples import EvaluatedPrompt, write_samples
from megatron_apo.telemetry.summary import RunSummary
from megatron_apo.values.store import VStarStore
from tests.runs import write_run


def base(*overrides: str) -> Recipe:
    tree = {"model": {"path": "m"}, "data": {"train": "t.jsonl", "eval": "e.jsonl"}, "vstar": {"dir": "v"}}
    shared = [
        "train.prompts_per_step=32",
        "train.minibatches=1",
        "train.target_reward=0.5",
        "train.target_responses=64",
    ]
    return build_recipe(tree, ["optimizer.lr=3e-4", *shared, *overrides])


def plan_of(methods: str = "apo grpo", recipe: Recipe | None = None, **changes) -> Plan:
    words = {"settings": "equal-prompts", "seeds": "0 1", "rates": "1e-4", "trial_steps": 3, "trial_seed": 1000}
    return Plan.parse(recipe or base(), methods=methods, **(words | {"attempts": 3} | changes))


def lines_of(methods: str = "apo", **changes) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        plan_of(methods, **changes)
    return caught.value.problems


def test_a_method_is_a_name_with_a_label_and_settings_of_its_own() -> None:
    assert Method.parse("grpo") == Method("grpo", "grpo")
    text = "kernel=reinforce:objective.baseline.source=kernel,optimizer.x=[0.1,0.9],train.streamed=true"
    own = ("objective.baseline.source=kernel", "optimizer.x=[0.1,0.9]", "train.streamed=true")
    assert Method.parse(text) == Method("kernel", "reinforce", own)
    assert Method.parse("apo:objective.beta2=0.01").label == "apo"


@pytest.mark.parametrize(
    "own",
    [
        "sampling.temperature=2",
        "optimizer.lr=1",
        "vstar.dir=x",
        "objective.name=ppo",
        "objective.beta2",
        "train.steps=3",
        "vstar.filter=both",
        "vstar.success_rate=[0.1,0.9]",
    ],
)
def test_what_all_share_is_no_methods_own(own: str) -> None:
    (line,) = lines_of(f"apo:{own}")
    assert line.startswith(f"--methods: {own!r} of ") and "optimizer (but its lr)" in line


def test_all_mistakes_of_the_command_line_are_said_at_once() -> None:
    found = lines_of("apo apo a==b", seeds="0 -1 0", settings="equal", rates="1e-4 fast", trial_seed=0)
    keys = [line.split(":")[0] for line in found]
    assert sorted(keys) == ["--methods", "--methods", "--rates", "--seeds", "--seeds", "--settings", "--trial-seed"]
    assert lines_of(" ", seeds="") == [
        "--methods: nothing there; give at least one",
        "--seeds: nothing there; give at least one",
    ]


def test_the_settings_share_prompts_or_responses() -> None:
    plan = plan_of("apo grpo", base("eval.overlapped=true"), settings="equal-prompts equal-samples")
    sizes = {
        (setting, method.label): plan.recipe_of(Job(setting, method, 7, 2e-5), Path("run")).train.prompts_per_step
        for setting in plan.settings
        for method in plan.methods
    }
    grpo, apo = "grpo", "apo"
    prompts, samples = plan.settings
    assert sizes == {(prompts, apo): 32, (prompts, grpo): 32, (samples, apo): 32, (samples, grpo): 4}
    recipe = plan.recipe_of(Job(prompts, plan.methods[1], 7, 2e-5), Path("run"))
    assert (recipe.run.seed, recipe.run.dir, recipe.optimizer.lr) == (7, Path("run"), 2e-5)
    assert recipe.objective.name == "grpo" and recipe.train.target_reward == 0.5
    assert not recipe.eval.overlapped, "its engines would be at work in a method's time"
    trial = plan.recipe_of(Job(prompts, plan.methods[1], 7, 2e-5, is_trial=True), Path("run"))
    assert (trial.train.steps, trial.train.target_reward, trial.eval.samples) == (3, None, 1)


def test_problems_of_all_methods_are_said_together_each_once(tmp_path: Path) -> None:
    plan = plan_of("apo x=nonsense g=grpo:objective.samples_per_prompt=5", settings="equal-samples")
    found = plan.problems(tmp_path, lambda recipe: pytest.fail("not before all recipes can be read"))
    assert len(found) == 2 and found[0].startswith("x: objective.name: 'nonsense' is not allowed; use one of 'apo'")
    assert found[1] == (
        "g: train.prompts_per_step: 32 responses a step do not divide by objective.samples_per_prompt=5; "
        "use a multiple of 5"
    )
    plan = plan_of("apo grpo ppo")
    said = {"apo": ["no store", "no model"], "grpo": ["no model"], "ppo": ["no critic", "no model"]}
    found = plan.problems(tmp_path, lambda recipe: said[recipe.objective.name])
    assert found == ["apo: no store", "no model", "ppo: no critic"]


def test_rates_and_replays_are_refused_before_work(tmp_path: Path) -> None:
    plan = plan_of(recipe=base("optimizer.min_lr=2e-4", "optimizer.schedule=cosine"), rates="3e-4 1e-4")
    (line,) = plan.problems(tmp_path, lambda recipe: [])
    assert line.startswith("optimizer.min_lr: 0.0002")
    plan = plan_of(recipe=base("train.target_reward=null", "train.replay=batches"))
    assert plan.problems(tmp_path, lambda recipe: pytest.fail("nothing else is asked")) == [
        "train.replay: batches samples nothing; leave it out, each method samples"
    ]
    plan, asked = plan_of("apo grpo", rates="1e-4 2e-4 4e-4"), []
    assert plan.problems(tmp_path, lambda recipe: asked.append(recipe.objective.name) or []) == []
    assert asked == ["apo", "grpo"]


def test_a_method_of_more_responses_is_judged_by_fewer_steps() -> None:
    plan = plan_of("apo grpo k=grpo:objective.samples_per_prompt=2", settings="equal-prompts equal-samples")
    found = [[plan.window(setting, method) for method in plan.methods] for setting in plan.settings]
    assert found == [[2, 1, 1], [2, 2, 2]]


def test_each_seed_begins_with_another_method_and_trials_go_rate_by_rate() -> None:
    plan = plan_of("apo grpo ppo", seeds="4 5 6 9", rates=None)
    rates = dict.fromkeys(("apo", "grpo", "ppo"), 1e-4)
    order = [[job.method.label for job in plan.jobs("equal-prompts", seed, rates)] for seed in plan.seeds]
    assert order == [["apo", "grpo", "ppo"], ["grpo", "ppo", "apo"], ["ppo", "apo", "grpo"], ["apo", "grpo", "ppo"]]
    assert plan.rates == (1e-4, 3e-4, 9e-4)
    trials = plan.trials("equal-prompts")
    assert [job.rate for job in trials] == [1e-4] * 3 + [3e-4] * 3 + [9e-4] * 3
    assert {job.seed for job in trials} == {1000} and all(job.is_trial for job in trials)
    assert plan_of(rates="1e-4").trials("equal-prompts") == []


def test_another_plan_is_refused_by_the_field_and_seeds_may_be_added(tmp_path: Path) -> None:
    plan_of().keep(tmp_path / "c")
    plan_of(seeds="0 1 2").check(tmp_path / "c")
    for changed, key in (
        (plan_of("apo ppo"), "methods"),
        (plan_of(seeds="1 0"), "seeds"),
        (plan_of(seeds="0"), "seeds"),
        (plan_of(rates="2e-4"), "rates"),
        (plan_of(recipe=base("train.target_responses=96")), "recipe.train.target_responses"),
        (plan_of(recipe=base("sampling.temperature=0.5")), "recipe.sampling.temperature"),
    ):
        with pytest.raises(RecipeError) as caught:
            changed.check(tmp_path / "c")
        assert [line.split(":")[0] for line in caught.value.problems] == [key]
    stored = json.loads((tmp_path / "c" / "compare.json").read_text())
    # as of a version that had not this key: its value was the default
    del stored["recipe"]["train"]["target_responses"]
    (tmp_path / "c" / "compare.json").write_text(json.dumps(stored))
    plan_of(recipe=base("train.target_responses=512")).check(tmp_path / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RecipeError, match="not empty and no comparison"):
        plan_of().check(tmp_path / "other")


# ---- what a run has spent

ROWS = [
    {"step": 0, "time": 130.0, "eval/avg_at_k": 0.1, "eval/seconds": 10.0, "eval/cpu_s": 15.0},
    *(
        {
            "step": step,
            "time": 130.0 + 4 * step,
            "reward/drawn": reward,
            "prompts/drawn": drawn,
            "tokens/drawn": 10 * drawn,
            "time/generate_s": 2.0,
            "time/train_s": 1.0,
            "time/step_s": 4.0,
            "cpu/generate_s": 3.0,
            "cpu/train_s": 2.0,
            "cpu/step_s": 6.0,
            "kl/per_sequence": 0.1 * step,
        }
        for step, reward, drawn in ((1, 0.2, 8), (2, 0.4, 16), (3, None, 8), (4, 0.6, 8))
    ),
    {"step": 4, "time": 160.0, "eval/avg_at_k": 0.5, "eval/seconds": 10.0, "eval/cpu_s": 15.0},
]


def test_the_phases_of_a_command_add_up_to_its_time() -> None:
    """Started at 100 s: 20 s until the first evaluation; 16 s of steps, 20 s of evaluations, and 9 s in between and
    at the end."""
    found = wall_phases(ROWS, launched=100.0, total_s=65.0)
    assert found == {
        "start-up": 20.0,
        "generate": 8.0,
        "train": 4.0,
        "other of steps": 4.0,
        "evaluation": 20.0,
        "between steps and end": 9.0,
    }
    assert cpu_phases(ROWS, 80.0) == {
        "start-up, between steps and end": 26.0,
        "generate": 12.0,
        "train": 8.0,
        "other of steps": 4.0,
        "evaluation": 30.0,
    }
    assert wall_phases([], 0.0, 5.0) == {"start-up": 5.0}


def test_generation_beside_the_trainer_is_in_no_phase_twice() -> None:
    """8 s of generation, of which the trainer waited for 5."""
    times = {"generate": 8.0, "wait": 5.0, "reference": 2.0, "train": 3.0, "optimizer": 0.5, "step": 11.0}
    row = {"step": 1, "time": 121.0, **{f"time/{name}_s": seconds for name, seconds in times.items()}}
    found = wall_phases([row], launched=100.0, total_s=25.0)
    assert found["generate"] == 0 and found["wait"] == 5 and found["other of steps"] == 0.5
    assert found["start-up"] == 10 and found["between steps and end"] == 4


def test_a_target_costs_what_all_steps_until_it_drew_and_stage_1() -> None:
    curve = Curve.of(ROWS, samples_per_prompt=4)
    assert curve == Curve([0.2, 0.4, None, 0.6], [4, 8, 12, 16], [32, 96, 128, 160], [80, 240, 320, 400])
    found = Target.of(curve, Stage1(100.0, 1000, 5000), 0.5, 2)
    costs = (Cost(16, False), Cost(116, False), Cost(1160, False), Cost(5400, False))
    assert found == Target(4, *costs)
    missed = Target.of(curve, Stage1(), 0.9, 2)
    assert missed == Target(None, Cost(16, True), Cost(16, True), Cost(160, True), Cost(400, True))
    assert Target.of(curve, Stage1(), 0.3, 2).seconds == Cost(8, False)
    assert curve.smoothed(2) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert [curve.reward_at(seconds, 2) for seconds in (3.9, 8.0)] == [None, pytest.approx(0.3)]


# ---- which attempts count


def write_attempt(
    campaign: Campaign,
    job: Job,
    number: int,
    before: float,
    after: float,
    rewards: Sequence[float] = (),
    failed=0,
    evaluation_s=10.0,
) -> Path:
    """An ended run of steps of 4 s; its two held-out prompts have the last reward, one a little more and one less.
    failed: its exit code. evaluation_s: of its first evaluation, whose last took longer."""
    folder = campaign.out / job.folder / f"attempt-{number}"
    campaign.plan.recipe_of(job, folder).save(folder / "recipe.yaml")
    rows = [{**ROWS[0], "eval/seconds": evaluation_s}]
    rows += [{**ROWS[1], "step": step, "reward/drawn": reward} for step, reward in enumerate(rewards, 1)]
    rows += [{**ROWS[-1], "step": len(rewards), "eval/seconds": 1.4 * evaluation_s}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if rewards and not failed and not job.is_trial:
        spread = 0.2 if job.method.label == "grpo" else -0.1
        ids = ("p", "q") if spread > 0 else ("q", "p")
        means = {"p": rewards[-1] + spread, "q": rewards[-1] - spread}
        write_samples(
            folder, len(rewards), [EvaluatedPrompt(one, "", "q", "a", means[one], "r", "stop", 1.0) for one in ids]
        )
        RunSummary(folder).add({"pass_at_1": {"after": {"mean": rewards[-1], "greedy": 1.0}}})
    references = None if job.is_trial else (before, after)
    attempt = Attempt(number, "now", "here", 100.0, 90.0, 120.0, references, "why" if failed else None, failed)
    (folder / "attempt.json").write_text(json.dumps(asdict(attempt)))
    return folder


def campaign_of(plan: Plan, out: Path) -> Campaign:
    return Campaign(plan, out, lambda line: None, lambda campaign: None)


def test_the_attempt_whose_reference_is_nearest_counts_whatever_it_found(tmp_path: Path) -> None:
    campaign = campaign_of(plan_of("apo grpo ppo"), tmp_path)
    jobs = campaign.plan.jobs("equal-prompts", 0, dict.fromkeys(("apo", "grpo", "ppo"), 1e-4))
    write_attempt(campaign, jobs[0], 1, 2.0, 2.0)
    write_attempt(campaign, jobs[1], 1, 2.0, 2.5, [0.9])
    write_attempt(campaign, jobs[2], 1, 2.0, 2.28)
    found = campaign.counted(jobs)
    assert [one.deviation for one in found] == pytest.approx([0.0, 0.25, 0.14])
    assert to_repeat(found, most=3) == [jobs[1]]
    assert to_repeat(found, most=1) == []
    write_attempt(campaign, jobs[1], 2, 2.0, 2.02, [0.1])
    (found,) = campaign.counted(jobs[1:2])
    assert found.counts.number == 2 and len(found.attempts) == 2
    assert to_repeat(campaign.counted(jobs), most=3) == []


def test_what_is_there_is_not_run_again_and_what_broke_off_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is an attempt that writes rewards of its own; the second is slow, and interrupted the first time."""
    plan = plan_of("apo grpo", seeds="0", rates="1e-4 2e-4")
    ran: list[str] = []

    def run(campaign: Campaign, job: Job) -> None:
        own = campaign.out / job.folder
        number = len(list(own.glob("attempt-*"))) + 1
        ran.append(str(own.relative_to(tmp_path) / str(number)))
        is_slow = not job.is_trial and job.method.label == "grpo"
        if is_slow and number == 1:
            (own / "attempt-1").mkdir(parents=True)
            raise KeyboardInterrupt
        score = 0.5 if job.is_trial and job.rate == 2e-4 else 0.4
        write_attempt(campaign, job, number, 2.0, 3.0 if is_slow and number == 2 else 2.0, [score])

    monkeypatch.setattr(Campaign, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        campaign_of(plan, tmp_path).run()
    folder = "equal-prompts"
    trials = [f"{folder}/{label}/rate-{rate}/1" for rate in ("0.0001", "0.0002") for label in ("apo", "grpo")]
    assert ran == [*trials, f"{folder}/apo/seed-0/1", f"{folder}/grpo/seed-0/1"]
    ran.clear()
    campaign = campaign_of(plan, tmp_path)
    campaign.run()
    assert ran == [f"{folder}/grpo/seed-0/2", f"{folder}/grpo/seed-0/3"]
    assert campaign.rates("equal-prompts") == {"apo": 2e-4, "grpo": 2e-4}
    (job,) = [
        job for job in plan.jobs("equal-prompts", 0, campaign.rates("equal-prompts")) if job.method.label == "grpo"
    ]
    assert [one.number for one in campaign.attempts(job)] == [2, 3]


def test_trials_that_failed_are_no_choice(tmp_path: Path) -> None:
    campaign = campaign_of(plan_of("apo grpo", rates="1e-4 2e-4 4e-4"), tmp_path)
    for job in campaign.plan.trials("equal-prompts"):
        is_failed = job.method.label == "grpo" or job.rate == 4e-4
        write_attempt(campaign, job, 1, 0, 0, [0.1, 0.5 if job.rate < 4e-4 else 0.9], failed=int(is_failed))
    assert campaign.rates("equal-prompts") == {"apo": 1e-4, "grpo": 2e-4}  # of equals the lower; the middle one


def test_chosen_rates_outlive_their_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that is removed must not turn the runs of the rate it chose into another's."""

    def run(campaign: Campaign, job: Job) -> None:
        write_attempt(campaign, job, 1, 2.0, 2.0, [job.rate])

    monkeypatch.setattr(Campaign, "_run", run)
    campaign = campaign_of(plan_of("apo", seeds="0", rates="1e-4 2e-4"), tmp_path)
    campaign.run()
    shutil.rmtree(tmp_path / "equal-prompts/apo/rate-0.0002")
    again = campaign_of(campaign.plan, tmp_path)
    again.run()
    assert again.rates("equal-prompts") == {"apo": 2e-4} and not (tmp_path / "equal-prompts/apo/rate-0.0002").exists()


@pytest.mark.parametrize(
    ("codes", "most", "counts"), [([137, 76, 0], 3, 3), ([137, 76], 2, 1), ([1], 3, 1), ([2], 3, 1)]
)
def test_a_run_whose_rank_was_lost_is_tried_again(
    codes: list[int], most: int, counts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that said itself why it failed is not; trials as well. A lost one counts only where all were."""

    def run(campaign: Campaign, job: Job) -> None:
        number = len(campaign.attempts(job)) + 1
        write_attempt(campaign, job, number, 2.0, 2.0, [0.5], failed=codes[number - 1])

    monkeypatch.setattr(Campaign, "_run", run)
    campaign = campaign_of(plan_of("apo", seeds="0", rates="1e-4 2e-4", attempts=most), tmp_path)
    campaign.run()
    jobs = campaign.plan.jobs("equal-prompts", 0, campaign.rates("equal-prompts"))
    (found,) = campaign.counted(jobs)
    assert [one.exit_code for one in found.attempts] == codes and found.counts.number == counts
    for trial in campaign.plan.trials("equal-prompts"):
        assert [one.exit_code for one in campaign.attempts(trial)] == codes
        assert campaign.score(trial) == (0.5 if codes[-1] == 0 else None)


@pytest.mark.parametrize(("code", "is_kept"), [(1, True), (137, True), (76, True), (75, False), (130, False)])
def test_an_attempt_is_what_was_not_interrupted(
    code: int, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(arguments: Sequence[str], log: Path) -> None:
        raise launch.RankFailed("why", code)

    monkeypatch.setattr(launch, "run_command", train)
    monkeypatch.setattr(workload, "reference_s", lambda: 2.0)
    campaign = campaign_of(plan_of("apo", seeds="0", attempts=1), tmp_path)
    with nullcontext() if is_kept else pytest.raises(launch.RankFailed):
        campaign.run()
    (job,) = campaign.plan.jobs("equal-prompts", 0, campaign.rates("equal-prompts"))
    assert [(one.failure, one.exit_code) for one in campaign.attempts(job)] == [("why", code)] * is_kept


def test_no_two_commands_work_on_one_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    monkeypatch.setattr(Plan, "problems", lambda self, out, check: [])
    plan.keep(tmp_path)
    before = (tmp_path / "compare.json").read_bytes()
    with command.alone(tmp_path), pytest.raises(RecipeError, match="--out: .* is another command's"):
        command.run(plan_of(seeds="0 1 2"), tmp_path)
    assert (tmp_path / "compare.json").read_bytes() == before
    ran: list[Plan] = []
    monkeypatch.setattr(command, "_run", lambda plan, out: ran.append(plan))
    command.run(plan, tmp_path)
    fresh = tmp_path / "fresh"
    with command.alone(fresh):  # which has nothing but the lock
        pass
    command.run(plan, fresh)
    assert ran == [plan, plan]


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with command.alone(tmp_path):
        pass


def test_stage_1_is_told_as_the_seconds_of_a_runs_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers took an hour each; a run that has two engines of two workers would have taken half an hour."""
    monkeypatch.setattr(VStarStore, "hours", lambda store: {"one": 1.5, "another": 0.5})
    recipe = write_run(tmp_path, "rollout.replicas=2", "rollout.tp=2")
    found = Stage1.of(recipe)
    assert (found.seconds, found.samples, found.tokens) == (1800.0, 64 * 4, 64 * 4 * 9)
    assert Stage1.of(build_recipe(recipe.model_dump(), ["objective.name=grpo"])) == Stage1()


# ---- results


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Campaign, dict]:
    """Two seeds. A*-PO, with a store that took 2 s, reaches 0.5 at steps 2 and 3; GRPO at step 4, and never, on a
    machine that has become half as fast."""
    recipe = write_run(tmp_path / "made", "train.target_reward=0.5", "train.target_responses=8")
    monkeypatch.setattr(VStarStore, "hours", lambda store: {"one": 2 / 3600})
    campaign = campaign_of(plan_of(recipe=recipe), tmp_path / "out")
    rewards = {
        ("apo", 0): [0.1, 0.5],
        ("apo", 1): [0.1, 0.2, 0.6],
        ("grpo", 0): [0.0, 0.1, 0.2, 0.5],
        ("grpo", 1): [0.0, 0.0, 0.0, 0.1, 0.2, 0.3],
    }
    for seed in campaign.plan.seeds:
        for job in campaign.plan.jobs("equal-prompts", seed, dict.fromkeys(("apo", "grpo"), 1e-4)):
            label = job.method.label
            evaluation_s = 20.0 if label == "grpo" else 10.0
            write_attempt(campaign, job, 1, 2.0, 2.0, rewards[label, seed], evaluation_s=evaluation_s)
    return campaign, results(campaign)


def test_results_hold_the_methods_against_the_first(told: tuple[Campaign, dict]) -> None:
    campaign, found = told
    apo, grpo = found["equal-prompts"]
    assert apo.stage_1 == Stage1(pytest.approx(2.0), 64 * 4, 64 * 4 * 9)
    assert grpo.stage_1 == Stage1() and apo.ratio is None
    seconds = (apo.seconds.value, apo.seconds.low, apo.seconds.high)
    assert apo.seconds.kind == "range" and seconds == pytest.approx((12.0, 10.0, 14.0))
    assert (grpo.seconds.kind, grpo.seconds.value) == ("at least", 20.0)
    assert (grpo.ratio.kind, grpo.ratio.value) == ("at least", pytest.approx((16 / 10 * 24 / 14) ** 0.5))
    assert (grpo.ratio_of_steps.kind, grpo.ratio_of_steps.value) == ("at least", pytest.approx(2.0))  # 16 / 8, 24 / 12
    assert grpo.runs[0].measured.evaluation_s == pytest.approx(24.0)  # the mean of 20 and 28
    by_evaluations = grpo.ratio_by_evaluations
    assert (by_evaluations.kind, by_evaluations.value) == ("at least", pytest.approx(1.0))
    assert apo.samples.value == 256 + (2 + 3) / 2 * 8 and grpo.samples.value == (4 + 6) / 2 * 8 * 8
    assert [run.at_equal_time for run in grpo.runs] == [0.1, 0.0]  # after 10 s and 14 s
    assert apo.at_equal_time.value == pytest.approx(0.55)
    assert apo.final.value == pytest.approx(0.55) and apo.gained is None
    gained = (grpo.gained.value, grpo.gained.low, grpo.gained.high)
    assert grpo.gained.kind == "range" and gained == pytest.approx((-0.15, -0.3, 0.0))  # 0.5 - 0.5 and 0.3 - 0.6
    assert grpo.gained_of_prompts == pytest.approx((-0.15 - 0.3, -0.15 + 0.3))  # one prompt twice, or the other


def test_only_runs_of_the_same_seed_are_held_against_each_other(told: tuple[Campaign, dict]) -> None:
    campaign, _ = told
    shutil.rmtree(campaign.out / "equal-prompts/apo/seed-0")
    grpo = results(campaign)["equal-prompts"][1]
    assert grpo.gained.count == 1 and grpo.gained.value == pytest.approx(-0.3)
    assert grpo.ratio_of_steps.count == 1 and grpo.ratio_of_steps.value == pytest.approx(24 / 12)


def test_without_an_evaluation_nothing_is_said_by_evaluations(told: tuple[Campaign, dict]) -> None:
    campaign, _ = told
    for path in campaign.out.glob("equal-prompts/grpo/seed-0/*/metrics.jsonl"):
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "eval/seconds" not in line))
    grpo = results(campaign)["equal-prompts"][1]
    assert grpo.ratio_by_evaluations is None and grpo.ratio_of_steps.count == 2


def test_equal_time_has_stage_1_in_it() -> None:
    """A*-PO's store took 6 s, its steps end at 4, 8 and 12 s; GRPO has done its four at 16 s, and it two. PPO failed at
    its first."""

    def run(*rewards: float, failure: str | None = None) -> Run:
        curve = Curve(list(rewards), [4.0 * step for step in range(1, len(rewards) + 1)], [], [])
        return Run(0, "", [], 1, 0.0, failure, Measured(curve, {}, {}, {}, None, None), None, None)

    runs = {"apo": run(0.1, 0.2, 0.3), "grpo": run(0.0, 0.1, 0.1, 0.4), "ppo": run(0.9, failure="no")}
    stage_1, windows = {"apo": Stage1(6.0, 1, 1), "grpo": Stage1(), "ppo": Stage1()}, dict.fromkeys(runs, 1)
    found = with_equal_time(runs, stage_1, windows)
    assert [found[label].at_equal_time for label in runs] == [pytest.approx(0.2), pytest.approx(0.4), None]
    found = with_equal_time(runs, stage_1, windows | {"apo": 2})
    assert found["apo"].at_equal_time == pytest.approx(0.15)
    found = with_equal_time(runs, stage_1 | {"apo": Stage1(60.0, 1, 1)}, windows)
    assert found["apo"].at_equal_time is None and found["grpo"].at_equal_time == pytest.approx(0.4)
    failed = {"ppo": runs["ppo"]}
    assert with_equal_time(failed, stage_1, windows) == failed and with_equal_time({}, stage_1, windows) == {}


def test_tables_page_and_file_say_so(told: tuple[Campaign, dict]) -> None:
    campaign, found = told
    lines = found["equal-prompts"]
    head, rows = text.headline(campaign.plan, lines)
    of = [dict(zip(head, row, strict=True)) for row in rows]
    assert of[0]["reached"] == "2 of 2" and of[1]["reached"] == "1 of 2"
    assert of[0]["s to target"] == "12 (10 to 14)" and of[1]["s to target"] == ">= 20" and of[1]["x first"] == ">= 1.66"
    assert of[1]["x, steps alone"] == ">= 2" and of[1]["x, steps in evaluations"] == ">= 1"
    assert of[1]["above first"] == "-0.150 (-0.300 to +0.000)"
    assert of[1]["above first, over prompts"] == "[-0.450, 0.150]"
    notes = text.notes(campaign.plan, "equal-prompts", lines)
    assert [sum(note.startswith(begin) for note in notes) for begin in ("Steps in evaluations", "Stage 1")] == [1, 1]
    without = [replace(line, ratio_by_evaluations=None, stage_1=Stage1()) for line in lines]
    assert len(text.notes(campaign.plan, "equal-prompts", without)) == len(notes) - 2
    write_results(campaign, found)
    tree = json.loads((campaign.out / "results.json").read_text())["equal-prompts"]
    assert tree[1]["ratio"]["kind"] == "at least" and tree[1]["runs"][1]["target"]["step"] is None
    page = write_page(campaign, found).read_text()
    assert page.count("<svg") == 6 and "http" not in page and "does not count" not in page
    assert "reference before" in page and "&gt;= 20" in page


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_a_run_that_failed_is_censored_and_has_no_final_reward(is_evaluated: bool, told: tuple[Campaign, dict]) -> None:
    campaign, _ = told
    (job,) = [
        job for job in campaign.plan.jobs("equal-prompts", 0, {"apo": 1e-4, "grpo": 1e-4}) if job.method.label == "grpo"
    ]
    folder = write_attempt(campaign, job, 1, 2.0, 2.0, [0.1], failed=1)
    if not is_evaluated:
        for name in ("summary.json", "samples/step-000004.jsonl"):
            (folder / name).unlink()
    grpo = results(campaign)["equal-prompts"][1]
    assert grpo.runs[0].failure and grpo.runs[0].target.seconds == Cost(4.0, True) and grpo.runs[0].final is None
    assert grpo.final.count == grpo.gained.count == 1


def test_a_band_goes_as_far_as_all_seeds_do() -> None:
    at, mean, low, high = band([([1, 2, 3], [0.0, 0.2, 0.4]), ([1, 2, 3, 4], [0.2, 0.4, 0.6, 0.8])])
    assert (at[0], at[-1]) == (1, 3)
    assert (mean[-1], low[-1], high[-1]) == pytest.approx((0.5, 0.4, 0.6))


def test_the_reference_workload_takes_time() -> None:
    assert 0.05 < reference_s() < 60
