#!/usr/bin/env bash
# Runs the whole method on the embedded tiny world: make demo [FAST=1].
#   SEED=1 OUT=outputs/seed1 bash runs/demo.sh     another seed, in another folder
# Seed 0 uses the problems and the base model in data/tiny. Any other seed first makes its own world,
# which takes a few minutes more. Every stage except the report uses two ranks, hence two cores.
# An interrupted demo continues when it is started again: finished work is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0} FAST=${FAST:-}
OUT=${OUT:-outputs/tiny${FAST:+-fast}}
# A rank needs a GPU of its own, so that there is only one on a machine with one GPU.
RANKS=${RANKS:-$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -n "$FAST" ]; then  # the same code on less data
  SEARCH=(max_problems=100)
  SFT=(num_train_epochs=6)
  RL=(max_steps=6 rollout_batch_size=16 train_batch_size=128 save_steps=3)
  EVAL=(max_problems=60 num_samples=4)
else
  SEARCH=() SFT=() RL=() EVAL=()
fi

stage() {  # stage NAME COMMAND…: run it with output on stderr, and record its seconds
  local name=$1 begin=$SECONDS
  shift
  echo "== $name: $*" >&2
  "$@" >&2
  echo "$name $((SECONDS - begin))" >> "$OUT/seconds.txt"
}
two_ranks() { python -m torch.distributed.run --standalone --nproc_per_node="$RANKS" "$@"; }
evaluate() {  # evaluate NAME MODEL [key=value …]
  local name=$1 model=$2
  shift 2
  stage "eval-$name" two_ranks evaluate.py configs/tiny/evaluate.yaml model_name_or_path="$model" \
    eval_file="$OUT/test.jsonl" output_dir="$OUT/eval-$name" seed="$SEED" "${EVAL[@]}" "$@"
}

mkdir -p "$OUT"
if [ ! -d "$OUT/base" ]; then
  if [ "$SEED" = 0 ]; then
    cp data/tiny/*.jsonl "$OUT"
    cp -R data/tiny/base "$OUT/base.tmp"
    mv "$OUT/base.tmp" "$OUT/base"
  else
    stage base python tools/tiny_world.py output_dir="$OUT" seed="$SEED"
  fi
fi
evaluate base "$OUT/base" simulations='[]'
stage search two_ranks search.py configs/tiny/search.yaml model_name_or_path="$OUT/base" \
  train_file="$OUT/train.jsonl" output_dir="$OUT/search" seed="$SEED" "${SEARCH[@]}"
stage sft two_ranks train_sft.py configs/tiny/sft.yaml model_name_or_path="$OUT/base" \
  train_file="$OUT/search/data/sft.jsonl" output_dir="$OUT/sft" seed="$SEED" "${SFT[@]}"
evaluate sft "$OUT/sft/hf"
stage rl two_ranks train_rl.py configs/tiny/rl.yaml model_name_or_path="$OUT/sft/hf" \
  train_file="$OUT/train.jsonl" eval_file="$OUT/test.jsonl" output_dir="$OUT/rl" seed="$SEED" "${RL[@]}"
evaluate rl "$OUT/rl/hf"
stage report python tools/report.py "$OUT/search" "$OUT/sft" "$OUT/rl" "$OUT/eval-base" \
  "$OUT/eval-sft" "$OUT/eval-rl" --out "$OUT"

OUT=$OUT python - <<'PY'
import json, os

def read(name):
    with open(f"{os.environ['OUT']}/eval-{name}/eval/summary.json") as file:
        return json.load(file)

runs = {name: read(name) for name in ("base", "sft", "rl")}
print(f"{'held-out accuracy, %':24}{'greedy':>8}{'sampled':>9}{'maj@k':>8}{'search@k':>11}")
for name, run in runs.items():
    figures = [run["greedy"]["mean"], run["sampled"]["mean"]]
    figures += [max(run[key].items(), key=lambda kv: int(kv[0]))[1]["accuracy"] if run[key] else None
                for key in ("maj@k", "search")]
    cells = [f"{100 * x:.1f}" if x is not None else "-" for x in figures]
    print(f"{name:24}{cells[0]:>8}{cells[1]:>9}{cells[2]:>8}{cells[3]:>11}")
seconds = {}
for line in open(f"{os.environ['OUT']}/seconds.txt"):  # a repeated stage has several lines
    name, value = line.split()
    seconds[name] = seconds.get(name, 0) + int(value)
print(json.dumps({
    **{name: round(run["greedy"]["mean"], 4) for name, run in runs.items()},
    "sampled": {name: round(run["sampled"]["mean"], 4) for name, run in runs.items()},
    "search": {k: round(v["accuracy"], 4) for k, v in runs["rl"]["search"].items()},
    "seconds": seconds,
}))
PY
