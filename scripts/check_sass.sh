#!/usr/bin/env bash
# Compiles the CUDA kernels for every architecture with warnings as errors and holds their machine code to its budget
# (bench/sass.py). Does nothing where there is no nvcc.
# usage: check_sass.sh VENV [architectures]
set -euo pipefail
cd "$(dirname "$0")/.."
py=$PWD/$1/bin/python
shift
if ! command -v nvcc >/dev/null; then
  echo "== no nvcc: the CUDA kernels are not compiled"
  exit 0
fi
"$py" -c 'from bench.sass import tool; tool("cuobjdump")' 2>/dev/null ||
  "$py" -m pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
"$py" -m bench.sass "$@"
