#!/usr/bin/env bash
# Repeats generate -> score -> filter -> train -> evaluate:
#   bash runs/self_improve.sh [CONFIG] [key=value …]
# With the demo world's config a missing base model is trained first. The loop then takes minutes on
# a CPU. After an interruption, run it again: finished work is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
CONFIG=${1:-configs/tiny/self_improve.yaml}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$CONFIG" = configs/tiny/self_improve.yaml ] && [ ! -d outputs/tiny/base ]; then
  python tools/tiny_world.py output_dir=outputs/tiny
fi
python tools/self_improve.py "$CONFIG" "${@:2}"
