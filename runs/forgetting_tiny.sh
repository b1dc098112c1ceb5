#!/usr/bin/env bash
# Makes the forgetting table of docs/results.md. It compares plain SFT on the world's solutions with
# rejection sampling from the model itself, on the target and on a guard set, per seed.
#   bash runs/forgetting_tiny.sh 0 1 2        5 CPU minutes per seed, 3 more for its base model
# Both train on one row per problem with the same settings. Only the author of the solution differs.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ROOT=${ROOT:-outputs}

for SEED in "$@"; do
  WORLD=$ROOT/tiny-seed$SEED OUT=$ROOT/tiny-seed$SEED/forgetting
  [ -d "$WORLD/base" ] || python tools/tiny_world.py output_dir="$WORLD" seed="$SEED"
  evaluate() {  # evaluate NAME MODEL
    for set in test guard; do
      python evaluate.py configs/tiny/evaluate.yaml model_name_or_path="$2" seed="$SEED" \
        eval_file="$WORLD/$set.jsonl" output_dir="$OUT/eval-$1-$set" simulations='[]'
    done
  }
  train() {  # train NAME FILE
    python train_sft.py configs/tiny/sft.yaml model_name_or_path="$WORLD/base" seed="$SEED" \
      train_file="$2" output_dir="$OUT/$1" functional_tokens=false num_train_epochs=2
    evaluate "$1" "$OUT/$1/hf"
  }
  evaluate base "$WORLD/base"
  train gold "$WORLD/train.jsonl"
  python search.py configs/tiny/search.yaml model_name_or_path="$WORLD/base" seed="$SEED" \
    train_file="$WORLD/train.jsonl" output_dir="$OUT/search" method=sample max_problems=2000 \
    n_best_to_keep=1 max_plain_paths=1
  train sampled "$OUT/search/data/sft.jsonl"
done
RUNS=("$@")
python bench/tiny_results.py forgetting "${RUNS[@]/#/$ROOT/tiny-seed}"
