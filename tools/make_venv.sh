#!/usr/bin/env bash
# Makes a virtual environment with Python 3.11 or newer and installs into it: make_venv.sh FOLDER PIP-ARGUMENTS...
# On Debian, as root, it installs the venv module first where it is missing.
set -euo pipefail
folder=$1
shift

find_python() {
  local name
  for name in python3.11 python3; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "Stretto needs Python 3.11 or newer; none was found (on Debian 12: apt-get install python3 python3-venv)" >&2
  exit 1
}

python=$(find_python)
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "$python has no venv module; install it (on Debian: apt-get install python3-venv) and run make again" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
fi

if ! "$folder/bin/python" -c 'import pip' 2>/dev/null; then
  rm -rf "$folder"
  "$python" -m venv "$folder"
fi
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
# The pinned torch first: a range would make pip choose the newest build, with gigabytes of CUDA libraries.
if [[ " $* " == *" constraints.txt "* ]]; then
  "${pip[@]}" "$(grep '^torch==' constraints.txt)"
fi
"${pip[@]}" "$@"
