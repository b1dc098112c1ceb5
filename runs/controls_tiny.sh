#!/usr/bin/env bash
# Makes the control tables of docs/results.md: functional tokens on/off x tree on/off x PRM on/off,
# reward schemes for process scores, and one act forbidden at a time (from RL on, or only after it).
#   bash runs/controls_tiny.sh 0 1 2       after runs/results_tiny.sh, which runs the cells without a PRM
# Each RL cell may sample as many tokens as the tree search of its seed. A finished cell is not run
# again. Missing cells are empty in the table. CELLS and MASKED select the cells to run.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ROOT=${ROOT:-outputs} MASKED=${MASKED-"rl sft"}
CELLS=${CELLS-"rl-twice rl-prm rl-normal-prm rl-cot-prm rl-blend rl-rpp rl-rpp-prm rl-rpp-gain
  rl-no-verify rl-no-refine rl-no-next_step rl-no-subquestion"}

for SEED in "$@"; do
  OUT=$ROOT/tiny-seed$SEED
  evaluate() {  # evaluate MODEL DIR [key=value …]
    [ -f "$2/eval/summary.json" ] || python evaluate.py configs/tiny/evaluate.yaml seed="$SEED" \
      model_name_or_path="$1" eval_file="$OUT/test.jsonl" output_dir="$2" simulations='[]' "${@:3}"
  }
  TOKENS=$(python -c 'import json, sys
print(round(sum(json.loads(line)["tokens_generated"] for line in open(sys.argv[1]))))' "$OUT/rl/metrics.jsonl")
  PRM="use_prm=true prm_model_name_or_path=$OUT/prm"
  [ -d "$OUT/prm" ] || python tools/prm_train.py search_dir="$OUT/search" seed="$SEED" \
    model_name_or_path="$OUT/base" output_dir="$OUT/prm"
  for CELL in $CELLS; do
    START=sft HOW=
    case $CELL in
      rl-twice) HOW="children_per_act=2" ;;
      rl-prm) HOW=$PRM ;;
      rl-normal-prm) HOW="$PRM sampling_method=normal" ;;
      rl-cot-prm) START=sft-cot HOW="$PRM sampling_method=normal" ;;
      rl-blend) HOW="$PRM reward_scheme=blend" ;;
      rl-rpp) HOW="advantage_estimator=reinforce++" ;;
      rl-rpp-prm) HOW="$PRM advantage_estimator=reinforce++" ;;
      rl-rpp-gain) HOW="$PRM advantage_estimator=reinforce++ reward_scheme=gain" ;;
      rl-no-*) HOW="forbidden_acts=[${CELL#rl-no-}]" ;;
    esac
    # shellcheck disable=SC2086  # one word per key=value
    [ -d "$OUT/$CELL/hf" ] || python train_rl.py configs/tiny/rl.yaml seed="$SEED" \
      model_name_or_path="$OUT/$START/hf" train_file="$OUT/train.jsonl" eval_file="$OUT/test.jsonl" \
      output_dir="$OUT/$CELL" max_steps=200 warmup_ratio=0.015 max_generated_tokens="$TOKENS" \
      save_steps=0 $HOW
    ACTS=
    [ "$CELL" = "${CELL#rl-no-}" ] || ACTS=${CELL#rl-no-}
    evaluate "$OUT/$CELL/hf" "$OUT/eval-$CELL" "forbidden_acts=[$ACTS]"
  done
  for MODEL in $MASKED; do
    for ACT in '' clarify analysis next_step subquestion direct_answer verify refine; do
      evaluate "$OUT/$MODEL/hf" "$OUT/masked/eval-$MODEL-${ACT:-none}" num_samples=2 "forbidden_acts=[$ACT]"
    done
  done
done
RUNS=("$@")
python bench/tiny_results.py controls "${RUNS[@]/#/$ROOT/tiny-seed}"
