#!/usr/bin/env bash
# The paper's run on 8 GPUs: bash runs/paper_qwen2.5-7b.sh data/math_train.jsonl [data/math500.jsonl]
# Each script continues after an interruption; run the same line again.
set -euo pipefail
cd "$(dirname "$0")/.."
TRAIN=${1:?JSONL of training problems with gold answers} TEST=${2:-data/math500.jsonl}
C=configs/qwen2.5-7b GPUS=${GPUS:-8}

python search.py $C/search.yaml train_file="$TRAIN"
torchrun --nproc_per_node "$GPUS" train_sft.py $C/sft.yaml
torchrun --nproc_per_node "$GPUS" train_rl.py $C/rl.yaml train_file="$TRAIN" eval_file="$TEST"
ASK='Please reason step by step, and put your final answer within \boxed{}.'
for model in Qwen/Qwen2.5-7B-Instruct outputs/qwen2.5-7b/sft/hf outputs/qwen2.5-7b/rl/hf; do
  instruct=()
  [ -d "$model" ] || instruct=("simulations=[]" "system_prompt=$ASK")
  # The instruct model speaks no functional tokens: it is asked for a box, and does not search.
  python evaluate.py $C/evaluate.yaml model_name_or_path="$model" eval_file="$TEST" \
    output_dir="outputs/qwen2.5-7b/eval-$(basename "$(dirname "$model")")" \
    "${instruct[@]}"
done
python -m rftt.watch.report outputs/qwen2.5-7b/rl outputs/qwen2.5-7b/eval-*
