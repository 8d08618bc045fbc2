#!/usr/bin/env bash
#SBATCH --job-name=apo
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
# Both stages of a run on the nodes of a SLURM job, one after the other; what is complete is skipped.
#
#   sbatch --nodes=4 launch/run_apo.sh RECIPE [KEY=VALUE ...] [--stage 1|2] [--spare K] [--limit MINUTES]
#   launch/run_apo.sh --dry-run --nodes 4 --gpus 8 RECIPE ...
#
# --stage    this stage alone (stage 1 also as a job array: sbatch --array=0-7 --nodes=1 ...)
# --spare    of the job's nodes, keep so many back, to take the place of bad ones
# --limit    end, save and requeue the job after so long, whatever SLURM's limit is
# --dry-run  outside of SLURM, say what a job of --nodes N with --gpus K each would do, and do nothing
# MEGATRON_APO_SRUN, MEGATRON_APO_PYTHON: more words for srun, and what is Python on the nodes (docs/containers.md)
# Ten minutes before the limit of the job it saves, and is requeued; another --signal=B:USR1@SECONDS may be given to sbatch.
trap "" USR1 # until it is listened to
set -euo pipefail
script=${BASH_SOURCE[0]}
if [[ ! -f $(dirname "$script")/run_apo.sh ]]; then # SLURM runs a copy of it, from another folder
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    script=$(scontrol --oneliner show job "${job:-$SLURM_JOB_ID}" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
fi
root=$(cd "$(dirname "$script")/.." && pwd)
[[ ! -f $root/.venv/bin/activate ]] || . "$root/.venv/bin/activate"
export PYTHONUNBUFFERED=1
exec python -m megatron_apo.cli run-job "$@" # in this process's place, which gets the signals
