#!/usr/bin/env bash
# GPU tests and first figures, run from a bundle of `make dist` on a machine with an NVIDIA GPU:
#   tests/gpu.sh LOG_FOLDER [tests] [sanitizer] [figures]      all three where none is named
# Prints a short table last: the tests, the sanitizer's verdicts, the demo model, the synthetic 8B model's step. On 16
# cores the tests take half a minute, racecheck's longest two and a half minutes.
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

# Runs FUNCTION TEST for the tests named on stdin, so many at a time; each prints one line, sorted in the end.
side_by_side() {
  local function=$1 jobs=$2
  export -f "$function"
  export logs
  xargs -P "$jobs" -I{} bash -c "$function {}" | sort | tee -a "$table"
}

run_test() {
  local name start verdict
  name=$(basename "$1")
  start=$(date +%s)
  if timeout 120 "$1" > "$logs/$name.log" 2>&1; then verdict=passed; else verdict="FAILED ($?)"; fi
  printf '%-40s %s, %s tests, %s s\n' "$name" "$verdict" "$(grep -c '^\[       OK \]' "$logs/$name.log")" \
    $(($(date +%s) - start))
}
if wanted tests; then
  ls "$root"/tests/*_cuda_test | side_by_side run_test 6
fi

# Left out of memcheck: rates, and what would only repeat slowly what others do (13 GB of pages, 200 MB of weights, the
# demo model at length, whole experiments). Racecheck takes thirty times as long as no check: of each family of kernels whose threads
# share memory, its shortest tests.
memcheck() {
  case $(basename "$1") in
    needle_cuda_test | repro_cuda_test) return ;;
  esac
  sanitize memcheck "$1" "-*TwoToThe31st*:*CrossTheStagingBuffers*:*DemoModelAnswers*:*PromptsHide*:ReadProbe*"
}
racecheck() {
  local filter
  case $(basename "$1") in
    attend_cuda_test) filter=AttendCuda/0.DecodeAlone*:AttendCuda/0.PrefillInChunks*:*LargeScores* ;;
    attend_selected_cuda_test) filter=AttendSelectedCuda/0.SharesAMixed*:*/0.GivesTheSame* ;;
    backends_cuda_test) filter=BackendsTest.DrawsFollowTheSeed ;;
    linear_cuda_test) filter=LinearCuda.GemvRowsDoNotMeet:LinearCuda.IntegersAreExactWhere* ;;
    linear_int4_cuda_test) filter=LinearInt4Cuda.GemvRowsDoNotMeet:LinearInt4Cuda.ABadScale* ;;
    ops_cuda_test | append_cuda_test | side_tables_cuda_test | attend_step_cuda_test) filter=* ;;
    prune_top_p_cuda_test) filter=*OnBothSidesOfSharedMemory ;;
    sample_tail_cuda_test) filter=SizeSampleCuda/0.DrawsThePilot*:SizeSampleCuda/0.EscalatesForAWide*:SelectStaticCuda.* ;;
    sampling_cuda_test) filter=*GreedyTakes*:*KeepsTies* ;;
    score_tokens_cuda_test) filter=*TakeEveryChannel*:*AreTheSameBits* ;;
    select_pages_cuda_test) filter=ScorePagesCuda/1.ChooseInOneLaunch*:SelectPagesCuda.AsASort* ;;
    *) return ;;
  esac
  sanitize racecheck "$1" "$filter"
}
sanitize() {
  local tool=$1 test=$2 filter=$3 name verdict
  name=$(basename "$test")
  if timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 9 "$test" "--gtest_filter=$filter" \
    > "$logs/$tool-$name.log" 2>&1
  then verdict=clean; else verdict="NOT CLEAN ($?)"; fi
  printf '%-40s %s\n' "$tool $name" "$verdict: $(grep 'SUMMARY' "$logs/$tool-$name.log" | tail -1 | tr -d =)"
}
export -f sanitize memcheck racecheck
# One pool for both: racecheck's longest alone takes as long as all of memcheck.
check() { "${1%%:*}" "${1#*:}"; }
if wanted sanitizer; then
  ls "$root"/tests/*_cuda_test | sed 's/^/racecheck:/; p; s/^racecheck:/memcheck:/' | sort -r | side_by_side check 14
fi

if wanted figures; then
  figures() { grep -hE 'TTFT|TPOT' "$1" | tail -2 | tr '\n' ' '; }
  "$root/configs/demo/run.sh" "$vesper" > "$logs/demo.log" 2>&1
  row "demo model, needle at 16k" "$(figures "$logs/demo.log")"
  "$vesper" generate --model synthetic:llama-3.1-8b --device cuda --random-ids 32768 --max-tokens 129 --ignore-eos \
    > /dev/null 2> "$logs/8b.log"
  row "synthetic llama-3.1-8b, prefill of 32768" "$(figures "$logs/8b.log")"
  "$vesper" bench --model synthetic:llama-3.1-8b --context 1k,32k --fill synthetic --sigma 3 --repeats 3 \
    --attention dense quest:token_budget=2048 twilight vattention > "$logs/bench.md" 2> "$logs/bench.err"
  grep '^| bf16' "$logs/bench.md" | tee -a "$table"
  "$vesper" bench --model synthetic:llama-3.1-8b --kernels --context 32k > "$logs/kernels.md" 2>&1
fi
echo "--- $(cat "$logs/card.txt")"
cat "$table"
! grep -qE 'FAILED|NOT CLEAN' "$table"
