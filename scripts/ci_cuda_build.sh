#!/usr/bin/env bash
# Builds the extension with its CUDA kernels on a machine without a GPU, in a copy of the tree and an environment of its
# own, and runs the CPU tests in that build. Needs nvcc and several gigabytes for a torch with CUDA.
# usage: ci_cuda_build.sh [pytest arguments]
#   TORCH=torch==2.14.1    a torch whose CUDA is nvcc's
#   TORCH_CUDA_ARCH_LIST   architectures; default: those of setup.py
#   CUDA_VENV=folder       an environment to use and keep
set -euo pipefail
cd "$(dirname "$0")/.."
command -v nvcc >/dev/null || { echo "no nvcc: nothing to check" >&2; exit 0; }
[ $# -gt 0 ] || set -- tests/test_ops.py tests/test_optimizer.py tests/test_segment.py tests/cuda
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${CUDA_VENV:-$work/venv}
if [ ! -x "$venv/bin/python" ]; then
  echo "== installing ${TORCH:=torch==2.14.1} ($SECONDS s)"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet "$TORCH" "setuptools>=77" wheel ninja numpy safetensors pytest hypothesis expecttest
fi
cp -r csrc l2l_fast tests setup.py pyproject.toml LICENSE README.md "$work"
cd "$work"
rm -f l2l_fast/_C*.so

echo "== building for ${TORCH_CUDA_ARCH_LIST:-all architectures} ($SECONDS s)"
FORCE_CUDA=1 PATH=$venv/bin:$PATH "$venv/bin/python" setup.py --quiet build_ext --inplace >build.log 2>&1 ||
  { tail -n 60 build.log >&2; exit 1; }

echo "== importing without a GPU ($SECONDS s)"
"$venv/bin/python" - <<'PY'
import torch

import l2l_fast

print(l2l_fast._C.build_info())
assert l2l_fast._C.build_info()["cuda"] is not None
for name in ("lstm_step", "lstm_step_", "lstm_step_backward", "lstm_segment_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"l2l_fast::{name}", "CUDA"), name
PY
echo "== tests ($SECONDS s)"
"$venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
echo "== done ($SECONDS s)"
