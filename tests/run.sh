#!/usr/bin/env bash
# Runs every test program beside this script, in a bundle made by `make dist`; arguments go to each of them
# (--gtest_filter=...). Ends with how many cases passed, failed and were skipped, and why.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export VESPER_TEST_ROOT=${VESPER_TEST_ROOT:-$(dirname "$here")}
log=$(mktemp)
trap 'rm -f "$log" "$log.one"' EXIT
programs=("$here"/*_test)
for i in "${!programs[@]}"; do
  name=$(basename "${programs[i]}")
  printf '%s/%s Testing: %s\n' $((i + 1)) ${#programs[@]} "$name" | tee -a "$log"
  if "${programs[i]}" "$@" >"$log.one" 2>&1; then
    outcome='Test Passed.'
  else
    outcome='Test Failed.'
    cat "$log.one"
  fi
  cat "$log.one" >>"$log"
  echo "$outcome" >>"$log"
done
awk -v status=0 -f "$here/count.awk" "$log"
