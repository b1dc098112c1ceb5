#!/usr/bin/env bash
# Runs a whole recipe on real data:
#   bash runs/recipe.sh configs/qwen2.5-7b data/math_train.jsonl data/math500.jsonl
# GPUS is 8 by default. After an interruption run the same line again: finished work is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
C=${1:?folder of configs, such as configs/qwen2.5-7b} OUT=outputs/$(basename "$1")
TRAIN=${2:?JSONL of training problems with gold answers} TEST=${3:?JSONL of test problems}
BASE=$(sed -n 's/^model_name_or_path: //p' "$C/sft.yaml") GPUS=${GPUS:-8}

python search.py "$C/search.yaml" train_file="$TRAIN"
python -m torch.distributed.run --nproc_per_node "$GPUS" train_sft.py "$C/sft.yaml"
python -m torch.distributed.run --nproc_per_node "$GPUS" train_rl.py "$C/rl.yaml" train_file="$TRAIN" eval_file="$TEST"
ASK='Please reason step by step, and put your final answer within \boxed{}.'
# The instruct model has no functional tokens. Its prompt asks for a box, and there is no search.
python evaluate.py "$C/evaluate.yaml" model_name_or_path="$BASE" eval_file="$TEST" \
  output_dir="$OUT/eval-base" "simulations=[]" "system_prompt=$ASK"
for stage in sft rl; do
  python evaluate.py "$C/evaluate.yaml" model_name_or_path="$OUT/$stage/hf" eval_file="$TEST" \
    output_dir="$OUT/eval-$stage"
done
python tools/report.py "$OUT/rl" "$OUT"/eval-*
