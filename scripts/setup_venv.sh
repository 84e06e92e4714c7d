#!/usr/bin/env bash
# Makes a virtual environment with torch and the build tools, or says what the machine lacks.
# usage: setup_venv.sh PYTHON VENV TORCH TORCH_INDEX
set -euo pipefail
python=$1 venv=$2 torch=$3 index=$4

fail() {
  printf 'l2l_fast cannot be set up: %s\n' "$1" >&2
  printf '  Debian/Ubuntu:  sudo apt-get install python3 python3-venv python3-dev g++ make\n' >&2
  printf '  Fedora:         sudo dnf install python3 python3-devel gcc-c++ make\n' >&2
  exit 1
}

if [ ! -x "$venv/bin/python" ]; then
  command -v "$python" >/dev/null || fail "there is no $python."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is $("$python" --version 2>&1), and 3.10 or later is needed (make PYTHON=...)."
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python lacks the venv module (package python3-venv)."
fi
interpreter=$python
[ ! -x "$venv/bin/python" ] || interpreter=$venv/bin/python
include=$("$interpreter" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -f "$include/Python.h" ] || fail "Python's headers are missing ($include/Python.h; package python3-dev)."
compiler=${CXX:-g++}
# CXX may carry options or a launcher ("ccache g++").
command -v ${compiler%% *} >/dev/null || fail "there is no C++ compiler '$compiler' (set CXX, or install g++)."
echo 'int main() { return 0; }' | $compiler -std=c++20 -x c++ - -o /dev/null 2>/dev/null ||
  fail "the C++ compiler '$compiler' does not accept -std=c++20 (GCC 10, Clang 10 or later)."

# An interrupted creation leaves an interpreter without pip.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  echo "== creating $venv ($("$python" --version))"
  "$python" -m venv "$venv"
fi
py=$venv/bin/python
if ! "$py" -c 'import torch' 2>/dev/null; then
  # PyTorch's own index has the small CPU builds; where it cannot be reached, the configured indexes must do.
  extra=()
  if [ -n "$index" ]; then
    if "$py" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10)' \
      "$index" 2>/dev/null; then
      extra=(--extra-index-url "$index")
    else
      echo "== $index cannot be reached; asking pip's configured indexes"
    fi
  fi
  echo "== installing $torch"
  "$py" -m pip install --progress-bar on ${extra[@]+"${extra[@]}"} "$torch"
fi
echo "== installing the build tools"
"$py" -m pip install --quiet "setuptools>=77" wheel ninja numpy
