#!/usr/bin/env bash
# Installs Debian packages that some tests need, where that is possible: debian_packages.sh COMMAND=PACKAGE...
# Elsewhere it says what is missing; the tests that need it are then skipped, and say so too.
set -euo pipefail

missing=()
for pair in "$@"; do
  command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed, and tests that need them will be skipped: ${missing[*]}" >&2
  exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
