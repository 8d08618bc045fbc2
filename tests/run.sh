#!/usr/bin/env bash
# Set up and run the tests: unit, dist (gloo ranks) and e2e (vLLM). Arguments go to pytest.
#   --full   the whole of every matrix, where the default is its corners
# The checks for a GPU run when they are named: bash tests/run.sh tests/gpu
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
. "$root/.venv/bin/activate"
unset PYTHONDONTWRITEBYTECODE # containers set it; every process would then compile torch and Megatron-Core anew

arguments=()
for argument in "$@"; do
    if [[ $argument == --full ]]; then
        arguments+=(-m "full or not full")
    else
        arguments+=("$argument")
    fi
done
cd "$root"
exec python -m pytest "${arguments[@]}"
