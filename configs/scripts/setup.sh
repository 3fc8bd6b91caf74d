#!/usr/bin/env bash
# setup.sh GROUP...: installs the Debian packages of the groups (build, test, fuzz, lint, dist) that are missing.
set -euo pipefail

wanted=()
for group in "$@"; do
  case $group in
    build) wanted+=(cmake g++ ninja-build libsentencepiece-dev libpcre2-dev libutf8proc-dev nlohmann-json3-dev libspdlog-dev libcli11-dev) ;;
    test) wanted+=(libgtest-dev) ;;
    fuzz) wanted+=(clang-14 libclang-rt-14-dev llvm-14) ;;  # the last names the lines of a finding
    lint) wanted+=(git clang-format-14 clang-tidy-14) ;;
    dist) wanted+=(patchelf) ;;
    *)
      echo "setup.sh: found the group '$group', expected build, test, fuzz, lint or dist" >&2
      exit 2
      ;;
  esac
done

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "setup: no apt-get here, so nothing was installed; what Debian calls ${wanted[*]} must be there" >&2
  exit 0
fi

missing=()
for package in "${wanted[@]}"; do
  state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $state == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

as_root=()
if [[ $(id -u) -ne 0 ]]; then
  # Without a terminal sudo must not stop to ask for a password.
  if ! command -v sudo >/dev/null || { [[ ! -t 0 ]] && ! sudo -n true 2>/dev/null; }; then
    echo "setup: found missing packages and neither root nor sudo; have an administrator run:" \
      "apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "setup: installing ${missing[*]}"
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" >/dev/null
}
install() {
  apt install -y --no-install-recommends "${missing[@]}"
}
# A fresh image has empty lists, an old one lists that name packages which are gone: both are mended by one update.
if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || ! install; then
  apt update
  install
fi
