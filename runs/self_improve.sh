#!/usr/bin/env bash
# Generate -> score -> filter -> train -> evaluate, again and again: bash runs/self_improve.sh [CONFIG] [key=value …]
# The demo world's own config trains the base model first, if there is none; then CPU, minutes.
# Started again after an interruption, finished work is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
CONFIG=${1:-configs/tiny/self_improve.yaml}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$CONFIG" = configs/tiny/self_improve.yaml ] && [ ! -d outputs/tiny/base ]; then
  python tools/tiny_world.py output_dir=outputs/tiny
fi
python tools/self_improve.py "$CONFIG" "${@:2}"
