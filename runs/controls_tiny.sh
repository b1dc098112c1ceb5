#!/usr/bin/env bash
# The control tables of docs/results.md: functional tokens on/off x tree on/off x PRM on/off at equal
# budgets of sampled tokens, and one act forbidden at a time, per seed.
#   bash runs/controls_tiny.sh 0 1 2       after runs/results_tiny.sh, which runs the cells without a PRM
# A cell that is there is not run again; one that is not is named in the table, never filled in.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ROOT=${ROOT:-outputs} CELLS=${CELLS:-"rl-prm rl-normal-prm rl-cot-prm"} MASKED=${MASKED:-"rl sft"}

for SEED in "$@"; do
  OUT=$ROOT/tiny-seed$SEED
  TOKENS=$(python -c 'import json, sys
print(round(sum(json.loads(line)["tokens_generated"] for line in open(sys.argv[1]))))' "$OUT/rl/metrics.jsonl")
  for CELL in $CELLS; do
    case $CELL in
      rl-prm) START=sft WAY=mcts ;;
      rl-normal-prm) START=sft WAY=normal ;;
      rl-cot-prm) START=sft-cot WAY=normal ;;
    esac
    [ -d "$OUT/prm" ] || python bench/prm_train.py search_dir="$OUT/search" seed="$SEED" \
      model_name_or_path="$OUT/base" output_dir="$OUT/prm"
    [ -d "$OUT/$CELL/hf" ] || python train_rl.py configs/tiny/rl.yaml seed="$SEED" \
      model_name_or_path="$OUT/$START/hf" train_file="$OUT/train.jsonl" eval_file="$OUT/test.jsonl" \
      output_dir="$OUT/$CELL" sampling_method=$WAY use_prm=true prm_model_name_or_path="$OUT/prm" \
      max_steps=200 warmup_ratio=0.015 max_generated_tokens="$TOKENS" save_steps=0
    [ -f "$OUT/eval-$CELL/eval/summary.json" ] || python evaluate.py configs/tiny/evaluate.yaml \
      model_name_or_path="$OUT/$CELL/hf" seed="$SEED" eval_file="$OUT/test.jsonl" \
      output_dir="$OUT/eval-$CELL" simulations='[]'
  done
  for MODEL in $MASKED; do
    for ACT in '' clarify analysis next_step subquestion direct_answer verify refine; do
      DIR=$OUT/masked/eval-$MODEL-${ACT:-none}
      [ -f "$DIR/eval/summary.json" ] || python evaluate.py configs/tiny/evaluate.yaml \
        model_name_or_path="$OUT/$MODEL/hf" seed="$SEED" eval_file="$OUT/test.jsonl" \
        output_dir="$DIR" simulations='[]' num_samples=2 "forbidden_acts=[$ACT]"
    done
  done
done
RUNS=("$@")
python bench/tiny_results.py controls "${RUNS[@]/#/$ROOT/tiny-seed}"
