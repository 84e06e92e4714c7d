"""Gives a wheel its manylinux tag by auditwheel, without torch's libraries in it: the extension must use those that
`import torch` has loaded, a second copy would have devices, threads and operators of its own.

usage: repair_wheel.py WHEEL FOLDER
"""

import pathlib
import subprocess
import sys
import zipfile

# Of torch and of the CUDA runtime that it brings.
FOREIGN = ["libtorch*.so*", "libc10*.so*", "libcuda*.so*", "libnv*.so*", "libcu*.so*"]


def main(wheel: str, folder: str) -> None:
    exclude = [word for name in FOREIGN for word in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", wheel, "--wheel-dir", folder, *exclude]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout + f"auditwheel failed on {wheel}")
    (made,) = pathlib.Path(folder).glob("*.whl")
    assert "manylinux" in made.name, f"expected a manylinux wheel, got {made.name}"
    libraries = [name for name in zipfile.ZipFile(made).namelist() if ".so" in name]
    own = [name for name in libraries if name.startswith("l2l_fast/_C.")]
    assert libraries == own and len(own) == 1, f"expected the extension alone, got {libraries}"


if __name__ == "__main__":
    main(*sys.argv[1:])
