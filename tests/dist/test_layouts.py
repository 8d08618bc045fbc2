"""Every layout computes the same thing: log-probs against transformers; gradients, norm and update against one rank.

One rank set per layout measures everything (worker.py); the tests below compare. Gradients are compared before the
optimizer, which would hide a scaled or a wrong one; `test_comparison_notices` breaks what is compared on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_apo.config import ModelConfig, ParallelConfig
from megatron_apo.model.hf_config import ModelConfigError, check_layout, read_hf_config
from tests.dist.ranks import ONE_RANK, parallel_of, start_ranks, variants_of
from tests.dist.worker import (
    ALONE,
    BETA2,
    CASES,
    EVERY_CASE,
    HALF,
    LR,
    MUTATIONS,
    NUM_MINIBATCHES,
    RECOMPUTED_IN,
    TEMPERATURE,
    batch,
)
from tests.models import EXPERTS, VARIANTS, as_saved, hf_log_probs, make_model

Tokens = list[list[int]]

SIZES = ("tp", "pp", "vpp", "cp", "dp", "ep")  # ep ranks share the experts within cp x dp
# By default one rank holds every variant, two those in which their layout can go wrong, and four one (so do eight);
# every pair of sizes is in a layout. "tp2-others" is tp2 with the variants that tp2 leaves out.
TWO_RANKS = {
    "tp2": ["llama-biases", "llama-mlp-bias-yarn", "qwen2-tied-one-group", "qwen3-tied"],
    "pp2": ["qwen2", "qwen3-tied", "qwen3_moe", "qwen3_moe-tied-plain"],
    "cp2": ["llama3-tied", "qwen3-tied", "qwen3-yarn", "qwen3_moe"],
    "dp2-ep2": EXPERTS,
}
SMALL = [ONE_RANK, *TWO_RANKS]
FOUR_RANKS = ["tp2-pp2-vpp2", "tp2-cp2", "tp2-dp2", "cp2-dp2", "pp2-vpp2-cp2", "pp2-vpp2-dp2", "pp2-vpp2-cp2-ep2"]
EIGHT_RANKS = ["tp2-pp2-cp2", "tp2-cp2-dp2", "tp2-pp2-vpp2-dp2", "pp2-vpp2-cp2-dp2-ep2"]
LARGER = ["tp4", "pp4", "cp4", "dp4-ep2", "dp4-ep4", "cp2-dp2-ep4"]
LAYOUTS = SMALL + FOUR_RANKS


def matrix(most_ranks: int = 4) -> list[str]:
    """Every layout of sizes 1 and 2 that some variant fits, smallest first."""
    found = []
    for sizes in product((1, 2), repeat=len(SIZES)):
        layout = "-".join(f"{name}{size}" for name, size in zip(SIZES, sizes, strict=True) if size > 1) or ONE_RANK
        parallel = parallel_of(layout)
        valid = not parallel.problems(ModelConfig(path=Path("unused"))) and variants_of(layout)
        if valid and parallel.world_size <= most_ranks:
            found.append(layout)
    return sorted(found, key=lambda layout: parallel_of(layout).world_size)


OTHERS = [f"{layout}-others" for layout, names in TWO_RANKS.items() if set(variants_of(layout)) - set(names)]
FULL_LAYOUTS = [layout for layout in matrix() if layout not in LAYOUTS] + LARGER + EIGHT_RANKS + OTHERS
ALL_LAYOUTS = LAYOUTS + [pytest.param(layout, marks=pytest.mark.full) for layout in FULL_LAYOUTS]
OTHER_LAYOUTS = ALL_LAYOUTS[1:]


def measured_variants(layout: str) -> list[str]:
    """Where it is one, the first that goes through every case and fits."""
    names = variants_of(layout)
    if layout in FOUR_RANKS + EIGHT_RANKS:
        return [next(name for name in EVERY_CASE if name in names)]
    if layout in OTHERS:
        return [name for name in names if name not in TWO_RANKS[layout.removesuffix("-others")]]
    return TWO_RANKS.get(layout, names)


def with_one_of(names: Iterable[str], layouts: Iterable) -> list:
    """The layouts (strings, or pytest's parameters of one) in which one of these variants is measured."""
    return [
        layout
        for layout in layouts
        if set(names) & set(measured_variants(layout if isinstance(layout, str) else layout.values[0]))
    ]


def pairs(layouts: Iterable[str]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """Any two sizes that are in a layout together."""
    each = [[(name, getattr(parallel_of(layout), name)) for name in SIZES] for layout in layouts]
    return {pair for sizes in each for pair in combinations(sizes, 2)}


def test_every_pair_of_sizes_is_in_a_default_layout():
    """Those of a dense model and those with ep: a layout of spread experts holds no dense model."""
    dense, default = ([one for one in layouts if parallel_of(one).ep == 1] for layouts in (matrix(), LAYOUTS))
    assert pairs(dense) == pairs(default)
    assert {pair for pair in pairs(matrix()) - pairs(LAYOUTS) if ("ep", 2) in pair} == set()


def run_ranks(work: Path, layout: str) -> dict:
    """Measure a layout with real ranks; returns what rank 0 saved."""
    start_ranks("tests.dist.worker", work, layout, *measured_variants(layout))
    return torch.load(work / f"{layout}.pt", weights_only=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("layouts")
    for name in VARIANTS:
        make_model(name, folder / "models")
        make_model(name, folder / "references", seed=1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of models so small, threads wait for each other more than they compute
    yield folder
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def measured(work: Path):
    cache: dict[str, dict] = {}

    def get(layout: str) -> dict:
        if layout not in cache:
            cache[layout] = run_ranks(work, layout)
        return cache[layout]

    return get


@pytest.fixture(scope="module")
def expected_log_probs(work: Path) -> Callable[[str], list[torch.Tensor]]:
    prompts, responses = tokens_of_batch()
    return cache(lambda name: hf_log_probs(work / "models" / name, prompts, responses, TEMPERATURE))


def tokens_of_batch() -> tuple[Tokens, Tokens]:
    """(prompts, responses)"""
    sequences = batch().sequences
    rows = range(len(sequences))
    return [sequences.prompt(row).tolist() for row in rows], [sequences.response(row).tolist() for row in rows]


def test_variants_of_a_layout_are_those_that_fit(work):
    for layout in matrix() + LARGER + EIGHT_RANKS:
        assert variants_of(layout) == [name for name in VARIANTS if fits(work / "models" / name, parallel_of(layout))]


def fits(folder: Path, parallel: ParallelConfig) -> bool:
    try:
        check_layout(read_hf_config(folder), parallel)
    except ModelConfigError:
        return False
    return True


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| in the 2-norm; infinite where ours is not finite."""
    difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    return difference if difference == difference else float("inf")


# Of any tensor. A change is Adam's, which turns the rounding of a small gradient into a step.
TOLERANCE = {"loss": 1e-5, "norm": 1e-5, "gradients": 1e-5, "change": 1e-3}


def worst_differences(found: dict, reference: dict) -> dict[str, tuple[float, str]]:
    """{quantity: (its largest relative difference, of which tensor)}, of what was measured of a case."""
    worst = {}
    for quantity in TOLERANCE:
        ours, theirs = found.get(quantity), reference.get(quantity)
        if ours is None or theirs is None:  # a sharded gradient, or not measured
            continue
        if not isinstance(ours, dict):  # numbers, one for each optimizer step
            ours, theirs = (dict(enumerate(torch.tensor(value).reshape(-1, 1))) for value in (ours, theirs))
        assert ours.keys() == theirs.keys(), quantity
        worst[quantity] = max((relative_difference(ours[name], theirs[name]), str(name)) for name in theirs)
    return worst


def differing(found: dict, reference: dict) -> dict[str, tuple[float, str]]:
    """`worst_differences` beyond the tolerance."""
    worst = worst_differences(found, reference)
    return {quantity: pair for quantity, pair in worst.items() if pair[0] > TOLERANCE[quantity]}


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_log_probs_equal_transformers(layout, measured, expected_log_probs):
    for name, results in measured(layout).items():
        expected = expected_log_probs(name)
        for case, found in results["log_probs"].items():
            assert sorted(found) == list(range(len(expected)))
            worst = max(float((found[i] - expected[i]).abs().max()) for i in found)
            assert worst <= 1e-5, f"{name} {case}: {worst}"


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_export_is_bitwise_the_checkpoint(layout, measured, work):
    for name, results in measured(layout).items():
        original = load_file(work / "models" / name / "model.safetensors")
        exported = results["export"]
        assert exported.keys() == original.keys(), name
        assert all(torch.equal(exported[key], original[key]) for key in original), name


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_gradients_and_update_equal_one_rank(layout, measured):
    for name, results in measured(layout).items():
        reference = measured(ONE_RANK)[name]["cases"]["packed"]
        for case, found in results["cases"].items():
            if case not in MUTATIONS:
                assert differing(found, reference) == {}, f"{name} {case}"


def test_micro_batches_and_packing_change_nothing(measured):
    for name in EVERY_CASE:
        cases = measured(ONE_RANK)[name]["cases"]
        for case in CASES:
            assert differing(cases[case], cases["packed"]) == {}, f"{name} {case}"


@pytest.mark.parametrize("layout", RECOMPUTED_IN)
def test_recomputation_changes_no_bit(layout, measured):
    """With packing, main gradients, stages and log-probs; layers (full) or their feed-forward parts run twice."""
    for name in set(EVERY_CASE) & set(measured(layout)):
        cases = measured(layout)[name]["cases"]
        kept = cases["packed-small"]
        for recompute, layers in (("selective", 1), ("full", 2)):
            found = cases[recompute]
            assert found["calls"]["TransformerLayer"] == layers * kept["calls"]["TransformerLayer"], name
            assert found["calls"]["MLP"] == 2 * kept["calls"]["MLP"], name
            assert (found["loss"], found["norm"]) == (kept["loss"], kept["norm"]), f"{name} {recompute}"
            assert found["gradients"].keys() == kept["gradients"].keys()
            for tensor, gradient in kept["gradients"].items():
                assert torch.equal(found["gradients"][tensor], gradient), f"{name} {recompute}: {tensor}"


def test_gradients_equal_transformers(measured, work):
    """One rank's gradients are those of the formula on transformers' model: mean over sequences of (b2 s - A)^2."""
    for name in VARIANTS:
        model = hf_model(work / "models" / name)
        (loss,) = hf_losses(model, work / "references" / name, num_minibatches=1)
        loss.backward()
        expected = as_saved({key: parameter.grad for key, parameter in model.named_parameters()})
        case = measured(ONE_RANK)[name]["cases"]["packed"]
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        formula = {"loss": [loss.item() * len(batch())], "norm": [float(norm)], "gradients": expected}
        assert differing(case, formula) == {}, name


def hf_model(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hf_losses(model: torch.nn.Module, reference: Path, num_minibatches: int) -> Iterator[torch.Tensor]:
    """Each minibatch's loss, asked of the model as it then is."""
    prompts, responses = tokens_of_batch()
    reference_log_probs = hf_log_probs(reference, prompts, responses, TEMPERATURE)
    advantages, size = batch().reward_B.tolist(), len(prompts) // num_minibatches
    for start in range(0, len(prompts), size):
        losses = []
        for row in range(start, start + size):
            tokens, first = torch.tensor([prompts[row] + responses[row]]), len(prompts[row]) - 1
            logits = model(tokens).logits[0, first:-1] / TEMPERATURE
            log_prob = logits.log_softmax(-1).gather(1, torch.tensor(responses[row])[:, None]).sum()
            losses.append((BETA2 * (log_prob - reference_log_probs[row].sum()) - advantages[row]).square())
        yield torch.stack(losses).mean()


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("layout", with_one_of(EVERY_CASE, OTHER_LAYOUTS))
def test_minibatches_are_exact_in_every_layout(layout, measured):
    """Two optimizer steps on one batch, each normalized by its own global count."""
    for name in set(EVERY_CASE) & set(measured(layout)):
        found, expected = measured(layout)[name]["minibatches"], measured(ONE_RANK)[name]["minibatches"]
        assert differing(found, expected) == {}, name


def test_minibatches_equal_the_formula(measured, work):
    """Means over each half of the batch, and two steps of torch's Adam on transformers' model, clipped."""
    name = "qwen3-tied"
    model = hf_model(work / "models" / name)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses, norms = [], []
    for loss in hf_losses(model, work / "references" / name, NUM_MINIBATCHES):
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))
        adam.step()
        losses.append(loss.item() * len(batch()) / NUM_MINIBATCHES)
    change = as_saved({key: value.detach() - start[key] for key, value in model.named_parameters()})
    formula = {"loss": losses, "norm": norms, "change": change}
    assert differing(measured(ONE_RANK)[name]["minibatches"], formula) == {}


@pytest.mark.parametrize("layout", with_one_of(HALF, ALL_LAYOUTS))
def test_bf16_is_within_its_error(layout, measured):
    """bf16 keeps 8 bits: log-probs and gradients stay that close to fp32's in every layout, and no closer."""
    for name in set(HALF) & set(measured(layout)):
        found, exact = measured(layout)[name]["bf16"], measured(ONE_RANK)[name]
        log_probs, expected = found["log_probs"], exact["log_probs"]["packed"]
        worst = max(float((log_probs[i] - expected[i]).abs().max()) for i in expected)
        assert 1e-4 < worst < 0.1, f"{name}: {worst}"
        gradients, expected = found["gradients"], exact["cases"]["packed"]["gradients"]
        difference = relative_difference(flat(gradients), flat(expected))
        assert 1e-4 < difference < 0.04, f"{name}: gradient differs by {difference}"


@pytest.mark.parametrize("fault", MUTATIONS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if set(HALF) & set(measured_variants(layout))])
def test_comparison_notices(layout, fault, measured):
    """The comparison fails when the gradient is doubled or negated, or a micro-batch is dropped."""
    (name,) = HALF
    found, reference = (measured(one)[name]["cases"] for one in (layout, ONE_RANK))
    assert differing(found[fault], reference["packed"]).keys() == MUTATIONS[fault]


@pytest.mark.parametrize("fault", ALONE)
def test_each_quantity_is_compared(fault, measured):
    """A fault in one quantity alone, or in one tensor's, is seen there and nowhere else."""
    (name,) = HALF
    cases = measured(ONE_RANK)[name]["cases"]
    found = differing(cases[fault], cases["packed"])
    assert found.keys() == ALONE[fault]
    assert all(difference < 0.1 or fault == "skipped" for difference, _ in found.values()), "too large to show much"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_changes_nothing(layout, measured):
    """Every rank sees the one element of the last rank, and leaves weights, moments and learning rate."""
    found = [results["not finite"] for name, results in measured(layout).items() if name in EVERY_CASE]
    assert found
    for case in found:
        assert set(case) == {"nan", "inf", "-inf"}
        for value, told in case.items():
            assert not any(math.isfinite(norm) for norm in told["norms"]) and told["unchanged"], value
