#!/usr/bin/env bash
# GPU tests and first figures, run from a bundle of `make dist` on a machine with an NVIDIA GPU:
#   tests/gpu.sh LOG_FOLDER [tests] [sanitizer] [figures]      all three where none is named
# Prints a short table last: the tests, the sanitizer's verdicts, the demo model, the synthetic 8B model's TPOT.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
logs=${1:?tests/gpu.sh LOG_FOLDER [tests] [sanitizer] [figures]}
shift
parts=${*:-tests sanitizer figures}
mkdir -p "$logs"
export VESPER_TEST_ROOT=$root
vesper=$root/bin/vesper
table=$logs/table.txt
: > "$table"
row() { printf '%-40s %s\n' "$1" "$2" | tee -a "$table"; }
wanted() { [[ " $parts " == *" $1 "* ]]; }

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader > "$logs/card.txt"

if wanted tests; then
  for test in "$root"/tests/*_cuda_test; do
    name=$(basename "$test")
    start=$(date +%s)
    if timeout 120 "$test" > "$logs/$name.log" 2>&1; then verdict=passed; else verdict="FAILED ($?)"; fi
    row "$name" "$verdict, $(grep -c '^\[       OK \]' "$logs/$name.log") tests, $(($(date +%s) - start)) s"
  done
fi

# Every kernel family on its test shapes and the tiny model end to end, side by side. Left out: what would only repeat
# them slowly (needles, 13 GB of pages, 200 MB of weights); under racecheck, all of the engine but one run, and the
# products of cuBLAS, whose own kernels (nvjet) show hazards.
sanitize() {
  local tool=$1 test=$2 name filter
  name=$(basename "$test")
  filter="-*TwoToThe31st*:*CrossTheStagingBuffers*"
  case $tool-$name in
    racecheck-engine_cuda_test) filter=EngineTest.PagesComeBack ;;
    racecheck-backends_cuda_test) filter=BackendsTest.DrawsFollowTheSeed ;;
    racecheck-linear_cuda_test) filter=LinearCuda.GemvRowsDoNotMeet ;;
  esac
  if timeout 500 compute-sanitizer --tool "$tool" --error-exitcode 9 "$test" "--gtest_filter=$filter" \
    > "$logs/$tool-$name.log" 2>&1
  then verdict=clean; else verdict="NOT CLEAN ($?)"; fi
  row "$tool $name" "$verdict: $(grep 'SUMMARY' "$logs/$tool-$name.log" | tail -1 | tr -d =)"
}
if wanted sanitizer; then
  for tool in memcheck racecheck; do
    for test in "$root"/tests/*_cuda_test; do
      case $(basename "$test")-$tool in
        needle_* | eval_* | golden_cuda_test-racecheck) ;;
        *) sanitize $tool "$test" & ;;
      esac
    done
  done
  wait
fi

if wanted figures; then
  figures() { grep -hE 'TTFT|TPOT' "$1" | tail -2 | tr '\n' ' '; }
  "$root/configs/demo/run.sh" "$vesper" > "$logs/demo.log" 2>&1
  row "demo model, needle at 16k" "$(figures "$logs/demo.log")"
  for context in 1024 32768; do
    "$vesper" generate --model synthetic:llama-3.1-8b --device cuda --random-ids "$context" --max-tokens 129 \
      --ignore-eos > /dev/null 2> "$logs/8b-$context.log"
    row "synthetic llama-3.1-8b, context $context" "$(figures "$logs/8b-$context.log")"
  done
fi
echo "--- $(cat "$logs/card.txt")"
cat "$table"
! grep -qE 'FAILED|NOT CLEAN' "$table"
