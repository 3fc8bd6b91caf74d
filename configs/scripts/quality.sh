#!/usr/bin/env bash
# The quality table of docs/quality.md: the demo model's needle questions and perplexity under each attention, all through
# the decode path. Runs from a source tree or a bundle:
#   configs/scripts/quality.sh VESPER HELD_OUT_IDS DEVICE CONTEXT [JOBS]
# HELD_OUT_IDS: a file of 16-bit token ids of held-out novels (valid.u16 of the model's recipe). Prints Markdown rows.
set -euo pipefail
vesper=$1 held_out=$2 device=$3 context=$4 jobs=${5:-1}
root=$(cd "$(dirname "$0")/../.." && pwd)
demo=$root/configs/demo
offsets=$(python3 -c "import json,sys; print(*json.load(open('$demo/questions/index.json'))['$context']['ppl_offsets_in_valid_u16'])")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

arms=(dense)
for budget in 128 256 512 1024 2048 4096; do
  [[ $budget -ge $context ]] || arms+=("quest:token_budget=$budget")
done
for p in 0.85 0.95 0.99; do arms+=("twilight:top_p=$p,base=dense,scores=exact,min_tokens=0"); done
arms+=("twilight:top_p=0.95,scores=exact,min_tokens=0")
for e in 0.1 0.05; do
  arms+=("vattention:epsilon=$e,delta=$e,top_k_by=oracle,verify=denominator,safety=1,on_outlier=report")
done
arms+=("twilight:top_p=0.85" "twilight:top_p=0.95" "vattention:epsilon=0.1,delta=0.1" "vattention")

one() {
  local number=$1 arm=$2
  "$vesper" eval needle --model "$demo" --device "$device" --log-level warn --ids "$demo/questions/ids_$context.u16" \
    --index "$demo/questions/index.json" --context "$context" --attention "$arm" --json > "$work/$number.needle" 2> "$work/$number.err"
  "$vesper" eval ppl --model "$demo" --device "$device" --log-level warn --ids "$held_out" --context "$context" --last 256 \
    --offsets "$offsets" --attention "$arm" --json > "$work/$number.ppl" 2>> "$work/$number.err"
}
for i in "${!arms[@]}"; do
  one "$i" "${arms[$i]}" &
  while [[ $(jobs -rp | wc -l) -ge $jobs ]]; do wait -n || true; done
done
wait
echo "| $context tokens, $device | words | numbers | perplexity | kept |"
echo "|---|---|---|---|---|"
for i in "${!arms[@]}"; do
  python3 - "$work/$i" "${arms[$i]}" << 'PY' || { echo "| ${arms[$i]} | failed: $(tail -1 "$work/$i.err") |"; }
import json, sys
needle, ppl = (json.load(open(sys.argv[1] + kind)) for kind in ('.needle', '.ppl'))
layers = [l for l in needle['layers'] + ppl['layers'] if l['sparse_steps']]
visible = sum(l['visible_tokens'] for l in layers)
kept = sum(l['kept_tokens'] for l in layers) / visible if visible else 1
print(f"| `{sys.argv[2]}` | {needle['words']['right']} of {needle['words']['total']} | "
      f"{needle['numbers']['right']} of {needle['numbers']['total']} | {ppl['perplexity']:.2f} | {kept:.4f} |")
PY
done
