#!/usr/bin/env bash
# Generates the Python code beside the .proto files, or into another folder: generate.sh PYTHON [OUT]
set -euo pipefail
python=$1
root=$(cd "$(dirname "$0")" && pwd)
out=${2:-$root}
bin=$(dirname "$python")
cd "$root"
"$python" -m grpc_tools.protoc -I . \
  --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" \
  stretto_proto/v1/*.proto
