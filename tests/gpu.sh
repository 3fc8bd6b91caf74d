#!/usr/bin/env bash
# GPU tests and first figures, run from a bundle of `make dist` on a machine with an NVIDIA GPU:
#   tests/gpu.sh [LOG_FOLDER]
# Prints a short table last: the tests, the sanitizer's verdicts, the demo model's needles, the synthetic 8B model's TPOT.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
logs=${1:-/tmp/vesper-gpu}
mkdir -p "$logs"
export VESPER_TEST_ROOT=$root
vesper=$root/bin/vesper
table=$logs/table.txt
: > "$table"
row() { printf '%-44s %s\n' "$1" "$2" | tee -a "$table"; }

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader | tee "$logs/card.txt"

for test in "$root"/tests/*_test; do
  name=$(basename "$test")
  start=$(date +%s)
  if timeout 300 "$test" > "$logs/$name.log" 2>&1; then verdict=passed; else verdict="FAILED ($?)"; fi
  row "$name" "$verdict, $(grep -c '\[       OK \]' "$logs/$name.log") tests, $(($(date +%s) - start)) s"
done

# The sanitizer is slow: the small tests of every kernel family, and the tiny model end to end.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    for test in "$root"/tests/*_cuda_test; do
      name=$(basename "$test")
      [ "$name" = needle_cuda_test ] && continue
      if VESPER_TEST_SMALL=1 timeout 240 compute-sanitizer --tool $tool --error-exitcode 9 "$test" > "$logs/$tool-$name.log" 2>&1
      then verdict=clean; else verdict="NOT CLEAN ($?)"; fi
      row "$tool $name" "$verdict, $(grep 'SUMMARY' "$logs/$tool-$name.log" | tail -1 | sed 's/=*//')"
    done
  done
fi

figures() { grep -hE 'TTFT|TPOT' "$1" | tr '\n' ' '; }
"$root/configs/demo/run.sh" "$vesper" > "$logs/demo.log" 2>&1
row "demo, needle at 16k" "$(figures <(tail -3 "$logs/demo.log"))"
for context in 1024 32768; do
  "$vesper" generate --model synthetic:llama-3.1-8b --device cuda --random-ids "$context" --max-tokens 129 --ignore-eos \
    > /dev/null 2> "$logs/8b-$context.log"
  row "synthetic 8B, context $context" "$(figures "$logs/8b-$context.log")"
done
echo "--- $(cat "$logs/card.txt")"
cat "$table"
! grep -qE 'FAILED|NOT CLEAN' "$table"
