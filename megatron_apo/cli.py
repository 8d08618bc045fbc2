"""The command line. Each command reads its recipe and hands it to a stage; what is heavy is imported inside.

Mistakes of the user are one line without a traceback (`--debug` shows it); the epilog of `--help` has the exit codes.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import megatron_apo
from megatron_apo.config import EstimatorName
from megatron_apo.runtime.ending import EndedEarly, request
from megatron_apo.runtime.garbage import not_collected
from megatron_apo.runtime.job import is_below_node, is_later_rank, notice
from megatron_apo.runtime.signals import leave_sigterm_to_node, on_ask, unwind_on_sigterm

if TYPE_CHECKING:
    from megatron_apo.config import Recipe
    from megatron_apo.runtime.machine import Machine

DEBUG = "MEGATRON_APO_DEBUG"

app = typer.Typer(
    help="A*-PO: V* of a reference policy offline, then one regression per prompt online.",
    epilog="Exit codes: 0 done; 1 the run failed; 2 the command line or the recipe is wrong; 75 it was asked "
    "to end early, and has saved; 76 a rank was lost; 130 Ctrl-C; 143 SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(help="Convert weights, bit for bit.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")

RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="YAML recipe, or the name of a shipped one")]
HFOption = Annotated[Path, typer.Option("--hf", help="Hugging Face folder")]
MegatronOption = Annotated[
    Path, typer.Option("--megatron", help="Megatron checkpoint, or RUN/checkpoints/step-*; it holds pickles: trust it")
]
OutOption = Annotated[Path, typer.Option("--out", help="new folder")]
DtypeOption = Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="write this; default: as it is")]
RanksOption = Annotated[int | None, typer.Option(min=1, help="processes; default: one a core, at most 4")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="change the recipe")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(megatron_apo.__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG, help="show the traceback of any error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"  # ranks and workers are processes of their own


@app.command()
def quickstart(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="seeds the task, the model and the run")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the run; default: a new one under runs/")] = None,
) -> None:
    """Train a tiny model on arithmetic, end to end, without a GPU or a download."""
    from megatron_apo import quickstart as demonstration

    demonstration.run(seed, out, overrides or [])


@app.command()
def warmup(recipe: RecipeOption, overrides: Overrides = None) -> None:
    """Supervised warm start of warmup.start on warmup.data, exported to model.path."""
    loaded = _load(recipe, overrides)
    with not_collected():
        from megatron_apo.stages import start

    start.warmup(loaded)


@app.command("estimate-vstar")
def estimate_vstar(
    recipe: RecipeOption,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="workers that fill the store together; may change")] = 1,
    worker: Annotated[int, typer.Option(min=0, help="which of them this is, from 0")] = 0,
    merge: Annotated[bool, typer.Option("--merge", help="sample nothing: close a store with all its shards")] = False,
    check: Annotated[bool, typer.Option("--check", help="sample nothing: read the finished store whole")] = False,
) -> None:
    """Stage 1: sample the reference, grade, write the V* store. Samples only the shards that are not there."""
    loaded = _load(recipe, overrides)
    _check_worker(worker, workers)
    if merge and check:
        raise typer.BadParameter("--merge checks what it closes; give one of them", param_hint="--merge, --check")
    if merge or check:
        with not_collected():
            from megatron_apo.stages import estimate_vstar as stage

        (stage.merge if merge else stage.check)(loaded)
        return
    with not_collected():
        from megatron_apo.stages import start

    start.estimate_vstar(loaded, worker, workers)


@app.command()
def train(
    recipe: RecipeOption,
    overrides: Overrides = None,
    record: Annotated[bool, typer.Option("--record", help="keep each step's batch in RUN/rollouts")] = False,
    replay: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="train on recorded batches, without vLLM")
    ] = None,
) -> None:
    """Stage 2: train the policy against a V* store."""
    loaded = _load(recipe, overrides)
    loaded.train.record |= record
    loaded.train.replay = replay or loaded.train.replay
    with not_collected():
        from megatron_apo.stages import start

    start.train(loaded)


@app.command()
def serve(
    recipe: RecipeOption,
    overrides: Overrides = None,
    driver: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="where the training's rank 0 is; default: rollout.driver")
    ] = None,
    engines: Annotated[
        int | None, typer.Option(min=1, help="engines to have here; default: as many as there are GPUs for, else one")
    ] = None,
) -> None:
    """Have this machine's engines serve a training that runs elsewhere, until it ends (rollout.placement=dedicated)."""
    loaded = _load(recipe, [*(overrides or []), *([f"rollout.driver={driver}"] if driver else [])])
    with not_collected():
        from megatron_apo.stages import serve as stage

    on_ask(lambda: request.ask(*notice()))
    stage.run(loaded, engines)


@app.command()
def evaluate(
    recipe: RecipeOption,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder to evaluate; default: model.path")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="workers that evaluate together; may change")] = None,
    worker: Annotated[
        int | None,
        typer.Option(min=0, help="which of them this is, from 0; default: as many as this machine has engines for"),
    ] = None,
) -> None:
    """avg@k at the sampling temperature, and greedy, on data.eval. Samples only the shards that are not there."""
    loaded = _load(recipe, overrides)
    if (worker is None) != (workers is None):
        raise typer.BadParameter(
            "one worker is one of so many, and without both all of this machine's engines are used; give both or none",
            param_hint="--worker, --workers",
        )
    _check_worker(worker or 0, workers or 1)
    if model is not None:
        loaded.model.path = model
    with not_collected():
        from megatron_apo.stages import start

    start.evaluate(loaded, worker, workers or 1)


@convert_app.command("hf-to-megatron")
def hf_to_megatron(hf: HFOption, out: OutOption, dtype: DtypeOption = None, ranks: RanksOption = None) -> None:
    """Write a Hugging Face model as a Megatron distributed checkpoint, which any layout can load."""
    with not_collected():
        from megatron_apo.stages import convert

    convert.hf_to_megatron(hf, out, dtype, ranks)


@convert_app.command("megatron-to-hf")
def megatron_to_hf(
    megatron: MegatronOption,
    out: OutOption,
    dtype: DtypeOption = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weights file, as 5GB or 500MiB")] = "5GB",
    ranks: RanksOption = None,
) -> None:
    """Write a Megatron distributed checkpoint, converted or of training, as a Hugging Face folder."""
    with not_collected():
        from megatron_apo.stages import convert
    from megatron_apo.telemetry.units import parse_size

    convert.megatron_to_hf(megatron, out, dtype, parse_size(max_shard_size, "--max-shard-size"), ranks)


@convert_app.command("verify")
def verify(
    hf: HFOption,
    megatron: MegatronOption,
    tp: Annotated[int, typer.Option(min=1, help="tensor-parallel ranks that compute log-probs")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="pipeline stages that compute log-probs")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="expert-parallel ranks that compute log-probs")] = 1,
    prompts: Annotated[
        Path | None, typer.Option(help="text, one prompt a line; compare log-probs with transformers on it")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="largest log-prob difference of a token, fp32")] = 1e-4,
    ranks: RanksOption = None,
    only: Annotated[Literal["tensors", "log-probs"] | None, typer.Option(help="this part alone")] = None,
) -> None:
    """Hold a Megatron checkpoint against a Hugging Face folder: names, shapes, every bit, and log-probs."""
    with not_collected():
        from megatron_apo.stages import verify as stage

    stage.verify(hf, megatron, stage.Layout(tp, pp, ep), prompts, tolerance, ranks, only)


@app.command()
def compare(
    recipe: RecipeOption,
    methods: Annotated[
        str, typer.Option(help='as "apo grpo"; LABEL=NAME:SECTION.KEY=VALUE,... gives a method settings of its own')
    ],
    out: Annotated[Path, typer.Option(help="folder of the comparison; one that was interrupted goes on")],
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help='as "0 1 2"; from five on there are intervals')] = "0",
    settings: Annotated[
        str, typer.Option(help='what a step has the same of: "equal-prompts", "equal-samples", or both')
    ] = "equal-prompts",
    rates: Annotated[
        str | None,
        typer.Option(
            help="learning rates that each method tries; one: no trials; default: a third, one, and three of "
            "optimizer.lr"
        ),
    ] = None,
    trial_steps: Annotated[int, typer.Option(min=1, help="steps of a trial of a learning rate")] = 30,
    trial_seed: Annotated[int, typer.Option(min=0, help="seed of the trials, none of --seeds")] = 1000,
    attempts: Annotated[
        int,
        typer.Option(
            min=1,
            help="of one run, at most, where the machine was busier than for its seed's others, or a rank was lost",
        ),
    ] = 3,
) -> None:
    """Train several methods on one store, the same prompts and seeds, and tell what each took to a reward.

    Runs end at train.steps, train.target_reward or train.max_minutes. See docs/compare.md.
    """
    from megatron_apo.compare import command
    from megatron_apo.compare.plan import Plan

    loaded = _load(recipe, overrides)
    plan = Plan.parse(loaded, methods, settings, seeds, rates, trial_steps, trial_seed, attempts)
    command.run(plan, out)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="folder of a run, finished or not")]) -> None:
    """Write RUN/report.html, one self-contained page."""
    from megatron_apo.stages.report import write_report

    print(write_report(run))


@app.command()
def vstar(
    store: Annotated[Path, typer.Argument(help="folder of a V* store")],
    beta1: Annotated[list[float] | None, typer.Option(help="b1 of V*; repeatable; default: 0.25, 0.5 and 1")] = None,
    estimator: Annotated[EstimatorName, typer.Option(help="how rewards become V*")] = "log_mean_exp",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="write one self-contained HTML page")] = None,
    diff: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="compare with another store; 1 if any reward differs")
    ] = None,
) -> None:
    """Validate a V* store and summarize it, or compare it with another."""
    beta1s = list(dict.fromkeys(beta1 or (0.25, 0.5, 1.0)))
    for value in beta1s:
        if not 0 < value < float("inf"):
            raise typer.BadParameter(
                f"{value:g} is not a finite number above 0; give one, such as 0.5", param_hint="--beta1"
            )
    if page and diff:
        raise typer.BadParameter("the page is of one store; give one of them", param_hint="--page, --diff")
    import json
    from dataclasses import asdict

    from megatron_apo.values import summary, text
    from megatron_apo.values.store import VStarStore

    opened = VStarStore.open(store)
    if diff:
        comparison = summary.compare(opened, VStarStore.open(diff), beta1s, estimator)
        if as_json:
            print(json.dumps(asdict(comparison), indent=1))
        else:
            text.print_comparison(comparison)
        raise typer.Exit(0 if comparison.same_rewards else 1)
    found = summary.summarize(opened, beta1s, estimator)
    if page:
        from megatron_apo.values import page as values_page

        values_page.write_page(page, found, summary.compare_estimators(opened, beta1s))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    elif page:
        print(page)
    else:
        text.print_summary(found)


@app.command()
def doctor(
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="check this recipe as well")] = None,
    stage: Annotated[
        Literal["warmup", "estimate-vstar", "train", "evaluate", "serve"] | None,
        typer.Option("--for", help="check what this command would refuse; default: what the next stage would"),
    ] = None,
    fields: Annotated[bool, typer.Option("--fields", help="only list every field of a recipe")] = False,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="only print the recipe as it is read, with every field")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="hold the recipe against nodes with these GPUs, such as H100, in place of here")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="of --gpu, in each node; default: 8")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="with --gpu: how many nodes; default: 1")] = None,
    host_memory: Annotated[str | None, typer.Option(help="with --gpu: memory of each node's host, as 1TB")] = None,
) -> None:
    """Say what is installed, what this machine can do, and what is lost without the rest.

    It needs no weights: model.path=shape:NAME stands for a public model (launch/recipes/shapes).
    """
    from megatron_apo import doctor as checks

    if fields:
        checks.print_fields()
        return
    loaded = _load(recipe, overrides) if recipe else None
    if resolved:
        if loaded is None:
            raise typer.BadParameter("prints a recipe; give --recipe too", param_hint="--resolved")
        print(loaded.as_yaml(), end="")
        return
    checks.print_findings(loaded, stage, _described(loaded, gpu, gpus, nodes, host_memory))


def _described(
    recipe: Recipe | None, gpu: str | None, gpus: int | None, nodes: int | None, host_memory: str | None
) -> Machine | None:
    """The machine that the doctor's options describe, None without them."""
    from megatron_apo.runtime.machine import UNLIMITED, Machine
    from megatron_apo.telemetry.units import parse_size

    given = {"--gpu": gpu, "--gpus": gpus, "--nodes": nodes, "--host-memory": host_memory}
    names = ", ".join(name for name, value in given.items() if value is not None)
    if not names:
        return None
    if gpu is None:
        raise typer.BadParameter("describes nodes, whose GPUs are missing; give --gpu too", param_hint=names)
    if recipe is None:
        raise typer.BadParameter("describes what a recipe is held against; give --recipe too", param_hint=names)
    memory = UNLIMITED if host_memory is None else parse_size(host_memory, "--host-memory")
    try:
        return Machine.described(
            gpu, gpus or 8, nodes or 1, num_ranks=recipe.parallel.world_size, available_bytes=memory
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from None


def _check_worker(worker: int, workers: int) -> None:
    if worker >= workers:
        raise typer.BadParameter(
            f"{worker} of {workers} workers, which are counted from 0; use 0 to {workers - 1}", param_hint="--worker"
        )


@app.command()
def grade(
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="name of a reward, or my_module:MyReward; twice: where do two disagree? With --store, default: those "
            "of the recipe's sources"
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option(help=".jsonl or .parquet with the columns response and answer, and perhaps prompt")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="a V* store that kept its responses; with --recipe, whose data.train it is of")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="YAML recipe, for --store")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(help="options of a reward as JSON, as '{\"strict\": false}'; one for each reward"),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="rows to print at most")] = 20,
    shows_all: Annotated[bool, typer.Option("--all", help="print rows that are right, or agree, as well")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object for each row, with verdicts and why")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Grade responses and say what was compared: of one reward where it is not right, of two where they disagree."""
    import json

    from megatron_apo.config import RewardConfig

    names = reward or []
    if len(names) > 2:
        raise typer.BadParameter(f"{len(names)} rewards; give one, or two to compare", param_hint="--reward")
    if (file is None) == (store is None):
        raise typer.BadParameter("give one of them", param_hint="--file, --store")
    if store is not None and recipe is None:
        raise typer.BadParameter("its prompts' answers are a recipe's; give --recipe as well", param_hint="--store")
    if store is None and not names:
        raise typer.BadParameter("a file's rows have none of their own; give one", param_hint="--reward")
    try:
        given = [json.loads(text) for text in options or []]
    except ValueError as error:
        raise typer.BadParameter(f"{error}; give JSON, as '{{\"strict\": false}}'", param_hint="--options") from None
    if given and (len(given) != len(names) or not all(isinstance(one, dict) for one in given)):
        raise typer.BadParameter(
            f"{len(given)} for {len(names)} rewards; give a JSON object for each", param_hint="--options"
        )
    if overrides and recipe is None:
        raise typer.BadParameter("they are a recipe's; give --recipe as well", param_hint="SECTION.KEY=VALUE")
    loaded = _load(recipe, overrides) if recipe else None
    limits = loaded.reward if loaded else RewardConfig()
    with not_collected():
        from megatron_apo.stages import grade as stage

    judges = [stage.Judge.of(name, its, loaded) for name, its in zip(names, given or [None] * len(names), strict=True)]
    if loaded is None or store is None:
        stage.run(judges, limits, stage.rows_of_file(file or ""), show, shows_all, as_json)
        return
    rows, num_left_out = list(stage.rows_of_store(store, loaded)), 0
    if names:
        rows, num_left_out = stage.of_rewards(rows, names, loaded)
    stage.run(judges or [stage.Judge.of_recipe(loaded)], limits, rows, show, shows_all, as_json, num_left_out)


@app.command("run-job", hidden=True)
def run_job(
    recipe: Annotated[str, typer.Argument()],
    overrides: Overrides = None,
    stage: Annotated[int | None, typer.Option(min=1, max=2)] = None,
    spare: Annotated[int, typer.Option(min=0)] = 0,
    limit: Annotated[float | None, typer.Option(help="minutes")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Both stages on the nodes of the SLURM job that this is the script of (launch/run_apo.sh)."""
    from megatron_apo.cluster import run as job
    from megatron_apo.cluster import show

    options = job.Options(spare, stage, None if limit is None else 60 * limit)
    if dry_run:
        show.dry_run(recipe, overrides or [], options, nodes, gpus)
    else:
        job.run(recipe, overrides or [], options)


@app.command("run-local", hidden=True)
def run_local(
    recipe: Annotated[str, typer.Argument()],
    overrides: Overrides = None,
    stage: Annotated[int | None, typer.Option(min=1, max=2)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
    gpus: Annotated[int | None, typer.Option(min=0, help="with --dry-run: as if there were so many")] = None,
) -> None:
    """Both stages on this machine (launch/run_local.sh)."""
    if gpus is not None and not dry_run:
        raise typer.BadParameter("describes a machine for --dry-run; give both", param_hint="--gpus")
    from megatron_apo.cluster import local

    if dry_run:
        local.dry_run(recipe, overrides or [], stage, gpus)
    else:
        local.run(recipe, overrides or [], stage)


@app.command("node", hidden=True)
def node(
    step: Annotated[Literal["check", "prepare", "estimate-vstar", "train", "evaluate"], typer.Argument()],
    folder: Annotated[Path, typer.Argument()],
    token: Annotated[str, typer.Option()] = "",
    within: Annotated[float, typer.Option()] = 60.0,
) -> None:
    """One node's part of a step of a SLURM job; srun starts it."""
    from megatron_apo.cluster import node as one

    one.run(step, folder, token, within)


def _load(recipe: str, overrides: list[str] | None) -> Recipe:
    from megatron_apo.config import load_recipe

    return load_recipe(recipe, overrides or [])


def _is_users(error: BaseException) -> bool:
    """Whether an error is the user's to mend: the system's, one of this package, or a ValueError its code raised."""
    if type(error).__module__.startswith("megatron_apo"):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    spec = frame.f_globals.get("__spec__")  # its name is right also where `-m megatron_apo.cli` says __main__
    raised_here = spec is not None and spec.name.startswith("megatron_apo")
    return isinstance(error, OSError) or (isinstance(error, ValueError) and raised_here)


def _quiet_upstream() -> None:
    """Megatron-Core's warnings of what is not installed; `doctor` says the same once, and what is lost by it."""
    for pattern in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "full scope is deprecated",
        "The .grad attribute of a Tensor that is not a leaf",
        "`torch.distributed.",
        "When using async grad allreduce",
        "`load_state_dict` is deprecated",
        "Please use DTensor instead",
        "torch.distributed is disabled",
    ):
        warnings.filterwarnings("ignore", message=pattern)


def main() -> None:
    """Run the command line and exit."""
    if is_below_node():
        leave_sigterm_to_node()
    _quiet_upstream()
    unwind_on_sigterm()
    try:
        app(prog_name="megatron-apo")
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get(DEBUG) or not _is_users(error):
            raise
        from megatron_apo.config import RecipeError

        if is_later_rank() and not isinstance(error, EndedEarly):
            traceback.print_exc()  # into its log
        label = "" if isinstance(error, EndedEarly) else "error: "
        several = error.problems if isinstance(error, RecipeError) else str(error).splitlines()
        for line in several if isinstance(error, ValueError) else [str(error)]:  # of others the rest is a log's end
            if line:
                print(f"{label}{line}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
