"""What NVML says, translated. It is played by `Nvml`, whose functions are checked against pynvml's own."""

from __future__ import annotations

import inspect
import time
from types import SimpleNamespace

import pynvml
import pytest

from megatron_apo.telemetry.gpu import GpuMonitor, peak_tflops

SLOW = pynvml.nvmlClocksEventReasonHwSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
IDLE = pynvml.nvmlClocksEventReasonGpuIdle
NEVER = 3600.0  # seconds between samples of the thread


class Nvml:
    """A driver with one GPU. `errors`: NVML's error codes by function; `xids`: what has happened to it."""

    def __init__(self, **errors: int):
        self.errors = errors
        self.xids: list[int] = []
        self.open = self.samples = 0
        self.energy_mj = 5_000_000
        self.powers_mw = [300_000, 700_000]
        self.reasons = [IDLE, SLOW]
        self.num_corrected = 4  # another job's

    def __getattribute__(self, name: str):
        if name.startswith("nvml") and (code := self.errors.get(name)):

            def fail(*_: object) -> None:
                raise pynvml.NVMLError(code)

            return fail
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-7"
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> SimpleNamespace:
        self.samples += 1
        return SimpleNamespace(used=self.samples * 10**10, total=8 * 10**10)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=50, memory=7)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self.powers_mw[(self.samples - 1) % 2]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 60 + self.samples

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons[(self.samples - 1) % 2]

    def nvmlDeviceGetTotalEccErrors(self, handle: str, errorType: int, counterType: int) -> int:
        assert counterType == pynvml.NVML_VOLATILE_ECC
        corrected = {pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: True, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: False}
        return self.num_corrected if corrected[errorType] else 1

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.energy_mj

    def nvmlEventSetCreate(self) -> str:
        self.open += 1
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: str, eventTypes: int, eventSet: str) -> None:
        assert (handle, eventTypes, eventSet) == ("handle", pynvml.nvmlEventTypeXidCriticalError, "events")

    def nvmlEventSetWait_v2(self, eventSet: str, timeoutms: int) -> SimpleNamespace:
        assert timeoutms == 0, "the training loop must not wait"
        if not self.xids:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventData=self.xids.pop(0))

    def nvmlEventSetFree(self, eventSet: str) -> None:
        self.open -= 1


def test_the_driver_is_asked_as_pynvml_is() -> None:
    for name, own in inspect.getmembers(Nvml, inspect.isfunction):
        if name.startswith("nvml"):
            real = inspect.signature(getattr(pynvml, name)).parameters
            assert list(inspect.signature(own).parameters)[1:] == list(real), name


def test_samples_become_metrics() -> None:
    nvml = Nvml()
    with GpuMonitor("GPU-7", nvml, NEVER) as gpu:
        nvml.energy_mj += 30_000
        nvml.num_corrected += 2
        assert gpu.pop() == {  # of two samples: one is taken at the start, and pop takes one itself
            "memory_bytes": 2e10,
            "utilization": 0.5,
            "power_w": 500.0,
            "temperature_c": 62,
            "throttled_power": 0.0,
            "throttled_thermal": 0.5,
            "throttled_hardware": 0.5,
            "ecc_corrected": 2,
            "ecc_uncorrected": 0,
            "energy_j": 30.0,
            "xid_events": 0,
        }
        nvml.energy_mj += 7_000
        found = gpu.pop()  # counts anew
        assert (
            found["energy_j"] == 7.0
            and found["ecc_corrected"] == 0
            and found["power_w"] == 300.0
            and found["memory_bytes"] == 3e10
        )
    assert nvml.open == 0, "NVML is left open"


def test_xids_are_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    nvml = Nvml()
    with GpuMonitor("GPU-7", nvml, NEVER) as gpu:
        nvml.xids = [63, 79]
        found = gpu.pop()
        assert (found["xid_events"], found["xid"]) == (2, 79)
        assert capsys.readouterr().out == "GPU-7: the driver reports Xid 63, 79\n"
        assert gpu.pop()["xid_events"] == 0


def test_what_a_gpu_does_not_support_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    nvml = Nvml(
        nvmlDeviceGetTotalEccErrors=pynvml.NVML_ERROR_NOT_SUPPORTED,
        nvmlDeviceGetTotalEnergyConsumption=pynvml.NVML_ERROR_NOT_SUPPORTED,
        nvmlDeviceGetCurrentClocksEventReasons=pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvmlDeviceRegisterEvents=pynvml.NVML_ERROR_NOT_SUPPORTED,
    )
    with GpuMonitor("GPU-7", nvml, NEVER) as gpu:
        for _ in range(2):
            assert set(gpu.pop()) == {"memory_bytes", "utilization", "power_w", "temperature_c"}
    fields = (
        "ecc_corrected, ecc_uncorrected, energy_j, throttled_hardware, throttled_power, throttled_thermal, xid_events"
    )
    assert nvml.open == 0 and capsys.readouterr().out == f"GPU-7: not supported here: {fields}\n"


def test_missing_rights_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    nvml = Nvml(nvmlDeviceGetTotalEccErrors=pynvml.NVML_ERROR_NO_PERMISSION)
    with GpuMonitor("GPU-7", nvml, NEVER) as gpu:
        assert not {"ecc_corrected", "ecc_uncorrected"} & set(gpu.pop())
    line = "GPU-7: no {} in the metrics: NVML says Insufficient Permissions\n"
    assert capsys.readouterr().out == line.format("ecc_corrected") + line.format("ecc_uncorrected")


def test_other_trouble_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    nvml = Nvml()
    with GpuMonitor("GPU-7", nvml, NEVER) as gpu:
        gpu.pop()
        nvml.errors["nvmlDeviceGetPowerUsage"] = pynvml.NVML_ERROR_GPU_IS_LOST
        assert "power_w" not in gpu.pop() and "power_w" not in gpu.pop()
        assert capsys.readouterr().out == "GPU-7: no power_w in the metrics: NVML says GPU is lost\n"
        del nvml.errors["nvmlDeviceGetPowerUsage"]
        assert "power_w" in gpu.pop()


def test_counters_go_on_over_a_reading_that_failed() -> None:
    nvml = Nvml()
    with GpuMonitor("GPU-7", nvml, NEVER) as gpu:
        nvml.errors["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVML_ERROR_TIMEOUT
        nvml.energy_mj += 30_000
        assert "energy_j" not in gpu.pop()
        nvml.errors.clear()
        nvml.energy_mj += 7_000
        assert gpu.pop()["energy_j"] == 37.0


def test_an_error_that_is_not_nvmls_ends_neither_thread_nor_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml = Nvml()
    monkeypatch.setattr(nvml, "nvmlDeviceGetTemperature", None)  # not callable: a TypeError
    with GpuMonitor("GPU-7", nvml, interval_s=0.01) as gpu:
        end = time.monotonic() + 10
        while nvml.samples < 4 and time.monotonic() < end:
            time.sleep(0.01)
        assert nvml.samples >= 4 and "temperature_c" not in gpu.pop()
    assert capsys.readouterr().out.count("no temperature_c in the metrics: ") == 1


@pytest.mark.parametrize(
    "function, code, said",
    [
        ("nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, ""),
        ("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, ""),
        ("nvmlInit", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch"),
        ("nvmlDeviceGetHandleByUUID", pynvml.NVML_ERROR_NOT_FOUND, "Not Found"),
    ],
)
def test_only_where_nvml_is_absent_nothing_is_said(
    capsys: pytest.CaptureFixture[str], function: str, code: int, said: str
) -> None:
    nvml = Nvml(**{function: code})
    with GpuMonitor("GPU-7", nvml, NEVER) as gpu:
        assert gpu.pop() == {}
    told = capsys.readouterr().out
    assert said in told and bool(told) == bool(said) and nvml.open == 0


def test_the_thread_samples() -> None:
    nvml = Nvml()
    with GpuMonitor("GPU-7", nvml, interval_s=0.01) as gpu:
        end = time.monotonic() + 10
        while nvml.samples < 4 and time.monotonic() < end:
            time.sleep(0.01)
        found = gpu.pop()
    assert nvml.samples >= 4 and 0 < found["throttled_thermal"] < 1


@pytest.mark.parametrize(
    "name, bf16",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T4", None),
    ],
)
def test_peak_by_name(name: str, bf16: float | None) -> None:
    assert peak_tflops(name, fp8=False) == bf16
    assert peak_tflops(name, fp8=True) == (None if "A100" in name else bf16 and 2 * bf16)
