#!/usr/bin/env bash
# The kernels, operators and their fuzz tests under AddressSanitizer and UndefinedBehaviorSanitizer.
# usage: asan.sh VENV [pytest arguments]
#
# First the kernels alone (tests/native), where every access is instrumented. Then the whole extension, built in
# build/asan beside a copy of the package and the tests, so that the one in the tree stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
py=$PWD/$1/bin/python
shift
# Without the tests of accuracy in ulp: they hold for optimised code, which contracts multiply-adds.
[ $# -gt 0 ] ||
  set -- tests/fuzz tests/test_ops.py tests/test_state.py tests/test_segment.py tests/test_segment_errors.py -k "not elementary_functions"

echo "== the kernels alone"
"$py" -m pytest -q -p no:cacheprovider tests/native/test_kernels.py

echo "== building the extension with sanitizers (build/asan)"
tree=$root/build/asan/tree
rm -rf "$tree"
mkdir -p "$tree"
# Only what changed is compiled; the file in l2l_fast/ is not touched.
sanitize="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
L2L_FAST_CXXFLAGS="$sanitize -fno-omit-frame-pointer -O1 -g1" \
  PATH=$(dirname "$py"):$PATH "$py" setup.py --quiet build_ext --build-lib build/asan/lib --build-temp build/asan/temp \
  >build/asan/build.log 2>&1 || { tail -n 40 build/asan/build.log >&2; exit 1; }
cp -r l2l_fast tests pyproject.toml "$tree"
rm -f "$tree"/l2l_fast/_C*.so
cp build/asan/lib/l2l_fast/_C*.so "$tree/l2l_fast/"

# The interpreter is not instrumented, so the runtime is preloaded; leaks are the interpreter's own; memory that cannot
# be had is an exception, as without the sanitizer.
cxx=${CXX:-g++}
preload="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$tree
cd "$tree"
LD_PRELOAD=$preload "$py" -c "
import l2l_fast, os
assert l2l_fast.__file__.startswith(os.getcwd()), l2l_fast.__file__
assert b'__asan_init' in open(l2l_fast._C.__file__, 'rb').read(), 'not instrumented'"
echo "== the tests on it, for every instruction set"
LD_PRELOAD=$preload "$py" -m pytest -q -p no:cacheprovider -p no:benchmark "$@"
