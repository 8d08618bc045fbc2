"""The GPUs that this process may compute on, asked of NVML.

Asked of CUDA, they would each hold a context of this process: the launcher's would stay on GPU 0 for the whole run, and
keep the ranks off one in exclusive-process mode. Importing this module is light.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml

Capability = tuple[int, int]  # of a GPU: (9, 0) is Hopper


def visible_gpus() -> list[Capability]:
    """Capability of each GPU that CUDA_VISIBLE_DEVICES leaves; none where torch was built without CUDA."""
    return drivers_gpus() if _torch_has_cuda() else []


def drivers_gpus() -> list[Capability]:
    """`visible_gpus` of another interpreter, whose torch is not looked at."""
    with _handles() as gpus:
        return [tuple(pynvml.nvmlDeviceGetCudaComputeCapability(gpu)) for gpu in gpus]


def gpu_names() -> list[str]:
    """The name of each of `drivers_gpus`."""
    with _handles() as gpus:
        return [pynvml.nvmlDeviceGetName(gpu) for gpu in gpus]


def gpu_memory_bytes() -> list[int]:
    """The whole memory of each of `drivers_gpus`; of a MIG slice, its GPU's."""
    with _handles() as gpus:
        return [pynvml.nvmlDeviceGetMemoryInfo(gpu).total for gpu in gpus]


@contextmanager
def _handles() -> Iterator[list[Any]]:
    """NVML's handles of what CUDA_VISIBLE_DEVICES leaves, in its order; they hold within."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        found = []
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(uuids)).split(","):
            index = _index(name.strip(), uuids)
            if index is None:
                break  # as CUDA does: what follows a name that it does not know is not there either
            found.append(handles[index])
        yield found
    finally:
        pynvml.nvmlShutdown()


def _index(name: str, uuids: list[str]) -> int | None:
    """Which GPU a part of CUDA_VISIBLE_DEVICES names: by its number, by the start of its UUID, or by a MIG slice's."""
    if name.isdecimal():
        return int(name) if int(name) < len(uuids) else None
    if name.startswith("MIG-"):
        try:
            slice_ = pynvml.nvmlDeviceGetHandleByUUID(name)
            name = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_))
        except pynvml.NVMLError:
            return None
    return next((index for index, uuid in enumerate(uuids) if name and uuid.startswith(name)), None)


def _torch_has_cuda() -> bool:
    """By the file that says so: importing torch takes a second, and its version need not tell."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] is not None
