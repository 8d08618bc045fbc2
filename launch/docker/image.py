"""What the Dockerfile asks of NVIDIA's image.

    python image.py kept LOCK > constraints      what is the image's, at its versions
    python image.py added LOCK > requirements    the rest of the lock
    python image.py check                        trainer and vLLM run on one torch and one NCCL, or exit code 1

Standard library only, until `check` imports what it checks.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

# What NVIDIA builds for its image, and what wheels of torch and Transformer Engine ask for beside them, which the image
# has outside of Python (CUDA, cuDNN, NCCL): a second copy could be loaded in its place.
OF_THE_IMAGE = re.compile(
    r"torch|torchvision|triton|apex|transformer-engine(-\w+)?|cuda-toolkit|"
    r"nvidia-(cublas|cuda-\w+|cudnn-cu13|cufft|cufile|curand|cusolver|cusparse|cusparselt-cu13|nccl-cu13|nvjitlink|"
    r"nvshmem-cu13|nvtx|nvvm)"
)
NEEDED = ("torch", "triton", "transformer-engine", "apex")  # in the image
# Built for the registry's torch, and nothing that is run here imports them.
UNUSED = re.compile(r"torchaudio|torchcodec|torch-c-dlpack-ext")


def kept(image: Mapping[str, str]) -> list[str]:
    """Constraints by which nothing takes the place of what is the image's. image: name -> version of what it has.
    Raises ValueError for one that lacks what it is taken for."""
    if lacking := [name for name in NEEDED if name not in image]:
        raise ValueError(f"not in the image: {', '.join(lacking)}; use NVIDIA's PyTorch image")
    return [f"{name}=={version}" for name, version in sorted(image.items()) if OF_THE_IMAGE.fullmatch(name)]


def added(lock: str) -> list[str]:
    """The lines of the lock that are to be installed."""
    lines = [line for line in lock.splitlines() if not line.startswith("#")]
    return [line for line in lines if not _is_left_out(normal(line.partition("==")[0]))]


def normal(name: str) -> str:
    """The one way of writing a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_left_out(name: str) -> bool:
    return bool(OF_THE_IMAGE.fullmatch(name) or UNUSED.fullmatch(name))


# vLLM's compiled modules. It does without the optional ones, of which the last two want more than torch 2.12 has.
REQUIRED = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "cumem_allocator", "vllm_flash_attn._vllm_fa2_C")
OPTIONAL = ("vllm_flash_attn._vllm_fa3_C", "_flashmla_C", "_qutlass_C", "third_party.deep_gemm._C_extension")


def check() -> list[str]:
    """What is wrong. Prints what is there."""
    torch = importlib.import_module("torch")
    problems = []
    if str(torch.__file__).startswith(sys.prefix + "/") and sys.prefix != sys.base_prefix:
        problems.append(f"torch is {torch.__file__}, and not the image's")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.__file__}")
    for module in ("transformer_engine.pytorch", "apex", "fused_weight_gradient_mlp_cuda", "megatron.core", "vllm"):
        problems += _imports(module)
    for name in REQUIRED:
        problems += _imports(f"vllm.{name}")
    for name in OPTIONAL:
        for problem in _imports(f"vllm.{name}"):
            print(f"left out: {problem}")
    return problems + _one_nccl(torch)


def _imports(name: str) -> list[str]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a symbol that torch lacks is an ImportError, and one of its own checks anything
        return [f"{name} does not load: {type(error).__name__}: {error}"]
    print(f"{name} {getattr(module, '__version__', '')} loads")
    return []


def _one_nccl(torch: object) -> list[str]:
    """vLLM opens NCCL by name, torch is linked to it: it must be one file and one version."""
    library = importlib.import_module("vllm.utils.nccl").find_nccl_library()
    number = ctypes.c_int()
    ctypes.CDLL(library).ncclGetVersion(ctypes.byref(number))
    vllms = (number.value // 10000, number.value // 100 % 100, number.value % 100)
    torchs = tuple(torch.cuda.nccl.version())[:3]  # type: ignore[attr-defined]
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libnccl.so" in line}
    print(f"NCCL: torch {torchs}, vLLM {vllms}, {', '.join(sorted(files))}")
    if torchs != vllms or len(files) != 1:
        return [f"NCCL: torch has {torchs} and vLLM {vllms}, from {len(files)} files: {sorted(files)}"]
    return []


def main(arguments: list[str]) -> None:
    if arguments == ["check"]:
        if problems := check():
            sys.exit("\n".join(problems))
        return
    command, lock = arguments
    image = {normal(one.metadata["Name"]): one.version for one in metadata.distributions()}
    print("\n".join(kept(image) if command == "kept" else added(Path(lock).read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
