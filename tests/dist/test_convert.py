"""Hugging Face -> Megatron -> Hugging Face is bitwise the same, from any layout; mistakes are said before any work."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_apo.learner.checkpoint import read_record
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.runtime import launch
from megatron_apo.stages.convert import hf_to_megatron, megatron_to_hf
from megatron_apo.weights.hf_io import HFReader, model_hash
from tests.dist.checkpoint_worker import recipe_of
from tests.dist.ranks import ROOT, forks, start_ranks, variants_of
from tests.models import VARIANTS, make_model

FILE = "model.safetensors"
LAYOUTS = ["tp2", "pp2-vpp2", "tp2-pp2", "dp2-ep2", "pp2-dp2-ep2"]
FULL_LAYOUTS = ["pp2", "tp4", "pp4", "dp4-ep4"]
ALL_LAYOUTS = LAYOUTS + [pytest.param(layout, marks=pytest.mark.full) for layout in FULL_LAYOUTS]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, converted one after the other in this process."""
    folder = tmp_path_factory.mktemp("convert")
    for name in VARIANTS:
        source = make_model(name, folder / "models")
        (source / "tokenizer.json").write_text('{"a tokenizer": 1}')
        hf_to_megatron(source, folder / "megatron" / name, ranks=1)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def convert(in_process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """`megatron-apo convert ARGUMENTS` in the test's folder and process; the ranks that it starts are forked."""
    monkeypatch.chdir(tmp_path)
    forks()  # which keeps what limits there are when it starts

    def spawn(arguments: Sequence[str], *, world_size: int, log_dir: Path) -> None:
        most_bytes, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        told = ("convert", str(tmp_path), str(most_bytes), *arguments[1:])
        try:
            start_ranks("tests.dist.convert_worker", log_dir, f"dp{world_size}", *told)
        except pytest.fail.Exception as failure:
            if "took too long" in str(failure):
                raise
            raise launch.RankFailed("", 1) from None  # it has said why
        finally:
            print((log_dir / "rank0.log").read_text(), end="")
            print((log_dir / "rank0.errors").read_text(), end="", file=sys.stderr)

    monkeypatch.setattr(launch, "spawn", spawn)
    return partial(in_process, "convert")


def convert_apart(folder: Path, *arguments: object, program: Sequence[str] = ("-m", "megatron_apo.cli", "convert")):
    """The same as processes of their own."""
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_bitwise(name, dtype, work, tmp_path):
    source, megatron = work / "models" / name, work / "megatron" / name
    if dtype != "fp32":
        source, megatron = shutil.copytree(source, tmp_path / "source"), tmp_path / "megatron"
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        save_file({key: tensor.to(kind) for key, tensor in weights(source).items()}, source / FILE)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"dtype": str(kind).removeprefix("torch.")}))
        hf_to_megatron(source, megatron, ranks=1)
    megatron_to_hf(megatron, tmp_path / "hf", ranks=1)
    assert_same(weights(tmp_path / "hf"), weights(source))
    assert read_record(megatron).model_hash == model_hash(source) == model_hash(tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == '{"a tokenizer": 1}'
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_any_layout_loads_it(layout, work):
    names = variants_of(layout)
    start_ranks("tests.dist.convert_worker", work, layout, "load", *names)
    found = torch.load(work / f"loaded-{layout}.pt", weights_only=True)
    assert sorted(found) == sorted(names)
    for name in names:
        assert_same(found[name], weights(work / "models" / name))


def test_two_ranks_write_what_one_does(work, convert, tmp_path):
    source = work / "models" / "qwen3_moe"
    result = convert("hf-to-megatron", "--hf", source, "--out", "m", "--ranks", 2)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(list((tmp_path / "m").glob("*.distcp"))) == 2
    result = convert("megatron-to-hf", "--megatron", "m", "--out", "hf", "--max-shard-size", "100kB", "--ranks", 2)
    assert (result.returncode, result.stderr) == (0, "")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and all((tmp_path / "hf" / file).stat().st_size < 110_000 for file in files)
    merged = {name: tensor for file in files for name, tensor in load_file(tmp_path / "hf" / file).items()}
    assert_same(merged, weights(source))
    assert model_hash(tmp_path / "hf") == model_hash(source)
    told = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert told["model_hash"] == model_hash(source) and told["versions"]["megatron-core"]
    named = [name for row in told["mapping"] for name in row["hugging_face"]]
    assert sorted(named) == sorted(merged)
    result = convert("verify", "--hf", "hf", "--megatron", "m", "--ranks", 2)  # through the index
    assert result.returncode == 0, result.stderr
    data = tmp_path / "m" / "__1_0.distcp"  # which the second rank alone reads
    data.write_bytes(data.read_bytes()[:1000])
    result = convert_apart(tmp_path, "megatron-to-hf", "--megatron", "m", "--out", "hf2", "--ranks", 2)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "error: rank 1: CheckpointError: m: the checkpoint could not be read: " in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m"]


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_little_more_than_a_parameter_is_held(direction, work, tmp_path, monkeypatch):
    """Bytes of all tensors alive at a time, while a model of many is read and written."""
    from megatron_apo.weights.conversion import CheckpointTensors, Conversion

    alive: dict[int, int] = {}
    most = 0

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        tensor = tensor.clone()  # as if nothing were mapped
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        most = max(most, sum(alive.values()))
        return tensor

    get, pieces, read = HFReader.get, Conversion.pieces, CheckpointTensors.get
    monkeypatch.setattr(HFReader, "get", lambda *a: counted(get(*a)))
    monkeypatch.setattr(Conversion, "pieces", lambda *a: {key: counted(piece) for key, piece in pieces(*a).items()})
    monkeypatch.setattr(CheckpointTensors, "get", lambda *a: [counted(tensor) for tensor in read(*a)])
    if direction == "hf-to-megatron":
        hf_to_megatron(work / "models" / "llama", tmp_path / "m", ranks=1)
    else:
        megatron_to_hf(work / "megatron" / "llama", tmp_path / "hf", ranks=1)
    sizes = [tensor.nbytes for tensor in weights(work / "models" / "llama").values()]
    assert max(sizes) <= most <= 6 * max(sizes) < sum(sizes) / 2


def test_a_training_checkpoint_becomes_a_model(work, tmp_path):
    (tmp_path / "vstar").mkdir()
    (tmp_path / "vstar" / "manifest.json").write_text("{}")
    for role in ("models", "references"):
        shutil.copytree(work / "models" / "qwen3-tied", tmp_path / role / "qwen3-tied")
    start_ranks("tests.dist.checkpoint_worker", tmp_path, "tp2", "run:2:2:trained")
    trained = torch.load(tmp_path / "trained.pt", weights_only=True)["weights"]
    checkpoint = recipe_of(tmp_path, "run", 2).run.dir / "checkpoints" / "step-000002"
    megatron_to_hf(checkpoint, tmp_path / "hf", ranks=1)
    assert_same(weights(tmp_path / "hf"), trained)
    assert not torch.equal(trained["model.norm.weight"], weights(work / "models" / "qwen3-tied")["model.norm.weight"])


def test_dtypes(work, tmp_path):
    source = work / "models" / "llama"
    original = weights(source)
    hf_to_megatron(source, tmp_path / "bf16", "bf16", ranks=1)
    record = read_record(tmp_path / "bf16")
    assert (record.dtype, record.model_hash) == ("bf16", None)
    megatron_to_hf(tmp_path / "bf16", tmp_path / "hf", ranks=1)
    rounded = {name: tensor.bfloat16() for name, tensor in original.items()}
    assert_same(weights(tmp_path / "hf"), rounded)
    megatron_to_hf(tmp_path / "bf16", tmp_path / "wide", "fp32", ranks=1)
    assert_same(weights(tmp_path / "wide"), {name: tensor.float() for name, tensor in rounded.items()})
    hf_to_megatron(tmp_path / "hf", tmp_path / "kept", ranks=1)  # bf16 as it is
    assert read_record(tmp_path / "kept").model_hash == model_hash(tmp_path / "hf")


def test_a_dtype_that_must_be_chosen(work, tmp_path):
    source = shutil.copytree(work / "models" / "llama", tmp_path / "mixed")
    tensors = weights(source)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].half()}, source / FILE)
    with pytest.raises(ValueError, match="tensors are float16, float32; choose what to write with --dtype"):
        hf_to_megatron(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_fp8_blocks_and_pytorch_files(work, convert, tmp_path):
    """An FP8 checkpoint in PyTorch's files becomes a plain bf16 one."""
    source = shutil.copytree(work / "models" / "qwen3", tmp_path / "fp8")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (source / "config.json").write_text(json.dumps(config))
    stored, expected = {}, {}
    for name, tensor in weights(source).items():
        stored[name] = expected[name] = tensor.bfloat16()
        if "_proj" in name:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = torch.tensor([[0.75]])
            expected[name] = (stored[name].float() * 0.75).bfloat16()
    (source / FILE).unlink()
    torch.save(stored, source / "pytorch_model.bin")
    hf_to_megatron(source, tmp_path / "m", ranks=1)
    megatron_to_hf(tmp_path / "m", tmp_path / "hf", ranks=1)
    assert_same(weights(tmp_path / "hf"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    result = convert("verify", "--hf", "fp8", "--megatron", "m", "--ranks", 1)
    assert result.returncode == 0, result.stderr


def text_tokenizer(folder: Path) -> None:
    """A tokenizer.model trained by SentencePiece, as Llama 2 has one."""
    corpus = [f"the answer to {a} plus {b} is {a + b}." for a in range(40) for b in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=90,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False}))


def json_tokenizer(folder: Path) -> None:
    from megatron_apo.data.arithmetic import build_tokenizer

    build_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "text"), [(text_tokenizer, "the answer to 7 plus 12 is 19."), (json_tokenizer, "12+34=46")]
)
def test_tokenizers_templates_and_generation_settings_travel(make, text, work, tmp_path):
    source = shutil.copytree(work / "models" / "llama", tmp_path / "source")
    (source / "tokenizer.json").unlink()
    make(source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": true}')
    hf_to_megatron(source, tmp_path / "m", ranks=1)
    megatron_to_hf(tmp_path / "m", tmp_path / "hf", ranks=1)
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "hf"))
    ids = before(text)["input_ids"]
    assert len(ids) > 3 and after(text)["input_ids"] == ids
    assert after.decode(ids, skip_special_tokens=True).strip() == text
    assert after.special_tokens_map == before.special_tokens_map and after.eos_token_id is not None
    chat = [{"role": "user", "content": text}]
    assert after.apply_chat_template(chat, tokenize=False) == text
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf").to_dict()
    assert settings == transformers.GenerationConfig.from_pretrained(source).to_dict()
    assert settings["eos_token_id"] == [1, 2] and settings["temperature"] == 0.6


def test_a_killed_conversion_leaves_no_checkpoint_and_can_be_run_again(work, tmp_path):
    source = work / "models" / "llama"
    arguments = ["hf-to-megatron", "--hf", str(source), "--out", "m", "--ranks", "2"]
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-m", "megatron_apo.cli", "convert", *arguments], cwd=tmp_path)
        while not list(tmp_path.glob(".m.partial/*.distcp")) and process.poll() is None:
            time.sleep(0.002)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert not psutil.wait_procs(ranks, timeout=30)[1]
        if not (tmp_path / "m").exists():
            break
        shutil.rmtree(tmp_path / "m")  # it was done before the kill, as on a busy machine: again
    else:
        pytest.fail("ten conversions were done before the kill")
    result = convert_apart(tmp_path, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    megatron_to_hf(tmp_path / "m", tmp_path / "hf", ranks=1)
    assert_same(weights(tmp_path / "hf"), weights(source))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(direction, ranks, work, convert, tmp_path):
    """A limit on file sizes stands for it: tensors do not fit one way, the room laid out for them the other way."""
    source = ["--hf", work / "models" / "llama"]
    if direction == "megatron-to-hf":
        source = ["--megatron", work / "megatron" / "llama"]
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))  # Python ignores the signal of a file too large
    try:
        result = convert(direction, *source, "--out", "out", "--ranks", ranks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "File too large" in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_any_work(work, tmp_path, monkeypatch):
    usage = shutil.disk_usage(work)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"output folder: .*out needs 0.4 MB, 0.0 MB are free"):
        hf_to_megatron(work / "models" / "llama", tmp_path / "out", ranks=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "source", "says"),
    [
        ("hf-to-megatron --hf", "nowhere", "model path nowhere: no config.json there"),
        ("hf-to-megatron --hf", "mamba", "model_type 'mamba' is not supported; supported: "),
        ("megatron-to-hf --megatron", "mamba", "mamba: no checkpoint.json there"),
        ("megatron-to-hf --max-shard-size 5XB --megatron", "mamba", "--max-shard-size: '5XB' is not a size"),
        ("hf-to-megatron --dtype fp8 --hf", "mamba", "fp8"),
    ],
)
def test_mistakes_are_one_line_before_any_work(command, source, says, convert, tmp_path):
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    result = convert(*command.split(), source, "--out", "out")
    assert result.returncode in (1, 2) and says in result.stderr and "Traceback" not in result.stderr
    if "--dtype" not in command:  # that is typer's own, in a box
        assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mamba"]


@pytest.mark.parametrize("direction", [hf_to_megatron, megatron_to_hf])
def test_an_output_folder_in_use_is_left_alone(direction, work, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    source = work / ("models" if direction is hf_to_megatron else "megatron") / "llama"
    with pytest.raises(ValueError, match=f"output folder: {tmp_path} is not empty"):
        direction(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_damaged_checkpoint_is_one_line(work, tmp_path):
    shutil.copytree(work / "megatron" / "llama", tmp_path / "damaged")
    data = next((tmp_path / "damaged").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="damaged: the checkpoint could not be read: ") as caught:
        megatron_to_hf(tmp_path / "damaged", tmp_path / "hf", ranks=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_tensors_of_a_checkpoint_that_do_not_fit_the_model_are_told_by_pattern(work, tmp_path):
    folder = shutil.copytree(work / "megatron" / "llama", tmp_path / "m")
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    changes = {"tie_word_embeddings": True, "intermediate_size": 97, "num_hidden_layers": 3}
    path.write_text(json.dumps(config | changes))
    with pytest.raises(RuntimeError) as caught:
        megatron_to_hf(folder, tmp_path / "hf", ranks=1)
    lines = [line.removeprefix(f"{folder}: ") for line in str(caught.value).splitlines()]
    assert "output_layer.weight is no tensor of this llama" in lines  # a head must not be lost
    assert "decoder.layers.3.mlp.linear_fc2.weight is no tensor of this llama" in lines
    down = "decoder.layers.[0-2].mlp.linear_fc2.weight (3 tensors, the first decoder.layers.0.mlp.linear_fc2.weight)"
    assert f"{down} has shape [48, 96], expected [48, 97]" in lines
    path.write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(RuntimeError, match="decoder.layers.4.self_attention.linear_qkv.weight is missing"):
        megatron_to_hf(folder, tmp_path / "hf", ranks=1)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_other_bits_than_were_converted_are_not_exported(work, tmp_path):
    folder = shutil.copytree(work / "megatron" / "llama", tmp_path / "m")
    record = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(record | {"model_hash": "0" * 64}))
    with pytest.raises(RuntimeError, match="its weights are not those that it was converted from"):
        megatron_to_hf(folder, tmp_path / "hf", ranks=1)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_sigterm_while_writing_ends_as_sigterm(work, tmp_path):
    script = f"""
import os, signal, sys
from megatron_apo import cli
from megatron_apo.weights.hf_io import HFReader
get = HFReader.get
HFReader.get = lambda *a: os.kill(os.getpid(), signal.SIGTERM) or get(*a)
sys.argv = ["x", "convert", "hf-to-megatron", "--hf", {str(work / "models" / "llama")!r}, "--out", "a/b/m", "--ranks=1"]
cli.main()
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 143, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_folder_is_filled(work, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    hf_to_megatron(work / "models" / "llama", tmp_path / "link", ranks=1)
    assert read_record(tmp_path / "disk").dtype == "fp32" and (tmp_path / "link").is_symlink()


def test_verify_compares_bits_and_log_probs(work, convert, tmp_path):
    source = shutil.copytree(work / "models" / "qwen3-tied", tmp_path / "hf")
    (source / "tokenizer.json").unlink()
    json_tokenizer(source)
    (tmp_path / "prompts.txt").write_text("12+34=46\n\n<think>1+2</think>3\n")
    both = ["--hf", "hf", "--megatron", work / "megatron" / "qwen3-tied"]
    prompts = ["--prompts", "prompts.txt", "--tolerance", "1e-5"]
    result = convert("verify", *both, *prompts, "--tp", 2, "--ranks", 2)
    assert result.returncode == 0, result.stderr
    tensors = len(weights(source))
    assert f"{tensors} of {tensors} tensors equal" in result.stdout and "TP 2 x PP 1" in result.stdout
    changed = weights(source)
    changed["model.layers.2.self_attn.k_norm.weight"].view(torch.int32)[3] ^= 1
    save_file(changed, source / FILE)
    result = convert("verify", *both, "--ranks", 2)
    assert result.returncode == 1 and f"{tensors - 1} of {tensors} tensors equal" in result.stdout
    assert result.stderr == "error: differ: model.layers.2.self_attn.k_norm.weight\n"
    changed["model.layers.2.self_attn.k_norm.weight"][3] += 1e-2
    save_file(changed, source / FILE)
    result = convert("verify", *both, *prompts, "--only", "log-probs")
    assert result.returncode == 1 and "error: log-probs differ by" in result.stderr


def test_verify_refuses_what_cannot_be_compared(work, convert, tmp_path):
    both = ["--hf", work / "models" / "qwen3", "--megatron", work / "megatron" / "qwen3-tied"]
    result = convert("verify", *both)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "tied is True, but False in" in result.stderr and "head_dim is 12, but 20 in" in result.stderr
    both = ["--hf", work / "models" / "qwen2-tied-one-group", "--megatron", work / "megatron" / "qwen2-tied-one-group"]
    result = convert("verify", *both, "--tp", 3)
    assert result.returncode == 1 and "--prompts: missing" in result.stderr
    (tmp_path / "prompts.txt").write_text("1+2")
    result = convert("verify", *both, "--tp", 3, "--prompts", "prompts.txt")
    assert result.returncode == 1 and "parallel.tp: 3 does not fit 4 heads in 1 query groups" in result.stderr
    assert "[1, 2, 4]" in result.stderr


def test_the_scripts_are_the_commands(work, tmp_path):
    scripts = ROOT / "checkpoints_convert"
    source = work / "models" / "llama"
    for script, *arguments in (
        ("hf_to_megatron", "--hf", source, "--out", "m"),
        ("megatron_to_hf", "--megatron", "m", "--out", "hf"),
        ("verify", "--hf", source, "--megatron", "m"),
    ):
        result = convert_apart(tmp_path, *arguments, "--ranks", 1, program=[scripts / f"{script}.py"])
        assert (result.returncode, result.stderr) == (0, "")
    assert_same(weights(tmp_path / "hf"), weights(source))
    assert read_hf_config(tmp_path / "hf") == read_hf_config(source)
