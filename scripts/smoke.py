"""Uses an installed l2l_fast as its users do; run it outside the source tree.

usage: smoke.py [FOLDER]    (FOLDER: where the installation must lie)
"""

import importlib.metadata
import pathlib
import subprocess
import sys

import torch

import l2l_fast
from l2l_fast.problems.data import EMBEDDED, load_mnist

folder = pathlib.Path(l2l_fast.__file__).resolve().parent
if len(sys.argv) > 1:
    assert folder.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), f"imported {folder}, not the fresh installation"
assert (folder / "py.typed").is_file(), "py.typed is missing"

model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
optimizer = l2l_fast.LearnedOptimizer(model.parameters(), l2l_fast.load_pretrained("general"), total_steps=3)
x = torch.ones(4, 3)
for _ in range(3):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters())), "a step changed nothing"

data = load_mnist(EMBEDDED)
version = importlib.metadata.version("l2l_fast")
assert version == l2l_fast.__version__, f"metadata says {version}, the package {l2l_fast.__version__}"
beside = pathlib.Path(sys.executable).with_name("l2l-fast")
for command in ([sys.executable, "-m", "l2l_fast"], [str(beside)]):
    said = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
    assert said == f"l2l_fast {version}\n", f"{' '.join(command)} --version printed {said!r}"
print(f"== l2l_fast {version} works: three steps, {data.name} ({len(data.split('train'))} images), l2l-fast --version")
