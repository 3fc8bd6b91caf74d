#!/usr/bin/env bash
# Runs the tests of build/ and ends with how many passed, failed and were skipped, and why.
set -euo pipefail
cd "$(dirname "$0")/../.."
status=0
ctest --test-dir build --output-on-failure -j "$(nproc)" --timeout 600 || status=$?
awk -v status="$status" -f tests/count.awk build/Testing/Temporary/LastTest.log
