#!/usr/bin/env bash
# Watch a real language model learn, on a laptop without GPU or hub: SmolLM2-135M-Instruct on sums of reasoning-gym, by
# both stages of A*-PO. Set-up and model take two minutes, the rest about half an hour on two cores; 4 GB of memory.
#
#   launch/real_model.sh [KEY=VALUE ...]
#
# It ends with a report, RUN/report.html. Started again, it goes on with what is left. Another seed shares the V* store:
#
#   launch/real_model.sh run.dir=runs/smollm2-sums-1 run.seed=1 vstar.dir=runs/smollm2-sums/vstar
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
run=runs/smollm2-sums
for argument in "$@"; do
    case $argument in
        run.dir=*) run=${argument#run.dir=} ;;
    esac
done
bash launch/smollm2.sh
. .venv/bin/activate
bash launch/run_local.sh smollm2-sums "$@"
exec megatron-apo report "$run"
