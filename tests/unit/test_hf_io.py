"""Hugging Face folders: every problem found, an identity that sees every bit, whole output or none."""

from __future__ import annotations

import json
import os
import shutil

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_apo.model.hf_config import ModelConfigError, read_hf_config
from megatron_apo.weights import hf_io
from megatron_apo.weights.families import hf_tensors
from megatron_apo.weights.hf_io import HFReader, dequantize, known_model_hash, model_hash
from megatron_apo.weights.hf_writer import write_hf_folder
from megatron_apo.weights.plan import TensorMeta
from tests.models import make_model

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(name, folder) for name in ("qwen3", "qwen2-tied-one-group", "qwen3_moe")}


@pytest.fixture
def model(originals, tmp_path):
    """A copy of an untied model that a test may damage."""
    return shutil.copytree(originals["qwen3"], tmp_path / "model")


@pytest.fixture
def tied(originals, tmp_path):
    return shutil.copytree(originals["qwen2-tied-one-group"], tmp_path / "tied")


@pytest.fixture(scope="module")
def fused(originals, tmp_path_factory):
    """The mixture as transformers saves it with each layer's experts in one."""
    folder = tmp_path_factory.mktemp("fused") / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(originals["qwen3_moe"])
    model.save_pretrained(folder, save_original_format=False)
    return folder


def change(folder, **tensors):
    """Rewrite the weights file with these tensors changed; None removes one. `__` stands for a dot."""
    changes = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    weights = load_file(folder / FILE) | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / FILE)


def shard(folder, parts):
    """Replace the weights file by these ones, each a list of names, and an index."""
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, folder / file)
    index = {name: file for file, names in parts.items() for name in names}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def halves(folder):
    names = sorted(load_file(folder / FILE))
    return {"a.safetensors": names[::2], "b.safetensors": names[1::2]}


def check(folder):
    HFReader(folder).check(read_hf_config(folder))


def write(weights, source, out, **options):
    metadata = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
    write_hf_folder(iter(weights.items()), metadata, source, out, **options)


def test_sound_folders_pass(model, tied):
    check(model)
    check(tied)
    shard(model, halves(model))
    check(model)


def test_missing_extra_and_misshapen_come_all_at_once(model):
    change(
        model,
        model__norm__weight=None,
        model__layers__3__self_attn__q_norm__weight=None,
        model__layers__0__self_attn__bias=torch.zeros(3),
        lm_head__weight=torch.zeros(101, 47),
        model__layers__0__input_layernorm__weight=torch.zeros(48, dtype=torch.int64),
    )
    with pytest.raises(ModelConfigError) as error:
        check(model)
    assert str(error.value).splitlines() == [
        f"{model}: missing tensor model.layers.3.self_attn.q_norm.weight",
        f"{model}: missing tensor model.norm.weight",
        f"{model}: unknown tensor model.layers.0.self_attn.bias",
        f"{model}: lm_head.weight has shape (101, 47), expected (101, 48)",
        f"{model}: model.layers.0.input_layernorm.weight is I64, expected floating-point numbers",
    ]


def test_a_family_of_names_is_one_line(originals, tmp_path):
    model = shutil.copytree(originals["qwen3_moe"], tmp_path / "model")
    weights = load_file(model / FILE)
    save_file({name.replace("mlp.experts.", "mlp.expert_"): tensor for name, tensor in weights.items()}, model / FILE)
    with pytest.raises(ModelConfigError) as error:
        check(model)
    assert str(error.value).splitlines() == [
        f"{model}: {problem} tensor model.layers.[0-3].mlp.{of}[0-7].{part}_proj.weight "
        f"(32 tensors, the first model.layers.0.mlp.{of}0.{part}_proj.weight)"
        for problem, of, parts in (
            ("missing", "experts.", ("gate", "up", "down")),
            ("unknown", "expert_", ("down", "gate", "up")),
        )
        for part in parts
    ]


def test_buffers_of_old_files_do_not_count(model, originals, tmp_path):
    buffers = {
        f"model.layers.{layer}.self_attn.rotary_emb.{name}": torch.tensor([float("nan")])
        for layer in range(4)
        for name in ("inv_freq", "cos_cached", "sin_cached")
    } | {"model.rotary_emb.inv_freq": torch.ones(10)}
    change(model, **buffers)
    check(model)
    reader = HFReader(model)
    assert not set(buffers) & set(reader.names())
    assert known_model_hash(model, tmp_path / "memo") == model_hash(originals["qwen3"])
    # Files that were put together of others, each with its own.
    shard(model, halves(model))
    for file in ("a.safetensors", "b.safetensors"):
        save_file(load_file(model / file) | buffers, model / file)
    assert model_hash(model) == model_hash(originals["qwen3"])


def test_fused_experts_are_read_as_each_experts_own(fused, originals):
    """transformers writes both layouts; in the other one lie the tensors that a reader gives."""
    spec, apart = read_hf_config(fused), load_file(originals["qwen3_moe"] / FILE)
    assert load_file(fused / FILE).keys() != apart.keys() == hf_tensors(spec).keys()
    check(fused)
    reader = HFReader(fused)
    for name, tensor in apart.items():
        assert name in reader and torch.equal(reader.get(name), tensor), name
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), torch.float32)
    assert reader.dtypes(spec) == {torch.float32}
    assert model_hash(fused) == model_hash(originals["qwen3_moe"])


def test_fused_experts_of_pytorch_files(fused, tmp_path):
    model = shutil.copytree(fused, tmp_path / "model")
    torch.save(load_file(model / FILE), model / "pytorch_model.bin")
    (model / FILE).unlink()
    check(model)
    assert model_hash(model) == model_hash(fused)


def test_one_expert_is_read_without_the_others(tmp_path):
    """Of 64 MiB, what one of 64 experts takes becomes resident, and pages beside it."""
    save_file({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(64, 512, 512)}, tmp_path / FILE)
    reader, process = HFReader(tmp_path), psutil.Process()
    before = process.memory_info().rss
    assert reader.get("model.layers.0.mlp.experts.5.up_proj.weight").sum() == 256 * 512
    assert process.memory_info().rss - before < 8 * 2**20


def test_fused_experts_that_are_not_this_models(fused, tmp_path):
    model = shutil.copytree(fused, tmp_path / "model")
    gate_up = load_file(model / FILE)["model.layers.2.mlp.experts.gate_up_proj"]
    change(
        model,
        model__layers__0__mlp__experts__gate_up_proj=gate_up.mT.contiguous(),  # as Qwen3-VL has it
        model__layers__1__mlp__experts__gate_up_proj=gate_up[:7].clone(),
        model__layers__2__mlp__experts__down_proj=None,
        model__layers__2__mlp__experts__3__up_proj__weight=torch.zeros(40, 48),
        model__layers__3__mlp__experts__gate_up_proj=gate_up.to(torch.float8_e4m3fn),
    )
    with pytest.raises(ModelConfigError) as error:
        check(model)
    experts = "model.layers.{}.mlp.experts"
    assert str(error.value).splitlines() == [
        f"{model}: missing tensor {experts.format(2)}.[0-7].down_proj.weight "
        f"(8 tensors, the first {experts.format(2)}.0.down_proj.weight)",
        f"{model}: {experts.format(0)}.gate_up_proj has shape (8, 48, 80), expected (8, 80, 48)",
        f"{model}: {experts.format(1)}.gate_up_proj has shape (7, 80, 48), expected (8, 80, 48)",
        f"{model}: {experts.format(3)}.gate_up_proj is FP8, which is read of matrices alone, each expert's apart",
        f"{model}: {experts.format(2)}.3.up_proj.weight is there apart and among the fused experts; remove one",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_have_no_hash(model, tmp_path, dtype, value):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(model / FILE).items()}
    save_file(weights, model / FILE)
    model_hash(model)
    weights["model.layers.3.mlp.down_proj.weight"][47, 95] = value
    save_file(weights, model / FILE)
    with pytest.raises(ModelConfigError) as error:
        known_model_hash(model, tmp_path / "memo")
    assert str(error.value) == (
        f"{model}: a tensor holds NaN or infinity (model.layers.3.mlp.down_proj.weight); give a folder of finite "
        "weights, such as an earlier export"
    )
    assert not (tmp_path / "memo").exists()
    for name in weights:
        weights[name].fill_(value)
    save_file(weights, model / FILE)
    with pytest.raises(ModelConfigError, match=f"{len(weights)} tensors hold .* and {len(weights) - 8} more"):
        model_hash(model)


def test_an_infinite_scale_of_fp8_blocks_has_no_hash(model):
    change(
        model,
        model__layers__1__mlp__up_proj__weight=torch.ones(96, 48).to(torch.float8_e4m3fn),
        model__layers__1__mlp__up_proj__weight_scale_inv=torch.tensor([[float("inf")]]),
    )
    with pytest.raises(ModelConfigError, match="a tensor holds NaN or infinity .model.layers.1.mlp.up_proj.weight"):
        model_hash(model)


def test_a_folder_that_is_no_whole_model_has_no_known_hash(model, tmp_path):
    change(model, model__norm__weight=None)
    with pytest.raises(ModelConfigError, match="missing tensor model.norm.weight"):
        known_model_hash(model, tmp_path / "memo")


def test_folders_without_weights(tmp_path, model):
    with pytest.raises(ModelConfigError, match="not a folder"):
        HFReader(tmp_path / "absent")
    (model / FILE).unlink()
    with pytest.raises(ModelConfigError, match="no model.safetensors or pytorch_model.bin there"):
        HFReader(model)


def test_an_index_that_names_an_absent_file(model):
    shard(model, halves(model))
    (model / "b.safetensors").unlink()
    with pytest.raises(ModelConfigError, match="b.safetensors: missing or damaged"):
        HFReader(model)


def test_every_bad_file_and_every_lie_of_an_index_is_named(model):
    parts = halves(model)
    shard(model, parts)
    for file in parts:
        (model / file).write_bytes((model / file).read_bytes()[:-1])
    with pytest.raises(ModelConfigError) as error:
        HFReader(model)
    assert [line.split(": missing or damaged")[0] for line in str(error.value).splitlines()] == [
        f"{model}/{file}" for file in parts
    ]


def test_an_index_that_names_the_wrong_file(model):
    parts = halves(model)
    shard(model, parts)
    path = model / f"{FILE}.index.json"
    index = json.loads(path.read_text())
    name = parts["a.safetensors"][0]
    index["weight_map"][name] = "b.safetensors"
    index["weight_map"]["model.extra"] = "a.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelConfigError) as error:
        HFReader(model)
    assert str(error.value).splitlines() == sorted(
        [
            f"{model}/b.safetensors: {name} is not there, though the index says so",
            f"{model}/a.safetensors: model.extra is not there, though the index says so",
        ],
        key=lambda line: line.split(": ")[1],
    )
    path.write_text("{}")
    with pytest.raises(ModelConfigError, match="index.json: not an index"):
        HFReader(model)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", None, 3])
def test_an_index_that_leads_out_of_its_folder(model, file):
    parts = halves(model)
    shard(model, parts)
    shutil.copy(model / "a.safetensors", model.parent / "outside.safetensors")
    path = model / f"{FILE}.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {name: file for name in parts["a.safetensors"]}
    path.write_text(json.dumps(index))
    with pytest.raises(ModelConfigError) as error:
        HFReader(model)
    assert str(error.value) == (
        f"{path}: weight_map leads to {json.dumps(file)}; only names of files in its folder are read, move the weights "
        "there"
    )


class Innocent:
    """What a pickle must not be able to make."""


def test_pytorch_files_are_read_and_never_unpickled(model):
    weights = load_file(model / FILE)
    identity = model_hash(model)
    (model / FILE).unlink()
    torch.save(weights, model / "pytorch_model.bin")
    check(model)
    assert model_hash(model) == identity
    names = sorted(weights)
    files = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    (model / "pytorch_model.bin").unlink()
    for file, members in files.items():
        torch.save({name: weights[name] for name in members}, model / file)
    index = {name: file for file, members in files.items() for name in members}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert model_hash(model) == identity
    torch.save({"weights": Innocent()}, model / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ModelConfigError, match="00002-of-00002.bin: missing or damaged weights file"):
        HFReader(model)


def test_a_head_is_held_against_its_embedding_by_bits(tied):
    """Whatever they are: NaN is NaN, and number formats that torch lacks are none that can be compared."""
    embedding = load_file(tied / FILE)["model.embed_tokens.weight"]
    embedding[3, 4] = float("nan")
    change(tied, model__embed_tokens__weight=embedding, lm_head__weight=embedding.clone())
    check(tied)
    for head in (embedding.bfloat16(), embedding[:100].clone(), -embedding):
        change(tied, lm_head__weight=head)
        with pytest.raises(ModelConfigError, match="lm_head.weight differs from the embedding"):
            check(tied)


def test_fp8_blocks_are_dequantized(model):
    name = "model.layers.1.mlp.up_proj.weight"
    torch.manual_seed(1)
    weight = torch.randn(96, 48).to(torch.float8_e4m3fn)
    change(
        model,
        model__layers__1__mlp__up_proj__weight=weight,
        model__layers__1__mlp__up_proj__weight_scale_inv=torch.tensor([[0.5]]),
    )
    check(model)
    reader = HFReader(model)
    assert reader.dtype(name) == torch.bfloat16 and name + "_scale_inv" not in reader.names()
    assert torch.equal(reader.get(name), (weight.float() * 0.5).bfloat16())
    change(model, model__layers__1__mlp__up_proj__weight_scale_inv=torch.ones(2, 1))
    with pytest.raises(ModelConfigError, match=r"_scale_inv has shape \(2, 1\), expected \(1, 1\)"):
        check(model)
    change(model, model__layers__1__mlp__up_proj__weight_scale_inv=None)
    with pytest.raises(ModelConfigError, match="up_proj.weight is FP8 without"):
        check(model)


def test_each_fp8_block_has_its_scale():
    weight, scale = torch.ones(130, 257).to(torch.float8_e4m3fn), torch.arange(1.0, 7.0).reshape(2, 3)
    full = dequantize(weight, scale)
    assert full.shape == weight.shape and full.dtype == torch.bfloat16
    assert [full[row, column].item() for row in (0, 127, 128, 129) for column in (0, 127, 128, 255, 256)] == [
        1, 1, 2, 2, 3, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 4, 4, 5, 5, 6,
    ]  # fmt: skip


@pytest.mark.parametrize("keep", [0.5, 0.001, 0])
def test_a_truncated_file(model, keep):
    data = (model / FILE).read_bytes()
    (model / FILE).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelConfigError, match="model.safetensors: missing or damaged"):
        HFReader(model)


def test_a_tensor_in_two_files_is_refused(model):
    # Which of the two holds would depend on the order of file names.
    weights = load_file(model / FILE)
    norm = {"model.norm.weight": weights["model.norm.weight"] + 1}
    save_file(norm, model / "consolidated.safetensors")
    check(model)  # transformers reads model.safetensors alone as well
    parts = halves(model)
    shard(model, parts)
    (holder,) = [file for file, names in parts.items() if "model.norm.weight" in names]
    (other,) = parts.keys() - {holder}
    save_file(load_file(model / other) | norm, model / other)
    with pytest.raises(ModelConfigError, match="model.norm.weight is in a.safetensors and in b.safetensors"):
        HFReader(model)


def test_a_tied_checkpoint_may_repeat_its_embedding(tied):
    embedding = load_file(tied / FILE)["model.embed_tokens.weight"]
    change(tied, lm_head__weight=embedding.clone())
    check(tied)
    embedding[100, 47] += 1e-3
    change(tied, lm_head__weight=embedding)
    with pytest.raises(ModelConfigError, match="lm_head.weight differs from the embedding"):
        check(tied)
    change(tied, model__embed_tokens__weight=None)
    with pytest.raises(ModelConfigError, match="missing tensor model.embed_tokens.weight"):
        check(tied)


def test_model_hash_is_of_the_weights_not_their_files(model):
    identity = model_hash(model)
    assert len(identity) == 64
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert model_hash(model) == identity
    parts = halves(model)
    shard(model, parts)
    assert model_hash(model) == identity


def test_model_hash_sees_one_bit_a_name_a_shape_and_a_dtype(model):
    weights = load_file(model / FILE)
    name = "model.layers.2.mlp.up_proj.weight"
    flipped = weights[name].clone()
    flipped.view(torch.uint8)[5, 7] ^= 1
    zeros = torch.zeros_like(weights["model.norm.weight"])
    seen = {model_hash(model)}
    for changes in (
        {name: flipped},
        {name: weights[name].view(48, 96)},
        {name: weights[name].view(torch.int32)},
        {name: None, name + "2": weights[name]},
        {"model.norm.weight": zeros},
        {"model.norm.weight": -zeros},  # equal as numbers
        {"model.norm.weight": weights["model.norm.weight"].bfloat16()},
    ):
        save_file({k: v for k, v in (weights | changes).items() if v is not None}, model / FILE)
        seen.add(model_hash(model))
    assert len(seen) == 8


@pytest.mark.parametrize(("limit", "num_files"), [(2**30, 1), (100_000, None)])
def test_written_folders_load_in_transformers(model, tmp_path, limit, num_files):
    weights = load_file(model / FILE)
    (model / "tokenizer_note.txt").write_text("kept")
    (model / "pytorch_model.bin").write_text("old weights")
    out = tmp_path / "new" / "out"
    write(weights, model, out, max_shard_bytes=limit)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    total = sum(tensor.nbytes for tensor in weights.values())
    if num_files == 1:
        assert files == [FILE] and not (out / f"{FILE}.index.json").exists()
    else:
        count = len(files)
        assert total / limit <= count <= 2 * total / limit + 1
        assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        assert all((out / file).stat().st_size < limit + 10_000 for file in files)
        index = json.loads((out / f"{FILE}.index.json").read_text())["weight_map"]
        assert sorted(index) == sorted(weights) and sorted(set(index.values())) == files
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert model_hash(out) == model_hash(model)
    assert (out / "tokenizer_note.txt").read_text() == "kept" and not (out / "pytorch_model.bin").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_written_dtype_is_the_configurations(model, tmp_path):
    weights = load_file(model / FILE)
    write({name: tensor.bfloat16() for name, tensor in weights.items()}, model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    written = load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in weights.items())


def test_an_output_folder_in_use_is_left_alone(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(load_file(model / FILE), model, out)  # empty: taken
    before = model_hash(out)
    with pytest.raises(ValueError, match="not empty"):
        write(load_file(model / FILE), model, out)
    assert model_hash(out) == before


def test_a_failure_in_the_middle_leaves_nothing(model, tmp_path):
    weights = load_file(model / FILE)
    metadata = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]

    def breaking():
        for index, item in enumerate(weights.items()):
            if index == 5:
                raise ConnectionError("a rank is gone")
            yield item

    with pytest.raises(ConnectionError):
        metadata = [
            TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(model / FILE).items()
        ]
        write_hf_folder(breaking(), metadata, model, tmp_path / "out", max_shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_models_hash_is_computed_once_while_its_files_are_the_same(model, tmp_path, monkeypatch):
    computed = []
    usual = hf_io.model_hash
    monkeypatch.setattr(hf_io, "model_hash", lambda folder: computed.append(folder) or usual(folder))
    memo = tmp_path / "run" / "reference_hash.json"
    first = hf_io.known_model_hash(model, memo)
    assert hf_io.known_model_hash(model, memo) == first == usual(model) and len(computed) == 1
    # A byte that changes behind a tool's back: same size, same time of modification.
    path, times = model / FILE, (model / FILE).stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = hf_io.known_model_hash(model, memo)
    assert second == usual(model) != first and len(computed) == 2
    # A memo of before weights were looked at.
    memo.write_text(
        json.dumps({name: value for name, value in json.loads(memo.read_text()).items() if name != "finite"})
    )
    assert hf_io.known_model_hash(model, memo) == second and len(computed) == 3
    # Another folder, and a memo that is damaged.
    shutil.copytree(model, tmp_path / "copy")
    assert hf_io.known_model_hash(tmp_path / "copy", memo) == second and len(computed) == 4
    for damage in ("{", "[]", '{"model_hash": "ab"}', ""):
        memo.write_text(damage)
        assert hf_io.known_model_hash(model, memo) == second
    assert len(computed) == 8 and [path.name for path in memo.parent.iterdir()] == [memo.name]
