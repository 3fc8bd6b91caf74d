#!/usr/bin/env bash
# build.sh run|test|sanitize|release: configures and builds.
#   run      build/bin/vesper for what this machine can run, no tests: without a GPU the CPU half only, which takes a
#            fraction of the time; a build/ that holds more already is brought up to date as it is
#   test     all that the toolchain allows, with the tests, in build/
#   sanitize the CPU half with the tests, under AddressSanitizer and UndefinedBehaviorSanitizer, in build-sanitize/
#   release  the same for every supported GPU, in build-release/
set -euo pipefail
cd "$(dirname "$0")/../.."

command -v ninja >/dev/null && export CMAKE_GENERATOR=Ninja
if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache CMAKE_CUDA_COMPILER_LAUNCHER=ccache
fi

# One job a core, but no more than memory carries: a CUDA file may take 1.5 GB to compile.
jobs=$(nproc)
memory_jobs=$(awk '/^MemAvailable/ { print int($2 / 1572864) }' /proc/meminfo)
[[ $memory_jobs -ge $jobs ]] || jobs=$((memory_jobs > 0 ? memory_jobs : 1))

has_gpu() {
  [[ -n $(compgen -G '/dev/nvidia[0-9]*') || -e /dev/dxg ]]  # the latter under Windows
}

# What build/ is compiled for: this machine's GPU, else the default of configs/cmake/vesper.cmake. Code for 8.0 runs on
# every later GPU (its PTX is compiled when loaded); 9.0 has its own.
target=()
if has_gpu && command -v nvidia-smi >/dev/null; then
  case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) in
    9.0) target=(-DCMAKE_CUDA_ARCHITECTURES=90a) ;;
    *) target=(-DCMAKE_CUDA_ARCHITECTURES=80) ;;
  esac
fi

case ${1:-} in
  run)
    if has_gpu; then
      cmake --preset default -DVESPER_TESTS=OFF "${target[@]}"
    elif [[ ! -e build/CMakeCache.txt ]]; then
      echo "build: no NVIDIA GPU here, so the CPU half is built"
      cmake --preset default -DVESPER_TESTS=OFF -DVESPER_CUDA=OFF
    fi
    cmake --build build --target vesper -j "$jobs"
    ;;
  test)
    cmake --preset default "${target[@]}"
    cmake --build build -j "$jobs"
    ;;
  sanitize)
    cmake --preset sanitize
    cmake --build build-sanitize -j "$jobs"
    ;;
  release)
    cmake --preset release
    cmake --build build-release -j "$jobs"
    ;;
  *)
    echo "build.sh: found '${1:-}', expected run, test, sanitize or release" >&2
    exit 2
    ;;
esac
