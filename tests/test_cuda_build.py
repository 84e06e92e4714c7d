"""Which CUDA kernels the build makes (cuda_build.py, setup.py): any nvcc with any torch gives an extension, or one line
that says why it has no CUDA."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import cuda_build
from cuda_build import Torch

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {0}, V{0}.{1}\n"
WHEEL_12 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"
WHEEL_128 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"


def fake_nvcc(folder: Path, script: str) -> dict[str, str]:
    """An environment whose nvcc is a script."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + script)
    nvcc.chmod(0o755)
    return {"PATH": f"{nvcc.parent}:/usr/bin:/bin"}


def of_release(folder: Path, release: str) -> dict[str, str]:
    return fake_nvcc(folder, f"cat <<'EOF'\n{RELEASE.format(release, 93)}EOF\n")


def pair(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


@pytest.mark.parametrize(
    ("release", "cuda", "flags", "expected"),
    [
        # What the wheels of torch were built for, with their own nvcc and with others of the same major version.
        ("12.4", "12.4", WHEEL_12, "7.5 8.0 8.6 9.0+PTX"),
        ("12.0", "12.6", WHEEL_12, "7.5 8.0 8.6 9.0+PTX"),
        ("12.8", "12.8", WHEEL_128, "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        ("12.9", "12.8", WHEEL_128, "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        ("12.6", "12.8", WHEEL_128, "7.5 8.0 8.6 9.0+PTX"),
        ("13.0", "13.0", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        ("13.0", "13.0", "sm_80 sm_90 sm_100 sm_110 sm_120 compute_120", "8.0 9.0 10.0 11.0 12.0+PTX"),
        ("12.9", "12.9", "sm_90a sm_100a sm_103 sm_103a sm_120f sm_121", "9.0 10.0 10.3 12.0 12.1+PTX"),
        ("12.8", "12.9", "sm_90 sm_100 sm_103 sm_120 sm_121", "9.0 10.0 12.0+PTX"),
        # Thor is 10.1 before CUDA 13 and 11.0 from then on; Orin is 8.7.
        ("12.9", "12.9", "sm_87 sm_101", "8.7 10.1+PTX"),
        ("13.0", "13.0", "sm_87 sm_88 sm_101 sm_110", "8.7 8.8 11.0+PTX"),
        ("12.9", "12.9", "sm_87 sm_88 sm_110", "8.7+PTX"),
        # PTX alone; order and repetition do not matter.
        ("12.6", "12.6", "compute_80", "8.0+PTX"),
        ("12.6", "12.6", "compute_90 sm_90 sm_80 sm_80", "8.0 9.0+PTX"),
        # An architecture of the future is known to the CUDA that torch was built with and to later ones.
        ("13.4", "13.4", "sm_90 sm_130", "9.0 13.0+PTX"),
        ("13.5", "13.4", "sm_90 sm_130", "9.0 13.0+PTX"),
        ("13.1", "13.4", "sm_90 sm_130", "9.0+PTX"),
        # A torch that does not say, or none of whose architectures nvcc knows: the default ones.
        ("12.0", "12.4", "", "7.5 8.0 8.6 8.9 9.0+PTX"),
        ("12.8", "12.8", "", "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("13.0", "13.0", "", "7.5 8.0 8.6 8.9 9.0 10.0 11.0 12.0+PTX"),
        ("12.6", "12.8", "sm_100 sm_120", "7.5 8.0 8.6 8.9 9.0+PTX"),
        ("12.6", "12.6", "sm_60 sm_70 compute_70", "7.5 8.0 8.6 8.9 9.0+PTX"),
    ],
)
def test_architectures_are_those_of_torch_that_nvcc_knows(tmp_path, release, cuda, flags, expected):
    torch = Torch("2.8.0", cuda, None, flags)
    made = cuda_build.plan(of_release(tmp_path, release), torch)
    assert made.cuda and made.reason == ""
    assert made.architectures == expected
    codes = [re.fullmatch(r"-gencode=arch=compute_(\d+),code=(sm|compute)_(\d+)", flag) for flag in made.nvcc_flags]
    assert all(code is not None and code[1] == code[3] for code in codes)
    numbers = [architecture.replace(".", "") for architecture in expected.removesuffix("+PTX").split()]
    assert [(code[2], code[3]) for code in codes] == [*(("sm", n) for n in numbers), ("compute", numbers[-1])]


@pytest.mark.parametrize("release", ["12.0", "12.4", "12.6", "12.8", "12.9", "13.0", "13.1", "14.0"])
@pytest.mark.parametrize("flags", ["", WHEEL_12, WHEEL_128, "sm_103 sm_110 sm_121"])
def test_every_architecture_chosen_is_known_to_nvcc_and_supported(release, flags):
    nvcc = pair(release)
    chosen = cuda_build.architectures(nvcc, Torch("2.9", release, None, flags))
    assert chosen and chosen == sorted(set(chosen))
    for architecture in chosen:
        assert architecture >= (7, 5)
        assert cuda_build.nvcc_knows(architecture, nvcc, nvcc)


@pytest.mark.parametrize("nvcc", [(12, 0), (12, 8), (12, 9), (13, 0)])
def test_the_default_runs_on_every_gpu_that_nvcc_knows(nvcc):
    chosen = cuda_build.defaults(nvcc)
    for gpu in (one for one in cuda_build.NVCC_SINCE if cuda_build.nvcc_knows(one, nvcc)):
        own_code = any(one[0] == gpu[0] and one[1] <= gpu[1] for one in chosen)
        assert own_code or gpu >= chosen[-1], f"nothing in {chosen} runs on {gpu}"


@pytest.mark.parametrize(
    ("release", "torch", "reason"),
    [
        ("13.0", Torch("2.13.0+cpu", None), "torch 2.13.0+cpu is built without CUDA"),
        ("12.8", Torch("2.7.0+xpu", None), "torch 2.7.0+xpu is built without CUDA"),
        ("12.8", Torch("2.7.0+rocm6.3", None, "6.3.42131"), "built for ROCm 6.3.42131"),
        ("12.8", Torch("2.7.0", "strange"), "torch.version.cuda is 'strange'"),
        ("11.8", Torch("2.6.0+cu118", "11.8", None, WHEEL_12), "C++20 needs CUDA 12"),
        ("11.2", Torch("2.6.0", "12.4", None, WHEEL_12), "C++20 needs CUDA 12"),
        ("13.0", Torch("2.6.0", "12.4", None, WHEEL_12), "of CUDA 13.0, but torch 2.6.0 of CUDA 12.4"),
        ("12.9", Torch("2.9.0", "13.0", None, WHEEL_128), "of CUDA 12.9, but torch 2.9.0 of CUDA 13.0"),
        ("12.4", Torch("2.6.0", "12.4", None, "sm_60 sm_70"), "built for 6.0 7.0, and the kernels need 7.5"),
    ],
)
def test_where_cuda_cannot_be_built_the_reason_is_one_line(tmp_path, release, torch, reason):
    environment = of_release(tmp_path, release)
    made = cuda_build.plan(environment, torch)
    assert not made.cuda and reason in made.reason
    assert "\n" not in made.reason and re.search(r"\(.*(set|install|unset)", made.reason), "says what would change it"
    assert made.nvcc_flags == ()
    with pytest.raises(RuntimeError, match=f"FORCE_CUDA=1, but .*{re.escape(reason)}"):
        cuda_build.plan({**environment, "FORCE_CUDA": "1"}, torch)
    assert cuda_build.plan({**environment, "FORCE_CUDA": "1", "L2L_FAST_CUDA": "0"}, torch) == cuda_build.Plan(False)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no licence >&2; exit 3", "exit code 3: no licence"),
        ("exit 1", "exit code 1: it says nothing"),
        ("kill -9 $$", "exit code -9"),
        ("echo", "names no release: ''"),
        ("echo 'gcc (GCC) 12.2'; echo two; echo three", "names no release: 'gcc (GCC) 12.2 two three'"),
        ("echo release twelve", "names no release"),
        ("printf '\\377\\376 release'", "names no release"),
        ("yes | head -n 9999", "names no release"),
    ],
)
def test_an_nvcc_that_fails_or_says_strange_things(tmp_path, script, reason):
    made = cuda_build.plan(fake_nvcc(tmp_path, script + "\n"), Torch("2.8.0", "12.8", None, WHEEL_128))
    assert not made.cuda and reason in made.reason
    assert "\n" not in made.reason and len(made.reason) < 400 + len(str(tmp_path))


def test_an_nvcc_that_is_no_program(tmp_path):
    environment = fake_nvcc(tmp_path, "")
    (tmp_path / "bin" / "nvcc").write_bytes(b"\x7fELF nonsense")
    made = cuda_build.plan(environment, Torch("2.8.0", "12.8", None, WHEEL_128))
    assert not made.cuda and "nvcc --version fails: " in made.reason


def test_a_release_is_found_among_other_words(tmp_path):
    for text, version in (
        ("Cuda compilation tools, release 12.10, V12.10.3", (12, 10)),
        ("x\nrelease 13.0\n", (13, 0)),
    ):
        fake_nvcc(tmp_path / text[:3], f"echo '{text}'\n")
        assert cuda_build.nvcc_version(str(tmp_path / text[:3] / "bin" / "nvcc")) == version


def test_no_nvcc(tmp_path, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, path: None if path == "/usr/local/cuda/bin" else which(name, path=path)
    )
    torch = Torch("2.8.0", "12.8", None, WHEEL_128)
    made = cuda_build.plan({"PATH": str(tmp_path)}, torch)
    assert not made.cuda and made.reason == "there is no nvcc (set CUDA_HOME to a toolkit of CUDA 12.8)"
    # Where one is named, torch takes no other: nor may the plan.
    environment = of_release(tmp_path, "12.8")
    assert cuda_build.plan(environment, torch).cuda
    made = cuda_build.plan({**environment, "CUDA_HOME": "/nowhere"}, torch)
    assert not made.cuda and "CUDA_HOME is /nowhere, where there is no bin/nvcc" in made.reason


def test_the_toolkit_that_is_named_goes_before_path(tmp_path):
    on_path = of_release(tmp_path / "old", "11.8")
    of_release(tmp_path / "new", "12.8")
    torch = Torch("2.8.0", "12.8", None, WHEEL_128)
    assert not cuda_build.plan(on_path, torch).cuda
    for name in ("CUDA_HOME", "CUDA_PATH"):
        made = cuda_build.plan({**on_path, name: str(tmp_path / "new")}, torch)
        assert made.cuda and made.home == str(tmp_path / "new")
    assert not cuda_build.plan({**on_path, "CUDA_HOME": ""}, torch).cuda


def test_a_wrapper_on_path_leads_to_its_toolkit(tmp_path):
    toolkit = tmp_path / "cuda-12.8"
    of_release(toolkit, "12.8")
    torch = Torch("2.8.0", "12.8", None, WHEEL_128)
    said = f"case $1 in --dryrun) echo '#$ TOP={toolkit}/bin/..' >&2;; *) exec {toolkit}/bin/nvcc;; esac\n"
    environment = fake_nvcc(tmp_path / "local", said)
    # Without headers it is no toolkit: the folder above nvcc is all there is to say.
    assert cuda_build.plan(environment, torch).home == str(tmp_path / "local")
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cuda_runtime.h").touch()
    assert cuda_build.plan(environment, torch).home == str(toolkit)


@pytest.mark.parametrize("given", ["9.0", "8.0;9.0a+PTX", "Hopper", "native", "7.0 nonsense"])
def test_architectures_that_are_given_are_taken_as_they_are(tmp_path, given):
    torch = Torch("2.8.0", "12.8", None, WHEEL_128)
    environment = of_release(tmp_path, "12.8")
    made = cuda_build.plan({**environment, "TORCH_CUDA_ARCH_LIST": given}, torch)
    assert made.cuda and made.architectures == given and made.nvcc_flags == ()  # torch reads the variable
    for empty in ("", " ", ";"):
        assert cuda_build.plan({**environment, "TORCH_CUDA_ARCH_LIST": empty}, torch).nvcc_flags


def test_torch_is_described_without_asking_a_gpu():
    import torch

    described = cuda_build.describe(torch)
    assert described.version == torch.__version__ and described.cuda == torch.version.cuda
    assert not torch.cuda.is_initialized()
    if torch.version.cuda is not None:
        assert cuda_build.built_for(described.flags)


def test_torch_leaves_the_architectures_to_these_flags():
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    # Otherwise torch would add those of the GPUs it finds, or fail where there are none.
    assert _get_cuda_arch_flags(["-O3", *cuda_build.gencode([(9, 0), (10, 3)])]) == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_this_nvcc_compiles_for_what_is_chosen(tmp_path):
    nvcc = shutil.which("nvcc")
    version = cuda_build.nvcc_version(nvcc)
    if version < cuda_build.FIRST_WITH_CXX20:
        pytest.skip(f"nvcc of CUDA {cuda_build.dotted(version)}")
    home = cuda_build.toolkit(nvcc)
    assert (Path(home) / "bin" / "nvcc").is_file() and (Path(home) / "include" / "cuda_runtime.h").is_file()
    source = tmp_path / "empty.cu"
    source.write_text("__global__ void kernel(int* out) { *out = 1; }\n")
    known = [one for one in cuda_build.NVCC_SINCE if cuda_build.nvcc_knows(one, version)]
    assert set(cuda_build.defaults(version)) <= set(known)
    command = [nvcc, "-std=c++20", *cuda_build.gencode(known), "-c", str(source), "-o", str(tmp_path / "empty.o")]
    subprocess.run(command, check=True, capture_output=True)
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    supported = [one for one in cuda_build.built_for(listed, "sm") if one in cuda_build.NVCC_SINCE]
    assert sorted(known) == supported, "the table and nvcc disagree"


def test_the_build_does_not_fail_on_the_warnings_of_another_compiler():
    lists = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").endswith("_FLAGS"):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    assert {"CXX_FLAGS", "NVCC_FLAGS"} <= set(lists)
    assert not [flag for flags in lists.values() for flag in flags if "error" in flag.lower()]


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # CXX=false: what is said is said before anything is compiled.
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_CUDA", "L2L_FAST_CUDA")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**kept, "CXX": "/bin/false", "CC": "/bin/false", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_setup_py_says_in_one_line_why_there_is_no_cuda(tmp_path):
    import torch

    no_nvcc = {"CUDA_HOME": str(tmp_path)}
    build = ("--quiet", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = setup_py(*build, **no_nvcc)
    said = [line for line in done.stderr.splitlines() if line.startswith("l2l_fast: ")]
    because = "is built without CUDA" if torch.version.cuda is None else "there is no bin/nvcc"
    assert len(said) == 1, done.stderr
    assert said[0].startswith("l2l_fast: only the CPU part is built: ") and because in said[0]
    # Where it was asked for, there is nothing to say; where CUDA was asked for, it is an error.
    assert "only the CPU part" not in setup_py(*build, L2L_FAST_CUDA="0", **no_nvcc).stderr
    forced = setup_py("--version", FORCE_CUDA="1", **no_nvcc)
    assert forced.returncode != 0 and "RuntimeError: FORCE_CUDA=1, but " in forced.stderr and because in forced.stderr


def test_setup_py_runs_without_its_folder_on_the_path(tmp_path):
    # As pip runs it; and the source distribution holds all that it needs.
    code = "import sys; from setuptools.build_meta import build_sdist; sys.path[:] = [p for p in sys.path if p]; "
    code += "build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=copy_of_sources(tmp_path / "tree"),
        check=True,
        capture_output=True,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"setup.py", "cuda_build.py"} <= names


def copy_of_sources(target: Path) -> Path:
    """What builds the package, without what a source distribution only carries along."""
    target.mkdir()
    for name in ("setup.py", "cuda_build.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for name in ("l2l_fast", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.gz"))
    return target
