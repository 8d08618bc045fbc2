"""What a rank's GPU did, by NVML (nvidia-ml-py), and what it could do at most.

    with GpuMonitor(gpu_uuid(device)) as gpu:
        ...
    gpu.pop()  # {"power_w": 612.0, "energy_j": 18360.0, ...}: since the last `pop`

| name | what |
|---|---|
| memory_bytes | most in use, by all processes |
| utilization | share of the time in which a kernel ran, mean |
| power_w, energy_j | mean power; energy by the GPU's own counter |
| temperature_c | highest |
| throttled_power, _thermal, _hardware | share of samples with the clocks held down for that reason |
| ecc_corrected, ecc_uncorrected | memory errors since the last `pop`, by the GPU's own counters |
| xid_events, xid | the driver's critical errors since the last `pop`, and the code of the last one if any |

What a GPU does not support is named at the start and left out. Where there is no NVML nothing is measured and nothing
said; any other trouble with it is said once.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import pynvml
import torch

# Peak TFLOP/s of dense bf16 products, by words of the device's name; NVIDIA's data sheets (the figures with sparsity
# halved). FP8 is twice as fast on all but Ampere's, which have none.
_PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "H20": 148.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
}
_NO_FP8 = ("A100", "A800")
_ABSENT = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_UNSUPPORTED = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_VGPU_ECC_NOT_SUPPORTED,
)
_THROTTLES = {
    "power": pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hardware": pynvml.nvmlClocksEventReasonHwSlowdown,
}

Read = Callable[[Any, Any], float]  # (pynvml, handle of the GPU)


def _throttled(mask: int) -> Read:
    return lambda nvml, gpu: bool(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu) & mask)


def _ecc_errors(kind: int) -> Read:
    return lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, pynvml.NVML_VOLATILE_ECC)


# name: how a sample is read, and what stands for the samples of an interval
_FIELDS: dict[str, tuple[Read, Callable[[Sequence[float]], float]]] = {
    "memory_bytes": (lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used, max),
    "utilization": (lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100, fmean),
    "power_w": (lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000, fmean),
    "temperature_c": (lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU), max),
    **{f"throttled_{reason}": (_throttled(mask), fmean) for reason, mask in _THROTTLES.items()},
}
# Counters of the GPU's, which others have used before: a rise counts.
_COUNTERS: dict[str, Read] = {
    "energy_j": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000,
    "ecc_corrected": _ecc_errors(pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
    "ecc_uncorrected": _ecc_errors(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
}


def peak_tflops(name: str, fp8: bool) -> float | None:
    """Peak TFLOP/s of dense bf16 (or FP8) products of the device that CUDA names so; None where it is not known.

    A part of a GPU (MIG) has no figure of its own.
    """
    words = set(re.split(r"[\s-]+", name))
    fitting = [key for key in _PEAK_TFLOPS if words >= set(key.split())]
    if not fitting or "MIG" in words:
        return None
    found = max(fitting, key=len)
    if fp8 and found in _NO_FP8:
        return None
    return _PEAK_TFLOPS[found] * (2 if fp8 else 1)


def gpu_uuid(device: torch.device) -> str:
    """NVML's name of a CUDA device: its indices are others than CUDA's, which CUDA_VISIBLE_DEVICES renumbers."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


class GpuMonitor:
    """Samples one GPU by a thread. Use as a context manager."""

    def __init__(self, uuid: str, nvml: Any = pynvml, interval_s: float = 1.0):
        self._uuid = uuid
        self._nvml = nvml
        self._interval_s = interval_s
        self._gpu: Any = None
        self._events: Any = None
        self._counted: dict[str, float] = {}
        self._samples: defaultdict[str, list[float]] = defaultdict(list)
        self._unsupported: set[str] = set()
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)

    def __enter__(self) -> GpuMonitor:
        try:
            self._nvml.nvmlInit()
        except pynvml.NVMLError as error:
            if error.value not in _ABSENT:
                self._tell("NVML", error)
            return self
        try:
            self._gpu = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except pynvml.NVMLError as error:
            self._tell("NVML", error)
            self._nvml.nvmlShutdown()
            return self
        self._pop_counts()
        self._events = self._read("xid_events", self._watch_xids)
        self.sample()
        if self._unsupported:
            print(f"{self._uuid}: not supported here: {', '.join(sorted(self._unsupported))}", flush=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu is None:
            return
        self._stop.set()
        self._thread.join()
        if self._events is not None:
            self._nvml.nvmlEventSetFree(self._events)
        self._nvml.nvmlShutdown()

    def pop(self) -> dict[str, float]:
        """What was seen since the last `pop`."""
        if self._gpu is None:
            return {}
        self.sample()
        with self._lock:
            samples, self._samples = self._samples, defaultdict(list)
        found = {name: float(_FIELDS[name][1](values)) for name, values in samples.items()}
        found |= self._pop_counts()
        xids = self._read("xid_events", self._pop_xids) if self._events is not None else None
        if xids is not None:
            found["xid_events"] = len(xids)
        if xids:
            found["xid"] = xids[-1]
            print(f"{self._uuid}: the driver reports Xid {', '.join(map(str, xids))}", flush=True)
        return found

    def sample(self) -> None:
        """Read every field once."""
        for name, (read, _) in _FIELDS.items():
            value = self._read(name, read)
            if value is not None:
                with self._lock:
                    self._samples[name].append(value)

    def _pop_counts(self) -> dict[str, float]:
        """By how much each counter has risen since the last call."""
        found = {}
        for name, read in _COUNTERS.items():
            value = self._read(name, read)
            if value is not None:
                if name in self._counted:
                    found[name] = value - self._counted[name]
                self._counted[name] = value
        return found

    def _read(self, name: str, read: Callable[[Any, Any], Any]) -> Any:
        """What `read` gives, or None."""
        if name in self._unsupported:
            return None
        try:
            return read(self._nvml, self._gpu)
        except Exception as error:  # pynvml's own mistakes too: no reading is worth the run, nor the thread
            if isinstance(error, pynvml.NVMLError) and error.value in _UNSUPPORTED:
                self._unsupported.add(name)
            else:
                self._tell(name, error)
            return None

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._told:
            self._told.add(what)
            print(f"{self._uuid}: no {what} in the metrics: NVML says {error}", flush=True)

    def _watch_xids(self, nvml: Any, gpu: Any) -> Any:
        events = nvml.nvmlEventSetCreate()
        try:
            nvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, events)
        except pynvml.NVMLError:
            nvml.nvmlEventSetFree(events)
            raise
        return events

    def _pop_xids(self, nvml: Any, _: Any) -> list[int]:
        codes = []
        while True:
            try:
                codes.append(int(nvml.nvmlEventSetWait_v2(self._events, 0).eventData))
            except pynvml.NVMLError_Timeout:
                return codes

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()
