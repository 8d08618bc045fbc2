"""Model folders whose files are wrong in ways nobody thought of: each is read, or ends in short lines that name the
file; none takes memory or time because a file says so."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_apo.config import ParallelConfig
from megatron_apo.model.config_types import ROPE, SETTINGS
from megatron_apo.model.hf_config import FAMILIES, ModelConfigError, check_layout, check_served, read_hf_config
from megatron_apo.model.tokenizer import eos_token_ids
from megatron_apo.weights.hf_io import HFReader, model_hash
from tests.models import make_model

FILE = "model.safetensors"
ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 10**12, 10**30, 10**400, 0.5, -0.5, 1e-300, 1e300]
ODD += [
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "4",
    "yarn",
    "fp8",
    "full_attention",
    "a\nb",
    "\ud800",
    "x" * 10**4,
]
ODD += [[], [0], ["full_attention"], [None], [[]], {}, {"": 1}, {"rope_type": "yarn"}, {"quant_method": ["fp8"]}, [{}]]
NOT_OBJECTS = [b"", b"{", b"[]", b"3", b"null", b'"{}"', b"\xff\xfe{}", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**4]


def most(cases: int) -> Any:
    return pytest.param(cases, marks=[pytest.mark.full, pytest.mark.timeout(3600)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture, in one file of a few hundred kB."""
    return make_model("qwen3_moe", tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


def refused(folder: Path, read: Callable[[], object]) -> list[str]:
    """The lines by which `read` refuses the folder; none where it reads it."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines: list[str] = []
    try:
        read()
    except ModelConfigError as error:
        lines = str(error).split("\n")
        assert lines and len(lines) < 60
        for line in lines:
            assert str(folder) in line and len(line) < 700 and line.isprintable(), line
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    return lines


def read_whole(folder: Path) -> str:
    """As preflight and a fingerprint read it."""
    spec = read_hf_config(folder)
    HFReader(folder).check(spec)
    return model_hash(folder)


def look_at(folder: Path) -> None:
    """Whatever is worked out of a config.json without weights."""
    spec = read_hf_config(folder)
    assert spec.num_weights > 0
    for check in (lambda: check_layout(spec, ParallelConfig(tp=3, pp=7, ep=5)), lambda: check_served(spec)):
        try:
            check()
        except ModelConfigError:
            pass


@pytest.mark.parametrize("cases", [300, most(10_000)])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_setting(family: str, cases: int, folder: Path) -> None:
    """Those that are refused are so by name."""
    path = folder / "config.json"
    base = json.loads(path.read_text()) | {"model_type": family, "num_experts_per_tok": 3, "sliding_window": None}
    if family != "qwen3_moe":
        del base["num_local_experts"]
    num_refused = 0
    told = [((key,), value) for key in [*SETTINGS, "model_type", "use_mrope", "bias"] for value in ODD]
    told += [((rope, key), value) for rope in ("rope_scaling", "rope_parameters") for key in ROPE for value in ODD]
    told = random.Random(family).sample(told, min(cases, len(told)))
    for keys, value in told:
        config = base | {keys[0]: value if len(keys) == 1 else {"rope_type": "yarn", "factor": 4.0, keys[1]: value}}
        path.write_text(json.dumps(config))
        lines = refused(folder, lambda: look_at(folder))
        named = keys[-1].removesuffix("_scaling").removesuffix("_parameters")
        named = named.removeprefix("rope_").removeprefix("num_local_")
        assert not lines or any(named in line for line in lines), (keys, value, lines)
        num_refused += bool(lines)
    assert num_refused > len(told) / 2


@pytest.mark.parametrize("cases", [200, most(20_000)])
def test_settings_that_are_odd_together(cases: int, folder: Path) -> None:
    draw, path = random.Random(cases), folder / "config.json"
    base = json.loads(path.read_text())
    for _ in range(cases):
        config = dict(base)
        for key in draw.sample([*SETTINGS, *ROPE], draw.randint(2, 6)):
            config[key] = draw.choice(ODD)
        for key in draw.sample(sorted(base), draw.randint(0, 2)):
            config.pop(key, None)
        path.write_text(json.dumps(config))
        refused(folder, lambda: look_at(folder))


@pytest.mark.parametrize("name", ["config.json", f"{FILE}.index.json", "generation_config.json"])
@pytest.mark.parametrize("data", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
def test_files_of_settings_that_hold_none(data: bytes, name: str, folder: Path) -> None:
    if "index" in name:
        (folder / FILE).unlink()
    (folder / name).write_bytes(data)
    if name == "generation_config.json":
        with pytest.raises(ValueError) as error:
            eos_token_ids(folder)
        lines = str(error.value).split("\n")
    else:
        lines = refused(folder, lambda: read_whole(folder))
    assert len(lines) == 1 and lines[0].startswith(f"{folder / name}: ")


@pytest.mark.parametrize("cases", [100, most(5000)])
def test_indices_that_lie(cases: int, folder: Path) -> None:
    draw = random.Random(cases)
    names = sorted(load_file(folder / FILE))
    (folder / FILE).rename(folder / "a.safetensors")
    path = folder / f"{FILE}.index.json"
    files = [
        *ODD,
        "a.safetensors",
        "b.safetensors",
        "../model/a.safetensors",
        str(folder / "a.safetensors"),
        "config.json",
    ]
    files += ["a.safetensors/", "./a.safetensors", "..", ".", "a\0b", "A.safetensors", "\ud800.bin"]
    sound = {name: "a.safetensors" for name in names}
    path.write_text(json.dumps({"weight_map": sound}))
    assert refused(folder, lambda: read_whole(folder)) == []
    for _ in range(cases):
        weight_map: Any = dict(sound)
        for name in draw.sample(names, draw.randint(1, 3)):
            if draw.random() < 0.2:
                del weight_map[name]
            else:
                weight_map[draw.choice([name, name + "x", "", "\n"])] = draw.choice(files)
        index = {"weight_map": draw.choice(ODD) if draw.random() < 0.1 else weight_map, "metadata": draw.choice(ODD)}
        path.write_text(json.dumps(index))
        lines = refused(folder, lambda: read_whole(folder))
        assert lines or set(weight_map.values()) == {"a.safetensors"}


CODES = [
    "F64",
    "F32",
    "BF16",
    "F16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "X",
    "",
    3,
    None,
]
NUMBERS = [0, 1, -1, 7, 48, 2**31, 2**63, 2**64, 10**30, 0.5, "4", None, [], True]


def lie(draw: random.Random, header: dict[str, Any]) -> None:
    """Change one tensor of a header."""
    name = draw.choice(sorted(header))
    entry = header[name] = json.loads(json.dumps(header[name]))
    other = header[draw.choice(sorted(header))]
    match draw.randrange(8):
        case 0:
            entry["dtype"] = draw.choice(CODES)
        case 1:
            entry["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randint(0, 4))]
        case 2:
            entry["shape"] = draw.choice(ODD)
        case 3:
            entry["data_offsets"] = [draw.choice(NUMBERS) for _ in range(draw.choice([0, 1, 2, 2, 2, 3]))]
        case 4:
            entry["data_offsets"] = other.get("data_offsets")
        case 5:
            del entry[draw.choice(sorted(entry))]
        case 6:
            header[draw.choice(["", "a\nb", "x" * 10**4, "\ud800", "__metadata__", name + "_scale_inv"])] = header.pop(
                name
            )
        case 7:
            header[name] = draw.choice(ODD)


def text_of(draw: random.Random, header: dict[str, Any]) -> bytes:
    """A header as JSON, or as nearly that."""
    text = json.dumps(header).encode()
    match draw.randrange(8):
        case 0:
            name = json.dumps(draw.choice(sorted(header))).encode()
            return text[:-1] + b"," + name + b": " + json.dumps(next(iter(header.values()))).encode() + b"}"  # twice
        case 1:
            return draw.choice(NOT_OBJECTS)
        case 2:
            return text[: draw.randrange(len(text))]
        case 3:
            at = draw.randrange(len(text))
            return text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
    return text


@pytest.mark.parametrize("cases", [300, most(20_000)])
def test_headers_that_lie(cases: int, folder: Path) -> None:
    draw, path = random.Random(cases), folder / FILE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    sound, tensors, identity = json.loads(data[8 : 8 + length]), data[8 + length :], model_hash(folder)
    sound.pop("__metadata__", None)
    num_refused = 0
    for _ in range(cases):
        header = dict(sound)
        for _ in range(draw.randint(0, 2)):
            lie(draw, header)
        text = text_of(draw, header)
        size = (
            draw.choice([0, 1, len(text) - 1, len(data), 10**8, 2**40, 2**63, 2**64 - 1])
            if draw.random() < 0.2
            else len(text)
        )
        whole = (size % 2**64).to_bytes(8, "little") + text + tensors
        path.write_bytes(whole[: draw.randrange(len(whole))] if draw.random() < 0.1 else whole)
        found: list[str] = []
        lines = refused(folder, lambda found=found: found.append(read_whole(folder)))
        num_refused += bool(lines)
        # A name given twice, or another number format of the same size, is no harm to who reads it.
        assert lines or found == [identity] or header != sound or text != json.dumps(sound).encode()
    assert num_refused > cases / 2


@pytest.mark.parametrize("cases", [60, most(5000)])
def test_pytorch_files_that_are_damaged(cases: int, folder: Path) -> None:
    draw, path = random.Random(cases), folder / "pytorch_model.bin"
    torch.save(load_file(folder / FILE), path)
    (folder / FILE).unlink()
    sound = path.read_bytes()
    for _ in range(cases):
        data = bytearray(sound)
        for _ in range(draw.randint(1, 20)):
            data[draw.choice([draw.randrange(len(data)), draw.randrange(20_000), -1 - draw.randrange(10_000)])] = (
                draw.randrange(256)
            )
        path.unlink()  # the one before may still be mapped
        path.write_bytes(data[: draw.randrange(len(data))] if draw.random() < 0.1 else data)
        refused(folder, lambda: read_whole(folder))
