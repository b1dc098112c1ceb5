#!/usr/bin/env bash
# Makes the main tables of docs/results.md: the whole chain and its controls on the tiny world.
#   bash runs/results_tiny.sh 0 1 2        about 17 CPU minutes per seed
# Controls start from the same curated rows and may sample as many tokens as the tree search did.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for SEED in "$@"; do
  OUT=outputs/tiny-seed$SEED
  [ -f "$OUT/report.md" ] || OUT=$OUT SEED=$SEED bash runs/demo.sh
  TOKENS=$(python - "$OUT/rl/metrics.jsonl" <<'PY'
import json, sys
print(round(sum(json.loads(line)["tokens_generated"] for line in open(sys.argv[1]))))
PY
)
  rl() {  # rl NAME MODEL [key=value …]
    local name=$1 model=$2
    shift 2
    python train_rl.py configs/tiny/rl.yaml model_name_or_path="$model" seed="$SEED" \
      train_file="$OUT/train.jsonl" eval_file="$OUT/test.jsonl" output_dir="$OUT/$name" \
      max_steps=200 warmup_ratio=0.015 max_generated_tokens="$TOKENS" save_steps=0 "$@"
  }
  evaluate() {  # evaluate NAME MODEL
    python evaluate.py configs/tiny/evaluate.yaml model_name_or_path="$2" seed="$SEED" \
      eval_file="$OUT/test.jsonl" output_dir="$OUT/eval-$1" simulations='[]'
  }
  # Plain sampling instead of the tree, from the same warm-up model.
  rl rl-normal "$OUT/sft/hf" sampling_method=normal
  evaluate rl-normal "$OUT/rl-normal/hf"
  # The same rows without functional tokens, then plain sampling.
  python train_sft.py configs/tiny/sft.yaml model_name_or_path="$OUT/base" seed="$SEED" \
    train_file="$OUT/search/data/sft.jsonl" output_dir="$OUT/sft-cot" functional_tokens=false
  evaluate sft-cot "$OUT/sft-cot/hf"
  rl rl-cot "$OUT/sft-cot/hf" sampling_method=normal
  evaluate rl-cot "$OUT/rl-cot/hf"
done
python bench/tiny_results.py chain outputs/tiny-seed*
