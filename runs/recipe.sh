#!/usr/bin/env bash
# Runs a whole recipe on real data:
#   bash runs/recipe.sh configs/qwen2.5-7b data/math_train.jsonl data/math500.jsonl [MODEL]
# MODEL is the instruct model to start from, by default that of search.yaml. GPUS is 8 by default.
# Every stage reads and writes below outputs/NAME for configs/NAME, whatever paths the configs name.
# After an interruption run the same line again: finished work is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
C=${1:?folder of configs, such as configs/qwen2.5-7b} OUT=outputs/$(basename "$1")
TRAIN=${2:?file of training problems with gold answers} TEST=${3:?file of test problems}
KEY_OF='import sys, yaml; print(yaml.safe_load(open(sys.argv[2])).get(sys.argv[1]))'
BASE=${4:-$(python -c "$KEY_OF" model_name_or_path "$C/search.yaml")} GPUS=${GPUS:-8}
ASK='Please reason step by step, and put your final answer within \boxed{}.'

# With --standalone the system chooses the port, so that two recipes may run on one machine.
on_all_gpus() { python -m torch.distributed.run --standalone --nproc_per_node "$GPUS" "$@"; }
evaluate() {  # evaluate NAME MODEL [key=value …]
  local name=$1 model=$2
  shift 2
  on_all_gpus evaluate.py "$C/evaluate.yaml" model_name_or_path="$model" eval_file="$TEST" \
    output_dir="$OUT/eval-$name" "$@"
}

SEARCH=on_all_gpus
[ "$(python -c "$KEY_OF" engine "$C/search.yaml")" = api ] && SEARCH=python  # the GPUs are elsewhere
$SEARCH search.py "$C/search.yaml" model_name_or_path="$BASE" train_file="$TRAIN" \
  output_dir="$OUT/search"
on_all_gpus train_sft.py "$C/sft.yaml" model_name_or_path="$BASE" \
  train_file="$OUT/search/data/sft.jsonl" output_dir="$OUT/sft"
on_all_gpus train_rl.py "$C/rl.yaml" model_name_or_path="$OUT/sft/hf" train_file="$TRAIN" \
  eval_file="$TEST" output_dir="$OUT/rl"
# The instruct model has no functional tokens. Its prompt asks for a box, and there is no search.
evaluate base "$BASE" "simulations=[]" "system_prompt=$ASK"
evaluate sft "$OUT/sft/hf"
evaluate rl "$OUT/rl/hf"
python tools/report.py "$OUT/rl" "$OUT"/eval-*
