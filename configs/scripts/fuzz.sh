#!/usr/bin/env bash
# fuzz.sh [TARGET...]: builds the fuzz targets of tests/fuzz (all of them, or those named) and runs each for FUZZ_SECONDS
# (600), two side by side. What an input must not do is said in tests/fuzz/entry.cpp; besides, it may take 10 seconds
# and 2 GB. Inputs that reach new code are kept in build-fuzz/corpus and start the next run together with
# tests/fuzz/seeds. Ends with a table; leaves with 1 where there is a finding, whose input is in build-fuzz/findings.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${FUZZ_SECONDS:-600}
known=(safetensors index config generation_config tokenizer_json tiktoken chat_template)
targets=("$@")
[[ $# -gt 0 ]] || targets=("${known[@]}")

command -v ninja >/dev/null && export CMAKE_GENERATOR=Ninja
command -v ccache >/dev/null && export CMAKE_CXX_COMPILER_LAUNCHER=ccache
cmake --preset fuzz >/dev/null
cmake --build build-fuzz --target "${targets[@]/#/fuzz_}"

# Files that targets write are rewritten thousands of times a second: in memory where there is some.
memory=/dev/shm
[[ -d $memory && -w $memory ]] || memory=${TMPDIR:-/tmp}
scratch=$(mktemp -d "$memory/vesper-fuzz.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch UBSAN_OPTIONS=print_stacktrace=1
if symbolizer=$(command -v llvm-symbolizer-14); then
  export ASAN_SYMBOLIZER_PATH=$symbolizer UBSAN_SYMBOLIZER_PATH=$symbolizer
fi

findings=build-fuzz/findings
rm -rf "$findings"
mkdir -p "$findings"

# Runs one target; its output ends with "exit STATUS".
run() {
  local target=$1 status=0 options=()
  [[ ! -e tests/fuzz/dictionaries/$target.dict ]] || options=(-dict="tests/fuzz/dictionaries/$target.dict")
  mkdir -p "build-fuzz/corpus/$target"
  "build-fuzz/fuzz/$target" "build-fuzz/corpus/$target" "tests/fuzz/seeds/$target" "${options[@]}" \
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=16384 -print_final_stats=1 \
    -artifact_prefix="$findings/$target-" >"build-fuzz/$target.log" 2>&1 || status=$?
  echo "exit $status" >>"build-fuzz/$target.log"
}

echo "fuzz: ${#targets[@]} targets, $seconds seconds each, two side by side"
running=0
for target in "${targets[@]}"; do
  if [[ $running -eq 2 ]]; then
    wait -n
    running=1
  fi
  run "$target" &
  running=$((running + 1))
done
wait

failed=0
table=$(printf '%-20s %12s %10s  %s\n' target runs coverage result)
for target in "${targets[@]}"; do
  log=build-fuzz/$target.log
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  coverage=$(sed -n 's/^#.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
  result=clean
  if ! tail -n 1 "$log" | grep -qx 'exit 0'; then
    failed=1
    result="finding: $(compgen -G "$findings/$target-[!s]*" || echo "none written, see $log")"
    cat "$log" >&2
  fi
  table+=$'\n'$(printf '%-20s %12s %10s  %s' "$target" "${runs:--}" "${coverage:--}" "$result")
done
echo "$table"
exit "$failed"
