#!/usr/bin/env bash
# test.sh [FOLDER [SECONDS]]: runs the tests of a build folder (build/), each program for at most so long (600), and ends
# with how many passed, failed and were skipped, and why.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build}
status=0
ctest --test-dir "$folder" --output-on-failure -j "$(nproc)" --timeout "${2:-600}" || status=$?
awk -v status="$status" -f tests/count.awk "$folder"/Testing/Temporary/LastTest.log
