"""The critic is transformers' layers under a row of torch's, in every layout: its values, a step, what is saved of it.

Real ranks compute and learn values (critic_worker.py); here the same is written out on one model. Each fault that is
put into the critic from outside must be seen by the comparisons that can see it, and by no other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.checkpoint import FileSystemReader

from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import alone
from megatron_apo.weights.conversion import CheckpointTensors, Conversion
from tests.dist.critic_worker import FAULTS, faults_of, layout_of, targets
from tests.dist.learner_worker import SETTINGS
from tests.dist.ranks import start_ranks
from tests.dist.test_learner import CHANGE, GRADIENTS, worst
from tests.dist.worker import batch
from tests.models import as_saved, make_model

TIED, UNTIED, EXPERTS = "qwen3-tied", "qwen3", "qwen3_moe"
VALUES = 1e-5  # of the largest
BOTH = [TIED, UNTIED]
VARIANTS_OF = {"tp2-sequence-parallel": [UNTIED], "tp2-pp2": [TIED], "cp2-dp2": [TIED]}
FULL_VARIANTS_OF = {layout: BOTH for layout in ("tp2", "pp2", "dp2", "cp2", "pp2-vpp2", "tp2-pp2-sequence-parallel")}
FULL_VARIANTS_OF |= {"dp2-ep2": [EXPERTS], "pp2-dp2-ep2": [EXPERTS]}
ALL_VARIANTS_OF = VARIANTS_OF | FULL_VARIANTS_OF


def _full(layout: str, *others: str) -> Any:
    return pytest.param(layout, *others, marks=[pytest.mark.full] if layout in FULL_VARIANTS_OF else [])


CASES = [_full(layout, variant) for layout, variants in ALL_VARIANTS_OF.items() for variant in variants]
# Of these a layout's first variant has all there is to see.
FAULTS_IN = [
    _full(layout, variants[0], fault) for layout, variants in ALL_VARIANTS_OF.items() for fault in faults_of(layout)
]
SAVED = [_full(layout, variants[0]) for layout, variants in ALL_VARIANTS_OF.items()]
# saved at, loaded at
RESHARDINGS = [pytest.param(*pair, marks=pytest.mark.full) for pair in (("tp2-pp2", "cp2-dp2"), ("cp2-dp2", "tp2-pp2"))]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/VARIANT, and critics/VARIANT, which has a value head and no output layer."""
    folder = tmp_path_factory.mktemp("critic")
    for variant in (TIED, UNTIED, EXPERTS):
        path = make_model(variant, folder / "models")
        critic = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        torch.manual_seed(3)
        torch.nn.init.normal_(critic.score.weight)
        critic.save_pretrained(folder / "critics" / variant)
    return folder


@pytest.fixture(scope="module")
def measured(work: Path) -> Callable[[str, str], dict]:
    @cache
    def of(layout: str) -> dict:
        start_ranks("tests.dist.critic_worker", work, layout, *ALL_VARIANTS_OF[layout])
        return torch.load(work / f"{layout}.pt", weights_only=True)

    return lambda layout, variant: of(layout)[variant]


@pytest.fixture(scope="module")
def expected(work: Path) -> Callable[[str], dict[float, dict]]:
    @cache
    def of(variant: str) -> dict[float, dict]:
        return {eps: plain_step(work / "critics" / variant, eps) for eps in SETTINGS}

    return of


def plain(folder: Path) -> torch.nn.Module:
    """transformers' `model`, and the row as `score`."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def plain_step(folder: Path, eps: float) -> dict:
    """Values before each response token, the mean squared error's gradients, and a step of Adam."""
    whole, sequences = plain(folder), batch().sequences
    layers, row_1H = whole.model, whole.score.weight
    found = {}
    for row in range(len(batch())):
        tokens, count = torch.tensor(sequences.row(row)).long(), int(sequences.response_lengths_B[row])
        hidden_SH = layers(tokens[None]).last_hidden_state[0]
        found[row] = (hidden_SH @ row_1H[0])[-count - 1 : -1]
    errors = [value_R - target_R for value_R, target_R in zip(found.values(), targets(), strict=True)]
    torch.cat(errors).square().mean().backward()
    parameters = dict(whole.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    torch.optim.AdamW(parameters.values(), lr=SETTINGS[eps][0], betas=(0.9, 0.95), eps=eps, weight_decay=0).step()
    return {
        "values": {row: value_R.detach() for row, value_R in found.items()},
        "gradients": as_saved(gradients),
        "norm": float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm()),
        "change": as_saved({name: parameter.detach() - before[name] for name, parameter in parameters.items()}),
    }


def differences(found: dict[float, dict], expected: dict[float, dict]) -> dict[str, tuple[float, float]]:
    """{comparison: (worst relative difference, the tolerance)}."""
    ours, theirs = found[1.0], expected[1.0]
    assert ours["values"].keys() == theirs["values"].keys()
    values = [torch.cat([one["values"][row] for row in sorted(theirs["values"])]) for one in (ours, theirs)]
    norms = [abs(found[eps]["norm"] / expected[eps]["norm"] - 1) for eps in found]
    return {
        "values": (float((values[0] - values[1]).abs().max() / values[1].abs().max()), VALUES),
        "gradients": (worst(ours["gradients"], theirs["gradients"]), GRADIENTS),
        "norm": (max(norms), GRADIENTS),
        **{
            f"weights, eps {eps:g}": (worst(found[eps]["change"], expected[eps]["change"]), CHANGE[eps])
            for eps in found
        },
    }


def failing(found: dict[str, tuple[float, float]]) -> set[str]:
    return {name for name, (value, limit) in found.items() if not value <= limit}


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_values_and_a_step_are_those_of_transformers_and_torch(layout, variant, measured, expected) -> None:
    found = differences(measured(layout, variant)["steps"]["none"], expected(variant))
    print(layout, variant, {name: f"{value:.1e} of {limit:g}" for name, (value, limit) in found.items()})
    assert failing(found) == set(), found


@pytest.mark.parametrize(("layout", "variant", "fault"), FAULTS_IN)
def test_a_fault_in_the_critic_is_seen(layout, variant, fault, measured, expected) -> None:
    found = differences(measured(layout, variant)["steps"][fault], expected(variant))
    assert failing(found) == FAULTS[fault][1], found


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_there_is_no_output_layer(layout, variant, measured, work) -> None:
    """Nor a second embedding, where the policy's are tied: neither in the model nor among the gradients."""
    whole, found = plain(work / "critics" / variant), measured(layout, variant)["parameters"]
    padding = -whole.config.vocab_size % layout_of(layout).tp * whole.config.hidden_size
    assert found["count"] == sum(parameter.numel() for parameter in whole.parameters()) + padding
    assert found["buffers"] and "value_head" in found["names"]
    assert not [name for name in found["names"] if "output_layer" in name]


@pytest.mark.parametrize(("layout", "variant"), SAVED)
def test_a_critic_is_saved_beside_the_policy_and_resumed_bit_for_bit(layout, variant, measured) -> None:
    found = measured(layout, variant)["checkpoint"]
    ranks = range(layout_of(layout).world_size)
    assert found["before"] == [{"policy": False, "critic": False} for _ in ranks]
    assert found["loaded"] == found["next"] == [{"policy": True, "critic": True} for _ in ranks]
    assert found["policy alone"] == [{"policy": True} for _ in ranks]
    assert "critic." in found["without a critic"] and "\n" not in found["without a critic"]


@pytest.mark.parametrize(("layout", "variant"), SAVED)
def test_the_policys_part_of_a_checkpoint_is_as_without_a_critic(layout, variant, measured, work) -> None:
    """So are the files that a run without a critic writes and reads, and the conversion to Hugging Face."""
    measured(layout, variant)
    folder = work / "checkpoints" / f"{layout}-{variant}"
    both, policy = (
        {key: saved for key, saved in FileSystemReader(path).read_metadata().state_dict_metadata.items()}
        for path in (folder, folder.with_name(f"{folder.name}-policy"))
    )
    critic = {key: both.pop(key) for key in list(both) if key.startswith("critic.")}
    assert both.keys() == policy.keys()
    assert {"critic.value_head", "critic.embedding.word_embeddings.weight"} < critic.keys()
    assert any(key.endswith("optimizer.state.exp_avg.value_head") for key in critic)
    assert not [key for key in critic if "output_layer" in key]
    common = [
        torch.load(path / "common.pt", weights_only=False)
        for path in (folder, folder.with_name(f"{folder.name}-policy"))
    ]
    assert common[0].pop("critic")["schedule"] == common[1]["schedule"] == 2
    assert common[0].keys() == common[1].keys()
    with alone() as topology:
        spec = read_hf_config(work / "models" / variant)
        CheckpointTensors(folder).check(Conversion(spec, topology, torch.float32))


@pytest.mark.parametrize(("saved_at", "layout"), RESHARDINGS)
def test_another_layout_resumes_to_rounding(saved_at, layout, measured, work) -> None:
    straight = measured(saved_at, TIED)["checkpoint"]["weights"]
    start_ranks("tests.dist.critic_worker", work, layout, TIED, f"from={saved_at}")
    resumed = torch.load(work / f"{layout}-from-{saved_at}.pt", weights_only=True)[TIED]["weights"]
    assert worst(resumed, straight) <= 1e-6
