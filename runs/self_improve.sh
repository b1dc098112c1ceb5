#!/usr/bin/env bash
# Repeats generate -> score -> filter -> train -> evaluate:
#   bash runs/self_improve.sh [CONFIG] [key=value …]
# The demo world's config starts from data/tiny and takes minutes on a CPU. After an interruption, run
# it again: finished work is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
CONFIG=${1:-configs/tiny/self_improve.yaml}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$CONFIG" = configs/tiny/self_improve.yaml ] && [ ! -d outputs/tiny/base ]; then
  mkdir -p outputs/tiny
  cp -R data/tiny/. outputs/tiny
fi
python tools/self_improve.py "$CONFIG" "${@:2}"
