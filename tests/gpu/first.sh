#!/usr/bin/env bash
# What to run first on a GPU that is lent for a quarter of an hour: the checks that matter most, a short form of each,
# within nine minutes altogether: bash tests/gpu/first.sh [FOLDER]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" --first "$@"
