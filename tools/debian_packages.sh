#!/usr/bin/env bash
# Installs Debian packages that some tests need, where that is possible: debian_packages.sh COMMAND=PACKAGE...
# Elsewhere it says what is missing; the tests that need it fail, and say so too.
# No service of theirs is started, neither now nor at the next boot: tests start what they need themselves.
set -euo pipefail

missing=()
for pair in "$@"; do
  command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed, and some tests need them: ${missing[*]}" >&2
  exit 0
fi

# Debian's own way to say that packages start no services; where the machine has said something already, that stands.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
for package in "${missing[@]}"; do
  for unit in $(dpkg -L "$package" | grep -E '^(/usr)?/lib/systemd/system/[^/]+\.service$' || true); do
    if [ -d /run/systemd/system ]; then systemctl disable --quiet "$(basename "$unit")"; fi
  done
done
