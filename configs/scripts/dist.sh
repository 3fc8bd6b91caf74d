#!/usr/bin/env bash
# Makes dist/vesper-VERSION-linux-x86_64/ and its archive from build-release/: the binary, the test programs and every
# shared library they need, except the C library, the GPU's driver and the CUDA libraries, which the target must have.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=${1:-build-release}
version=$(sed -n "s/^CMAKE_PROJECT_VERSION:STATIC=//p" "$build/CMakeCache.txt")
name=vesper-$version-linux-x86_64
bundle=dist/$name
rm -rf "$bundle" "$bundle.tar.xz"
mkdir -p "$bundle"/{apps,bin,lib/fallback,configs,tests,licenses}

cp "$build/bin/vesper" "$bundle/bin/"
cp "$build"/tests/*_test tests/run.sh tests/gpu.sh tests/count.awk "$bundle/tests/"
cp LICENSE README.md "$bundle/"
for folder in configs/demo configs/models configs/attention configs/repro configs/scripts apps/peers apps/plots apps/results tests/golden; do
  [[ ! -d $folder ]] || cp -RL "$folder" "$bundle/$folder"
done
programs=("$bundle"/bin/vesper "$bundle"/tests/*_test)

# The target's own: the C library and what belongs to it, the driver, CUDA.
target_libraries='^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util)|libcuda|libnvidia-.*|libcudart|libcublas|libcublasLt|libnccl)\.so'
ldd "${programs[@]}" | awk '$2 == "=>" { print $1, $3 }' | sort -u | while read -r soname path; do
  [[ ! $soname =~ $target_libraries ]] || continue
  if [[ $path != /* ]]; then
    echo "dist: $soname is needed and was not found" >&2
    exit 1
  fi
  # The C++ runtime is the last resort: one that the target has fits the target's C library, ours may be too new for it.
  folder=lib
  [[ ! $soname =~ ^lib(stdc\+\+|gcc_s)\.so ]] || folder=lib/fallback
  cp -L "$path" "$bundle/$folder/$soname"
  package=$(dpkg-query -S "$(realpath "$path")" 2>/dev/null | head -n 1 | cut -d: -f1 || true)
  if [[ -n $package && -e /usr/share/doc/$package/copyright ]]; then
    cp -L "/usr/share/doc/$package/copyright" "$bundle/licenses/$package"
  fi
done

system=/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu:/lib64:/usr/lib64
cuda=/usr/local/cuda/lib64:/usr/local/cuda/lib:/usr/local/cuda-13/lib64:/usr/local/cuda-13.0/lib64
libraries=("$bundle"/lib/*.so*)
strip "${programs[@]}" "${libraries[@]}"
for file in "${programs[@]}" "${libraries[@]}"; do
  lib=\$ORIGIN/../lib  # from bin/, tests/ and lib/ alike
  patchelf --set-rpath "$lib:$cuda:$system:$lib/fallback" "$file"
done

XZ_OPT="-T0 -2" tar -C dist --sort=name --owner=0 --group=0 --numeric-owner -cJf "$bundle.tar.xz" "$name"
glibc=$(objdump -T "${programs[@]}" "${libraries[@]}" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
echo "dist: $bundle.tar.xz, $(du -m "$bundle.tar.xz" | cut -f1) MB, needs ${glibc/_/ } or newer"
