#!/usr/bin/env bash
# Run every GPU check, one after the other, each for at most ten minutes: bash tests/gpu/run.sh [FOLDER]
# Tables go to the terminal and to FOLDER/<check>.txt (default: gpu-checks). Ends with 1 where a check failed, and with 77
# where none could run. A check that could not run (exit code 77) is named and is no failure.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(realpath -m "${1:-gpu-checks}")
cd "$root"
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "tests/gpu: needs a GPU" >&2
    exit 77
fi
mkdir -p "$out"

failed=() not_run=0 all=0
check() { # NAME, then the check and its arguments
    local name=$1
    shift
    ((all += 1))
    echo "== $*"
    timeout --kill-after=10 600 "$python" -W ignore -m "tests.gpu.$1" "${@:2}" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    case $code in
        0) ;;
        77) echo "== $name: not run" && ((not_run += 1)) ;;
        124) echo "== $name: took more than ten minutes" && failed+=("$name") ;;
        *) failed+=("$name") ;;
    esac
}

check parity parity
check fp8_speed fp8_speed
check placement placement
check step-1.5B step --shape 1.5B
check step-7B step --shape 7B
check logprob_head logprob_head
if ((${#failed[@]})); then
    echo "== failed: ${failed[*]}"
    exit 1
fi
((not_run < all)) || exit 77
