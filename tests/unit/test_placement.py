"""Copies in host memory free the device's memory and bring back every byte; what cannot be placed so is refused."""

from __future__ import annotations

import pytest
import torch

from megatron_apo.config import RecipeError, build_recipe
from megatron_apo.model import placement
from megatron_apo.model.placement import HostCopy, OffloadedReference, Reference, SwappedReference, place_reference


def problems_of(*overrides: str) -> list[str]:
    try:
        build_recipe({}, ["model.path=m", "data.train=d.jsonl", "vstar.dir=v", *overrides])
    except RecipeError as error:
        return error.problems
    return []


def storage_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def make_chunks(seed: int) -> list[torch.nn.Module]:
    """Two chunks, of which the first has one weight under two names."""
    torch.manual_seed(seed)
    first = torch.nn.Sequential(torch.nn.Linear(7, 7), torch.nn.Linear(7, 7))
    first[1].weight = first[0].weight
    return [first, torch.nn.Sequential(torch.nn.Linear(7, 3))]


def values(chunks: list[torch.nn.Module]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 1023, 1024, 2048, 5000, 12345])
def test_every_byte_comes_back(count, dtype):
    """Sizes around pages, and odd ones; NaN and -0.0 too, which a comparison of values would not tell apart."""
    tensor = torch.randn(count).to(dtype)
    tensor[0], tensor[-1] = -0.0, float("nan")
    before, integers = tensor.clone(), {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    copy = HostCopy([tensor])
    copy.free()
    assert storage_bytes(tensor) == 0 and tensor.shape == (count,)
    copy.refill()
    assert torch.equal(tensor.view(integers), before.view(integers))
    tensor.fill_(7)
    copy.refill()  # as often as wanted, over what was written since
    assert torch.equal(tensor.view(integers), before.view(integers))


def test_host_memory_is_powers_of_two_and_a_rest():
    """torch's pinned allocator rounds up to a power of two; the sum must be exact, or bytes would be lost."""
    for size in (1, 4095, 4096, 4097, 3 * 4096 + 5, 7 << 20):
        pieces = placement._host_pieces(torch.UntypedStorage(size))
        assert sum(len(piece) for piece in pieces) == size
        whole = [len(piece) for piece in pieces if len(piece) >= 4096]
        assert all(length & (length - 1) == 0 for length in whole) and len(pieces) - len(whole) <= 1


def test_views_go_on_seeing_their_buffer():
    buffer = torch.arange(3000.0)
    head, tail = buffer[:1000].view(10, 100), buffer[1000:]
    copy = HostCopy([head, tail, head])  # one storage, thrice named
    assert sum(len(piece) for _, pieces in copy._pairs for piece in pieces) == 3000 * 4
    copy.free()
    assert storage_bytes(buffer) == 0
    copy.refill()
    assert torch.equal(buffer, torch.arange(3000.0))
    buffer[5] = -1.0
    assert head[0, 5] == -1.0


@pytest.mark.parametrize("mode", ["resident", "offload", "swap"])
def test_the_reference_is_there_while_active_and_the_policy_before_and_after(mode):
    policy, theirs = make_chunks(seed=1), make_chunks(seed=2)
    before, wanted = values(policy), values(theirs)

    def load(chunks):
        for chunk, source in zip(chunks, theirs, strict=True):
            chunk.load_state_dict(source.state_dict())

    reference = place_reference(mode, policy, build=lambda: make_chunks(seed=3), load=load)
    kinds = {"resident": Reference, "offload": OffloadedReference, "swap": SwappedReference}
    assert type(reference) is kinds[mode]
    assert same(values(policy), before)
    for _ in range(2):
        with reference.active() as chunks:
            assert same(values(chunks), wanted)
            assert (chunks is policy) == (mode == "swap") and chunks[0][1].weight is chunks[0][0].weight
            assert all(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())
            if mode != "swap":
                assert same(values(policy), before)
        assert same(values(policy), before)
        if mode == "offload":
            assert storage_bytes(*(parameter for chunk in chunks for parameter in chunk.parameters())) == 0
    with pytest.raises(KeyError), reference.active() as chunks:
        raise KeyError
    assert same(values(policy), before)
    if mode == "offload":
        assert storage_bytes(*(parameter for chunk in chunks for parameter in chunk.parameters())) == 0
    # What the policy learns in between is kept, and the reference stays what it was.
    with torch.no_grad():
        policy[1][0].bias.add_(1.0)
    learned = values(policy)
    with reference.active() as chunks:
        assert same(values(chunks), wanted)
    assert same(values(policy), learned) and not same(learned, before)


def test_weights_that_moved_away_from_a_swapped_reference_are_noticed():
    policy = make_chunks(seed=1)
    reference = place_reference("swap", policy, build=lambda: make_chunks(seed=3), load=lambda chunks: None)
    policy[1][0].bias.data = policy[1][0].bias.data.clone()  # as wrapping it for training would do
    with pytest.raises(AssertionError, match="moved"), reference.active():
        pass


def test_a_reference_is_built_where_no_masters_are_kept_and_its_weights_ask_for_gradients():
    """Transformer Engine keeps what FP8 weights were rounded from where gradients are on (fp8_utils.py)."""
    seen = []

    def build():
        seen.append(torch.is_grad_enabled())
        return make_chunks(seed=3)

    reference = place_reference("resident", make_chunks(seed=1), build=build, load=lambda chunks: None)
    with reference.active() as chunks:
        assert seen == [False] and all(p.requires_grad for chunk in chunks for p in chunk.parameters())


def test_a_reference_that_cannot_be_loaded_leaves_the_policy_alone():
    policy = make_chunks(seed=1)
    before = values(policy)

    def load(chunks):
        torch.nn.init.zeros_(chunks[0][0].weight)
        raise OSError("the file ends here")

    with pytest.raises(OSError):
        place_reference("swap", policy, build=lambda: make_chunks(seed=3), load=load)
    assert same(values(policy), before)


def test_combinations_that_megatron_core_has_not():
    bf16 = "model.dtype=bf16"
    assert problems_of(bf16, "optimizer.cpu_offload=0.5") == problems_of(bf16, "optimizer.moments=bf16") == []
    refused = [
        ([bf16, "optimizer.cpu_offload=1", "optimizer.distributed=false"], "optimizer.cpu_offload: 1.0 is the sharded"),
        ([bf16, "optimizer.moments=bf16", "optimizer.distributed=false"], "optimizer.moments: bf16 is the sharded"),
        (["optimizer.cpu_offload=1"], "optimizer.cpu_offload: 1.0 is for bf16 weights"),
        (["optimizer.moments=bf16"], "optimizer.moments: bf16 is for bf16 weights"),
        ([bf16, "optimizer.moments=bf16", "optimizer.cpu_offload=1"], "optimizer.moments: bf16, but"),
        ([bf16, "train.save_every=50", "optimizer.cpu_offload=1"], "train.save_every: 50 is untested with optimizer.c"),
        (["rollout.quantization=fp8"], "rollout.quantization: fp8, but what is not in FP8 is 16-bit"),
        (["optimizer.lr=1e-6", "optimizer.min_lr=1e-5"], "optimizer.min_lr: 1e-05 is above"),
    ]
    for overrides, start in refused:
        (problem,) = problems_of(*overrides)
        assert problem.startswith(start)
    fp8_weights = [bf16, "model.fp8.param_gather=true"]
    for override in ("model.reference_mode=offload", "model.reference_mode=swap", "optimizer.cpu_offload=1"):
        (problem,) = problems_of(*fp8_weights, override)
        assert problem.startswith(override.replace("=", ": ", 1)) and "model.fp8.param_gather" in problem
    for override in ("train.save_every=50", "train.offload_while_sampling=true"):
        (problem,) = problems_of(*fp8_weights, override)
        assert problem.startswith(override.split("=")[0]) and "model.fp8.param_gather" in problem
        assert problems_of(bf16, override) == problems_of(bf16, "model.fp8.recipe=blockwise", override) == []
    assert problems_of(*fp8_weights) == problems_of("rollout.quantization=fp8", "rollout.dtype=float16") == []
