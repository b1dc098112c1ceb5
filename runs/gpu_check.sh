#!/usr/bin/env bash
# Tries on one GPU what only a GPU can show: seventeen checks, one line of JSON each, then a summary.
#   bash runs/gpu_check.sh              all of them, at most 8 minutes each; nothing is downloaded
#   bash runs/gpu_check.sh --cpu        what a CPU can run, at small sizes: tests the script itself
#   bash runs/gpu_check.sh kernels head only these
# Interrupted, it continues when started again: a check that has passed is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$PWD/.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python
case " $* " in *" --cpu "*) export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ;; esac
exec "$PYTHON" tools/gpu_check.py "$@"
