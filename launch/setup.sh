#!/usr/bin/env bash
# Make .venv in the repository: torch's CPU build, the locked packages, and this package (editable).
#
# Safe to run at any time: a finished set-up is recognised by its stamp and costs nothing, an interrupted one
# is finished, two at once wait for each other. Where reasoning-gym's tasks could not be installed, the next set-up tries
# these again. PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail

# Plain 2.13.0 may be a CUDA build.
TORCH=torch==2.13.0+cpu
TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON_VERSION=3.11
NEEDED_GB=4

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock=$root/launch/requirements/cpu.txt
tasks=$root/launch/requirements/tasks.txt
venv=$root/.venv
stamp=$venv/set-up-of # what was installed; written last
tasks_stamp=$venv/tasks-of # the same of the tasks
made_for=$venv/made-for # the folder it was made in: an environment cannot be moved
log=$venv/set-up.log

say() { echo "set-up: $*" >&2; }
die() {
    say "$*"
    exit 1
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# The interpreter itself, also where the caller is inside a virtual environment (perhaps this very one).
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} "python$PYTHON_VERSION" python3 python; do
        if [[ $(version_of "$candidate") == "$PYTHON_VERSION" ]]; then
            "$candidate" -c 'import os, sys; print(os.path.realpath(sys._base_executable))'
            return
        fi
    done
    die "needs Python $PYTHON_VERSION, found $(python3 --version 2>/dev/null || echo none); install python$PYTHON_VERSION or set PYTHON=/path/to/python$PYTHON_VERSION"
}

# The environment's own settings decide where packages go, not the caller's.
pip() {
    env -u PYTHONPATH -u PYTHONHOME PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip "$@" < /dev/null >> "$log" 2>&1
}

# Why pip failed, by its log, and at which package if that does not say it.
why_failed() {
    local reason package=
    # What a package's build says is indented, and tells more than nothing where pip itself has no such line.
    reason=$( (sed -n 's/^ERROR: //p' "$log"; sed -nE 's/^ +(ERROR|error): //p' "$log") |
        grep -av '^subprocess-exited' | sed 's/ (from versions.*//' | head -n 1 | cut -c -200) || true
    if [[ $reason != *requirement* && $reason != *wheel* ]]; then
        package=$(grep -aE '^(Collecting|Processing) ' "$log" | tail -n 1 | cut -d ' ' -f 2) || true
    fi
    echo "${package:+at ${package##*/}: }${reason:-pip stopped}"
}

failed_install() {
    die "could not install $1 ($(why_failed)); the log is $log"
}

# pip writes a package's INSTALLER file after the package's own files: without it, the package is half there.
remove_half_installed() {
    local info
    for info in "$venv"/lib/python"$PYTHON_VERSION"/site-packages/*.dist-info; do
        if [[ -d $info && ! -e $info/INSTALLER ]]; then
            rm -rf "$info"
        fi
    done
}

make_venv() {
    local python free_gb
    python=$(find_python)
    free_gb=$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1048576)}')
    ((free_gb >= NEEDED_GB)) || die "needs $NEEDED_GB GB of disk in $root, $free_gb GB are free"
    say "making $venv with $python"
    rm -rf "$venv"
    "$python" -m venv "$venv" > /dev/null || die "$python cannot make a virtual environment; install its venv module (Debian: python$PYTHON_VERSION-venv)"
    echo "$root" > "$made_for"
}

venv_is_usable() {
    [[ $(cat "$made_for" 2>/dev/null) == "$root" && $(version_of "$venv/bin/python") == "$PYTHON_VERSION" ]]
}

install_all() {
    venv_is_usable || make_venv
    rm -f "$stamp"
    : > "$log"
    remove_half_installed
    say "installing $TORCH"
    pip install --no-deps "$TORCH" || pip install --no-deps --index-url "$TORCH_INDEX" "$TORCH" || failed_install "$TORCH"
    : > "$log"
    say "installing $(grep -c == "$lock") locked packages"
    pip install --no-deps --no-compile --requirement "$lock" || failed_install "the locked packages"
    pip install --no-deps --no-build-isolation --editable "$root" || failed_install "megatron-apo itself"
    echo "$wanted" > "$stamp"
    say "done in $SECONDS s"
}

# Nothing else needs them, and a part of them is built here: that they are missing does not fail the set-up.
install_tasks() {
    local reason
    : > "$log"
    remove_half_installed
    if pip install --no-deps --no-compile --requirement "$tasks"; then
        echo "$tasks_wanted" > "$tasks_stamp"
        return
    fi
    reason=$(why_failed)
    if [[ $reason == *wheel* ]]; then
        reason+="; a C compiler and Python's headers are needed"
    fi
    say "could not install reasoning-gym ($reason); its tasks are missing, nothing else; the next set-up tries again; the log is $log"
}

wanted=$(echo "$root $TORCH" | cat - "$lock" "$root/setup.py" "$root/pyproject.toml" | sha256sum)
tasks_wanted=$(echo "$root" | cat - "$lock" "$tasks" | sha256sum)
is_done() {
    [[ $(cat "$stamp" 2>/dev/null) == "$wanted" ]] && venv_is_usable
}
tasks_are_done() {
    [[ $(cat "$tasks_stamp" 2>/dev/null) == "$tasks_wanted" ]]
}

is_done && tasks_are_done && exit 0
exec 9< "$root" # the folder is the lock: it goes with the last process that holds it, however that ends
if ! flock --nonblock 9; then
    say "another set-up is at work in $root; waiting for it"
    flock 9
fi
is_done || install_all
tasks_are_done || install_tasks
