#!/usr/bin/env bash
# test.sh [FOLDER]: runs the tests of a build folder (build) and ends with how many passed, failed and were skipped, and why.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build}
status=0
ctest --test-dir "$folder" --output-on-failure -j "$(nproc)" --timeout 600 || status=$?
awk -v status="$status" -f tests/count.awk "$folder"/Testing/Temporary/LastTest.log
