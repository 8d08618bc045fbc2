#!/usr/bin/env bash
# Both stages of a run and its evaluation on this machine, with its GPUs or without any; what is complete is skipped.
#
#   launch/run_local.sh RECIPE [KEY=VALUE ...] [--stage 1|2]
#   launch/run_local.sh --dry-run [--gpus N] RECIPE ...
#
# --stage    this stage alone (2 with its evaluation)
# --dry-run  say which commands it would run, here or on a machine with N GPUs, and do nothing
# Ctrl-C ends it; SIGUSR1 has it save first (exit code 75). Started again, it goes on with what is left.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -f $root/.venv/bin/activate ]] || . "$root/.venv/bin/activate"
export PYTHONUNBUFFERED=1
trap "" USR1 # until it is listened to
exec python -m megatron_apo.cli run-local "$@" # in this process's place, which gets the signals
