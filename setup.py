"""Builds l2l_fast._C: the operators, their CPU kernels (one translation unit per instruction set) and, where there are
nvcc and a torch with CUDA, their CUDA kernels; else it says in a line why not (cuda_build.py decides).

FORCE_CUDA=1 insists on CUDA, L2L_FAST_CUDA=0 leaves it out. TORCH_CUDA_ARCH_LIST chooses the architectures; without it
they are those that torch was built for, as far as nvcc and the kernels support them. L2L_FAST_CXXFLAGS and
L2L_FAST_NVCCFLAGS add flags. L2L_FAST_PIN_TORCH=1 is for wheels: they demand the torch that they are compiled for. The
GPU of the building machine is never asked, and an extension with CUDA kernels imports on a machine without one.
"""

import importlib.util
import os
import platform
import sys
from types import ModuleType

import torch
from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))

# No -march: each csrc/cpu/isa/*.cpp names its own instruction set and one is chosen at run time.
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
        kernels += ["avx2", "avx512", "avx512bf16"]
    cpu = ["averages", "backend", "backward", "dispatch", "layered_backward", "layered_forward"]
    cpu += ["orthogonalized", "packing", "parallel", "step", "tensor_inputs", "tensor_steps", "tensor_sums"]
    cpu += [f"isa/{name}" for name in kernels]
    ops = ["aliasing", "arguments", "operators", "overlap", "schema"]
    return ["csrc/module.cpp", *(f"csrc/ops/{name}.cpp" for name in ops), *(f"csrc/cpu/{name}.cpp" for name in cpu)]


def headers() -> list[str]:
    found = [os.path.join(folder, name) for folder, _, names in os.walk("csrc") for name in names]
    return sorted(path for path in found if path.endswith((".h", ".cuh")))


# No warning is an error here: another nvcc, or the headers of another torch, may have warnings of their own.
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden"]


def load(*path: str) -> ModuleType:
    """A module of this folder by its path: pip builds without this folder on sys.path, and importing the package would
    want the extension that is to be built."""
    spec = importlib.util.spec_from_file_location(path[-1].removesuffix(".py"), os.path.join(HERE, *path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERSION = load("l2l_fast", "kernels", "version.py").VERSION
cuda_build = load("cuda_build.py")
plan = cuda_build.plan(os.environ, cuda_build.describe(torch))
if plan.cuda:
    # torch looks for the toolkit when this module of it is imported, and takes the folder above any nvcc for it.
    os.environ["CUDA_HOME"] = plan.home
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def dependencies() -> list[str]:
    """An extension works with the torch that it was compiled for. Who installs from source compiles for the torch that
    is there; a wheel must name its own."""
    torch_here = "torch>=2.6,<3"
    if os.environ.get("L2L_FAST_PIN_TORCH") == "1":
        torch_here = "torch==" + ".".join(torch.__version__.split(".")[:2]) + ".*"
    return [torch_here, "numpy>=1.24", "safetensors>=0.4"]


class Build(BuildExtension):
    def run(self) -> None:
        if plan.reason:
            print(f"l2l_fast: only the CPU part is built: {plan.reason}", file=sys.stderr, flush=True)
        super().run()


# For sanitizer builds: flags for the compiler and, where they are -fsanitize, for the linker.
extra = os.environ.get("L2L_FAST_CXXFLAGS", "").split()
cxx_flags, nvcc_flags, paths = [*CXX_FLAGS, f'-DL2L_FAST_VERSION="{VERSION}"', *extra], [], sources()
if plan.cuda:
    cxx_flags = [*cxx_flags, "-DL2L_FAST_WITH_CUDA", f'-DL2L_FAST_CUDA_ARCHITECTURES="{plan.architectures}"']
    # With architectures among these flags, torch does not choose those of the GPUs it finds.
    nvcc_flags = [*NVCC_FLAGS, *plan.nvcc_flags, *os.environ.get("L2L_FAST_NVCCFLAGS", "").split()]
    paths += ["csrc/cuda/backend.cu"]
setup(
    install_requires=dependencies(),
    ext_modules=[
        (CUDAExtension if plan.cuda else CppExtension)(
            "l2l_fast._C",
            paths,
            # Without ninja, setuptools compiles again only what is older than these.
            depends=[*headers(), "setup.py", "cuda_build.py", "l2l_fast/kernels/version.py"],
            extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
            extra_link_args=[flag for flag in extra if flag.startswith("-fsanitize")],
        )
    ],
    cmdclass={"build_ext": Build},
)
