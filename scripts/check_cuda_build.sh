#!/usr/bin/env bash
# Builds the extension with its CUDA kernels, in a copy of the tree and an environment of its own (build/cuda), imports
# it and runs the CPU tests in it; with a GPU, the tests marked cuda too. Needs nvcc and, the first time, gigabytes for a
# torch with CUDA; does nothing where there is no nvcc. What is already done is not done again.
# usage: check_cuda_build.sh [pytest arguments]
#   TORCH_CUDA=torch==2.14.1      a torch whose CUDA is nvcc's
#   TORCH_CUDA_ARCH_LIST=9.0      architectures; empty: those that setup.py chooses (bench.sass compiles all of them)
#   CUDA_VENV=folder              another environment
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvcc >/dev/null; then
  echo "== no nvcc: the CUDA build is skipped"
  exit 0
fi
[ $# -gt 0 ] || set -- tests/test_ops.py tests/test_ops_torch.py tests/test_optimizer*.py tests/test_segment*.py tests/cuda
torch=${TORCH_CUDA:-torch==2.14.1}
venv=${CUDA_VENV:-$PWD/build/cuda/venv}
py=$venv/bin/python
tree=$PWD/build/cuda/tree
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST-9.0} FORCE_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export L2L_FAST_NVCCFLAGS="-Werror all-warnings ${L2L_FAST_NVCCFLAGS:-}"
if ! "$py" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
  echo "== installing $torch into $venv ($SECONDS s)"
  python3 -m venv "$venv"
  "$py" -m pip install --quiet "$torch"
fi
"$py" -c 'import expecttest, hypothesis, ninja, numpy, pytest, safetensors, wheel' 2>/dev/null ||
  "$py" -m pip install --quiet "setuptools>=77" wheel ninja numpy safetensors pytest hypothesis expecttest

# Only what differs is copied, so that only what changed is compiled.
mkdir -p "$tree"
"$py" - "$tree" <<'PY'
import filecmp
import pathlib
import shutil
import sys

target = pathlib.Path(sys.argv[1])
skip = {"__pycache__", ".pytest_cache"}
single = "setup.py cuda_build.py pyproject.toml MANIFEST.in LICENSE README.md"
wanted = {pathlib.Path(name) for name in single.split()}
for folder in ("csrc", "l2l_fast", "tests"):
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file() and path.suffix != ".so")
    wanted |= {path for path in files if not skip & set(path.parts)}
for folder in ("csrc", "l2l_fast", "tests"):
    for old in (target / folder).rglob("*"):
        if old.is_file() and old.suffix != ".so" and old.relative_to(target) not in wanted:
            old.unlink()
for path in wanted:
    copy = target / path
    if not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
PY
cd "$tree"

echo "== building for ${TORCH_CUDA_ARCH_LIST:-the architectures of torch and nvcc} ($SECONDS s)"
PATH=$venv/bin:$PATH "$py" setup.py --quiet build_ext --inplace >build.log 2>&1 ||
  { tail -n 60 build.log >&2; exit 1; }

echo "== importing without a GPU ($SECONDS s)"
CUDA_VISIBLE_DEVICES= "$py" - <<'PY'
import os

import torch

import l2l_fast

assert l2l_fast.__file__.startswith(os.getcwd()), l2l_fast.__file__
print(l2l_fast._C.build_info())
assert l2l_fast._C.build_info()["cuda"] is not None
for name in ("step", "step_", "step_backward", "segment_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"l2l_fast::{name}", "CUDA"), name
PY
echo "== tests ($SECONDS s)"
"$py" -m pytest -q -p no:cacheprovider "$@"
echo "== the CUDA build is in order ($SECONDS s)"
