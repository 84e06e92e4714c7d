#!/usr/bin/env bash
# Builds the source distribution, installs it into a fresh environment and uses it there.
# usage: check_sdist.sh VENV     (VENV: where torch and the build tools are)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
py=$PWD/$1/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== building the source distribution"
"$py" - "$work/dist" >"$work/sdist.log" 2>&1 <<'PY' || { cat "$work/sdist.log" >&2; exit 1; }
import sys
from setuptools.build_meta import build_sdist

build_sdist(sys.argv[1])
PY
sdist=$(ls "$work"/dist/*.tar.gz)

# A fresh environment that sees torch and the tools of VENV, but neither its l2l_fast nor this folder: a path line in a
# .pth file adds a folder without reading the .pth files (the editable installation) in it.
"$py" -m venv --without-pip "$work/venv"
fresh=$work/venv/bin/python
"$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
  >"$("$fresh" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/parent.pth"

echo "== installing $(basename "$sdist") ($(du -k "$sdist" | cut -f1) kB) into a fresh environment"
cd "$work"
PATH=$(dirname "$py"):$PATH "$fresh" -m pip install --quiet --no-build-isolation --no-deps --ignore-installed "$sdist"
"$fresh" "$root/scripts/smoke.py" "$work/venv"
