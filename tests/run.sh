#!/usr/bin/env bash
# Set up and run the tests in two lanes beside each other: unit and dist (gloo ranks) in one, slurm in the other, and the
# files of e2e (vLLM) in the one that is free (tests/lanes.py). Arguments go to pytest, which then runs once.
#   --full   the whole of every matrix, where the default is its corners, and a real model, which is downloaded
# The checks for a GPU run when they are named: bash tests/run.sh tests/gpu
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
. "$root/.venv/bin/activate"
unset PYTHONDONTWRITEBYTECODE # containers set it; every process would then compile torch and Megatron-Core anew
cd "$root"

marks=() arguments=() real=
for argument in "$@"; do
    if [[ $argument == --full ]]; then
        marks=(-m "full or not full") real=+real
    else
        arguments+=("$argument")
    fi
done
if ((${#arguments[@]})); then
    exec python -m pytest "${marks[@]}" "${arguments[@]}"
fi

logs=$(mktemp -d)
trap 'kill $(jobs -rp) 2> /dev/null || true; wait; rm -rf "$logs"' EXIT
# SIGTERM ends a lane as Ctrl-C would (tests/conftest.py). A session of its own keeps Ctrl-C itself from it: once is
# enough, a second would break into what the first has begun to tear down.
interrupt() {
    trap '' INT TERM
    interrupted=$1
    kill "${lanes[@]}" 2> /dev/null || true
}
trap 'interrupt 130' INT
trap 'interrupt 143' TERM
export TESTS_STARTED_BY=$$ # a lane ends with this script, however that ends

color=no
[[ -t 1 ]] && color=yes
export TESTS_CLAIMS=$logs/.claims # of the files that the lanes share
mkdir "$TESTS_CLAIMS"
names=(unit+dist+e2e slurm$real+e2e) lanes=()
for name in "${names[@]}"; do
    [[ -z ${interrupted:-} ]] || break
    read -ra folders <<< "tests/${name//+/ tests/}"
    setsid python -u -m pytest -p no:cacheprovider -p tests.lanes --durations=25 --color=$color \
        --continue-on-collection-errors "${marks[@]}" "${folders[@]}" > "$logs/$name" 2>&1 < /dev/null &
    lanes+=($!)
done

status=0
for index in "${!lanes[@]}"; do
    echo "== ${names[index]}"
    tail --lines=+1 --follow --pid="${lanes[index]}" "$logs/${names[index]}" &
    while kill -0 "${lanes[index]}" 2> /dev/null; do
        wait "${lanes[index]}" || true # a signal ends it too
    done
    wait "${lanes[index]}" || status=1
    wait $! || true
done
echo "== both"
cd "$logs"
grep -hE '(FAILED|ERROR).* tests/' * || true
grep -E '^[a-z0-9]+: +[0-9]+ s, CPU' * | sed 's/:/  /' || true
awk '/^[a-z0-9]+: +[0-9]+ s, CPU/ {cpu += $5} END {print "all  '"$SECONDS"' s, CPU " cpu " s"}' *
exit "${interrupted:-$status}"
