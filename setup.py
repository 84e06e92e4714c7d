"""Builds l2l_fast._C: the operators and their CPU kernels, one translation unit per instruction set."""

import os
import platform

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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
    cpu = ["backward", "dispatch", "packing", "parallel", "step", *(f"kernels_{name}" for name in kernels)]
    return ["csrc/ops.cpp", "csrc/module.cpp", "csrc/checks.cpp", *(f"csrc/cpu/{name}.cpp" for name in cpu)]


# For sanitizer builds: flags for the compiler and, where they are -fsanitize, for the linker.
extra = os.environ.get("L2L_FAST_CXXFLAGS", "").split()
setup(
    ext_modules=[
        CppExtension(
            "l2l_fast._C",
            sources(),
            extra_compile_args={"cxx": CXX_FLAGS + extra},
            extra_link_args=[flag for flag in extra if flag.startswith("-fsanitize")],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
