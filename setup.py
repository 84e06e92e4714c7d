"""Builds l2l_fast._C: the operators, their CPU kernels (one translation unit per instruction set) and, where there are
nvcc and a torch with CUDA, their CUDA kernels.

FORCE_CUDA=1 insists on CUDA, L2L_FAST_CUDA=0 leaves it out. TORCH_CUDA_ARCH_LIST chooses the architectures. The GPU of
the building machine is never asked, and an extension with CUDA kernels imports on a machine without one.
"""

import os
import platform
import runpy
import shutil
import subprocess

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

# By its path: importing the package would want the extension that is to be built.
VERSION = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "l2l_fast", "version.py"))["VERSION"]

# No -march: each csrc/cpu/kernels_*.cpp names its own instruction set and one is chosen at run time.
# No -ffast-math: the kernels' rounding and NaN handling rely on IEEE semantics.
# -fopenmp only compiles the parallel regions of at::parallel_for; no OpenMP library is linked, so that they run in the
# one that torch itself has loaded and obey torch.set_num_threads.
# -Wno-maybe-uninitialized: GCC 12 takes the undefined vectors inside its own AVX-512 intrinsics for a mistake.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",
    "-Wno-sign-compare",
    "-Wno-maybe-uninitialized",
]


def sources() -> list[str]:
    kernels = ["baseline"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        kernels += ["avx2", "avx512"]
    cpu = ["backward", "dispatch", "gac", "gac_backward", "gac_step", "packing", "parallel", "step"]
    cpu += [f"kernels_{name}" for name in kernels]
    shared = ["ops", "module", "aliasing", "checks", "gac_checks", "overlap"]
    return [*(f"csrc/{name}.cpp" for name in shared), *(f"csrc/cpu/{name}.cpp" for name in cpu)]


CUDA_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
NVCC_FLAGS = ["-O3", "-std=c++20", "-Werror", "all-warnings", "-Xcompiler", "-fvisibility=hidden"]


def with_cuda() -> bool:
    """Whether to build the CUDA kernels. RuntimeError where they are asked for and cannot be built."""
    if os.environ.get("L2L_FAST_CUDA") == "0":
        return False
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    forced = os.environ.get("FORCE_CUDA") == "1"
    if nvcc is None or torch.version.cuda is None:
        if forced:
            missing = "nvcc" if nvcc is None else f"a torch with CUDA (this is {torch.__version__})"
            raise RuntimeError(f"FORCE_CUDA=1, but there is no {missing}")
        return False
    matches = torch.version.cuda.split(".")[0] == nvcc_major(nvcc)
    if forced and not matches:
        raise RuntimeError(f"FORCE_CUDA=1, but {nvcc} is not of CUDA {torch.version.cuda}, with which torch was built")
    return matches


def nvcc_major(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(".")[0]


# For sanitizer builds: flags for the compiler and, where they are -fsanitize, for the linker.
extra = os.environ.get("L2L_FAST_CXXFLAGS", "").split()
cuda = with_cuda()
cxx_flags, nvcc_flags, paths = [*CXX_FLAGS, f'-DL2L_FAST_VERSION="{VERSION}"', *extra], [], sources()
if cuda:
    # Set, so that torch does not choose the architectures of the GPUs it finds.
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    cxx_flags = [*cxx_flags, "-DL2L_FAST_WITH_CUDA", f'-DL2L_FAST_CUDA_ARCHITECTURES="{architectures}"']
    nvcc_flags = NVCC_FLAGS
    paths += [f"csrc/cuda/{name}.cu" for name in ("step", "backward", "gac_step", "gac_backward")]
setup(
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "l2l_fast._C",
            paths,
            extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
            extra_link_args=[flag for flag in extra if flag.startswith("-fsanitize")],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
