#!/usr/bin/env bash
# Run every GPU check, one after the other, each for at most ten minutes: bash tests/gpu/run.sh [FOLDER]
# What the options are, what is left in FOLDER, and exit codes: runner.py. PYTHON=/path/to/python chooses the interpreter;
# by default it is that of .venv, or python3 where there is none.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
exec "$python" "$root/tests/gpu/runner.py" "$@"
