#!/usr/bin/env bash
# The format of every source file, and clang-tidy over the host sources of the CPU half apart from the tests.
set -euo pipefail
cd "$(dirname "$0")/../.."

git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format-14 --dry-run -Werror
echo "lint: the format is right"

command -v ninja >/dev/null && export CMAKE_GENERATOR=Ninja
cmake --preset cpu -DVESPER_TESTS=OFF -B build-lint >/dev/null
findings=$(mktemp)
trap 'rm -f "$findings"' EXIT
status=0
sed -n 's/^ *"file": "\(.*\)",\{0,1\}$/\1/p' build-lint/compile_commands.json | sort -u |
  xargs -P "$(nproc)" -n 1 clang-tidy-14 --quiet -p build-lint >"$findings" 2>/dev/null || status=1
if [[ $status -ne 0 || -s $findings ]]; then
  grep -E '(error|warning):' "$findings" | sort -u >&2 || true
  echo "lint: clang-tidy found the above; run clang-tidy-14 -p build-lint FILE for the context" >&2
  exit 1
fi
echo "lint: clang-tidy found nothing"
