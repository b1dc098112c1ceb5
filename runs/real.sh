#!/usr/bin/env bash
# The whole chain on a real instruct model: phase 1, warm-up, RL, and greedy accuracy before and after.
#   bash runs/real.sh MODEL_FOLDER TRAIN_FILE TEST_FILE OUT [engine=vllm] [key=value of all scripts …]
# configs/real fits a model of 0.5B parameters and two CPU cores: one to three hours. Keys of single
# scripts come from SEARCH, SFT, RL and EVAL, such as RL="max_steps=100 rollout_batch_size=16".
# Interrupted, it continues when started again: finished work is not repeated.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '3,6s/^# *//p' "$0" >&2; exit 2; }
MODEL=$(realpath "$1") TRAIN=$(realpath "$2") TEST=$(realpath "$3") OUT=$(realpath -m "$4")
shift 4
cd "$(dirname "$0")/.."
PYTHON=$PWD/.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
ENGINE=() OTHERS=()  # train_sft.py has no engine
for key in "$@"; do
  case $key in engine=*) ENGINE+=("$key") ;; *) OTHERS+=("$key") ;; esac
done
# shellcheck disable=SC2206  # keys are split at blanks on purpose
SEARCH=(${SEARCH:-}) SFT=(${SFT:-}) RL=(${RL:-}) EVAL=(${EVAL:-})
ASK='Solve the problem step by step and put the final answer in \boxed{}.'
C=configs/real

run() { echo "== $*" >&2; "$PYTHON" "$@" >&2; }
evaluate() {  # evaluate NAME MODEL [key=value …]
  local name=$1 model=$2
  shift 2
  run evaluate.py "$C/evaluate.yaml" model_name_or_path="$model" eval_file="$TEST" \
    output_dir="$OUT/eval-$name" "${ENGINE[@]}" "${OTHERS[@]}" "${EVAL[@]}" "$@"
}

# The instruct model has no functional tokens: a system prompt asks it for the box.
evaluate base "$MODEL" "system_prompt=$ASK"
run search.py "$C/search.yaml" model_name_or_path="$MODEL" train_file="$TRAIN" \
  output_dir="$OUT/search" "${ENGINE[@]}" "${OTHERS[@]}" "${SEARCH[@]}"
# Rows beyond a bound of the audit are a warning: the figures at the end show what they teach.
run tools/audit_rows.py "$OUT/search/data/sft.jsonl" || echo "warning: read the audit above" >&2
run train_sft.py "$C/sft.yaml" model_name_or_path="$MODEL" train_file="$OUT/search/data/sft.jsonl" \
  output_dir="$OUT/sft" "${OTHERS[@]}" "${SFT[@]}"
evaluate sft "$OUT/sft/hf"
run train_rl.py "$C/rl.yaml" model_name_or_path="$OUT/sft/hf" train_file="$TRAIN" \
  output_dir="$OUT/rl" "${ENGINE[@]}" "${OTHERS[@]}" "${RL[@]}"
evaluate rl "$OUT/rl/hf"
run tools/report.py "$OUT/search" "$OUT/sft" "$OUT/rl" "$OUT"/eval-* --out "$OUT"
