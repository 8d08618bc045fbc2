#!/usr/bin/env bash
# Set up and run the demonstration: both stages of A*-PO, on this machine's CPU. Arguments go to
# `megatron-apo quickstart` (--seed, --out, section.key=value).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
. "$root/.venv/bin/activate"
unset PYTHONDONTWRITEBYTECODE # containers set it; every process would then compile torch and Megatron-Core anew
exec megatron-apo quickstart "$@"
