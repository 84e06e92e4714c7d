#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the tree and runs tests on it.
# usage: run_sanitized.sh VENV [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
py=$PWD/$1/bin/python
shift
# By default what drives the kernels directly; torch.compile would start compilers under the preloaded runtime.
[ $# -gt 0 ] || set -- $(ls tests/test_ops.py tests/test_state.py tests/test_optimizer.py tests/test_segment*.py 2>/dev/null)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r csrc l2l_fast tests setup.py pyproject.toml "$work"
[ ! -f README.md ] || cp README.md LICENSE "$work"
cd "$work"
rm -f l2l_fast/_C*.so

echo "== building with sanitizers"
L2L_FAST_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1" \
  "$py" setup.py --quiet build_ext --inplace >build.log 2>&1 || { tail -n 40 build.log >&2; exit 1; }

# The interpreter itself is not instrumented, so the runtime is preloaded; leaks are those of the interpreter.
export LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
PYTHONPATH=$work "$py" -c "import l2l_fast, os; assert l2l_fast.__file__.startswith(os.getcwd()), l2l_fast.__file__"
PYTHONPATH=$work "$py" -m pytest -q -p no:cacheprovider "$@"
