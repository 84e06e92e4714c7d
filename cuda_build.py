"""Whether setup.py builds the CUDA kernels, with which nvcc and for which architectures, and if not, why not.

Plain functions on plain values, so that tests can try any nvcc with any torch; nothing is imported but the standard
library. The GPU of the building machine is never asked: a package is built for the GPUs that its torch runs on.
An architecture is a pair, (8, 6) for 8.6, and so is a version of CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Version = tuple[int, int]

OLDEST: Version = (7, 5)  # that the kernels run on
# The first nvcc that compiles for an architecture, and the first that no longer does.
NVCC_SINCE: dict[Version, Version] = {
    (7, 5): (10, 0),
    (8, 0): (11, 0),
    (8, 6): (11, 1),
    (8, 7): (11, 4),
    (8, 8): (13, 0),
    (8, 9): (11, 8),
    (9, 0): (11, 8),
    (10, 0): (12, 8),
    (10, 1): (12, 8),
    (10, 3): (12, 9),
    (11, 0): (13, 0),
    (12, 0): (12, 8),
    (12, 1): (12, 9),
}
NVCC_UNTIL: dict[Version, Version] = {(10, 1): (13, 0)}  # Thor, 11.0 from CUDA 13 on
# Where torch does not say what it was built for. A GPU also runs the code of a lower minor version.
DEFAULT: tuple[Version, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0))
FIRST_WITH_CXX20: Version = (12, 0)


class UnavailableError(Exception):
    """Why the CUDA kernels cannot be built, in one line, and what would change that."""


class Torch(NamedTuple):
    """What a torch says about itself. flags: "sm_80 sm_90 compute_90", or "" where it does not say."""

    version: str
    cuda: str | None
    hip: str | None = None
    flags: str = ""


class Plan(NamedTuple):
    """What to build. reason: why there is no CUDA, "" if that was asked for; home: the toolkit, for CUDA_HOME;
    architectures: as in TORCH_CUDA_ARCH_LIST; nvcc_flags: none if that variable was set, torch then reads it."""

    cuda: bool
    reason: str = ""
    home: str = ""
    architectures: str = ""
    nvcc_flags: tuple[str, ...] = ()


def describe(torch: Any) -> Torch:
    """The facts about an imported torch, without initializing CUDA (torch.cuda.get_arch_list() is empty in some
    versions where there is no GPU)."""
    ask = getattr(torch._C, "_cuda_getArchFlags", None)
    flags = ask() if ask is not None else None
    return Torch(str(torch.__version__), torch.version.cuda, getattr(torch.version, "hip", None), flags or "")


def plan(environment: Mapping[str, str], torch: Torch) -> Plan:
    """What to build. RuntimeError with the reason if FORCE_CUDA=1 and the CUDA kernels cannot be built; L2L_FAST_CUDA=0
    goes before it."""
    if environment.get("L2L_FAST_CUDA") == "0":
        return Plan(cuda=False)
    try:
        wanted = torch_cuda(torch)
        nvcc = find_nvcc(environment, torch)
        version = nvcc_version(nvcc)
        if version < FIRST_WITH_CXX20:
            raise UnavailableError(
                f"{nvcc} is of CUDA {dotted(version)}, and C++20 needs CUDA 12 or newer "
                f"(set CUDA_HOME to a toolkit of CUDA {torch.cuda})"
            )
        if version[0] != wanted[0]:
            raise UnavailableError(
                f"{nvcc} is of CUDA {dotted(version)}, but torch {torch.version} of CUDA {torch.cuda} "
                f"(set CUDA_HOME to a toolkit of CUDA {wanted[0]}, or install a torch for CUDA {version[0]})"
            )
        # A toolkit that was named is where torch looks for it, whatever it is.
        home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or toolkit(nvcc)
        given = environment.get("TORCH_CUDA_ARCH_LIST", "")
        if given.strip(" ;"):
            return Plan(True, home=home, architectures=given)
        chosen = architectures(version, torch)
        return Plan(True, home=home, architectures=arch_list(chosen), nvcc_flags=tuple(gencode(chosen)))
    except UnavailableError as error:
        if environment.get("FORCE_CUDA") == "1":
            raise RuntimeError(f"FORCE_CUDA=1, but {error}") from None
        return Plan(cuda=False, reason=str(error))


def torch_cuda(torch: Torch) -> Version:
    """The CUDA that torch was built with. UnavailableError if there is none."""
    if torch.hip is not None:
        raise UnavailableError(f"torch {torch.version} is built for ROCm {torch.hip} (install a torch for CUDA)")
    if torch.cuda is None:
        raise UnavailableError(f"torch {torch.version} is built without CUDA (install a torch for CUDA)")
    if (match := re.match(r"(\d+)(?:\.(\d+))?", torch.cuda)) is None:
        raise UnavailableError(f"torch.version.cuda is {torch.cuda!r}, not a version (install a torch for CUDA)")
    return int(match[1]), int(match[2] or 0)


def find_nvcc(environment: Mapping[str, str], torch: Torch) -> str:
    """Path of the nvcc that torch will call: of CUDA_HOME or CUDA_PATH if set, else on PATH, else of /usr/local/cuda.
    UnavailableError if there is none."""
    search = environment.get("PATH", os.defpath)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(name):
            nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
            if nvcc is None:
                raise UnavailableError(f"{name} is {home}, where there is no bin/nvcc (unset it, or correct it)")
            return nvcc
    nvcc = shutil.which("nvcc", path=search) or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise UnavailableError(f"there is no nvcc (set CUDA_HOME to a toolkit of CUDA {torch.cuda})")
    return nvcc


def nvcc_version(nvcc: str) -> Version:
    """The CUDA that an nvcc is of. UnavailableError if it does not run or says something else."""
    advice = "set CUDA_HOME to a toolkit that works"
    try:
        done = run([nvcc, "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{nvcc} --version fails: {one_line(str(error))} ({advice})") from None
    if done.returncode != 0:
        said = one_line(done.stderr or done.stdout) or "it says nothing"
        raise UnavailableError(f"{nvcc} --version fails with exit code {done.returncode}: {said} ({advice})")
    if (match := re.search(r"\brelease (\d+)\.(\d+)", done.stdout)) is None:
        raise UnavailableError(f"{nvcc} --version names no release: {one_line(done.stdout)!r} ({advice})")
    return int(match[1]), int(match[2])


def toolkit(nvcc: str) -> str:
    """The toolkit of an nvcc, which has bin/nvcc and the headers. nvcc may be a wrapper elsewhere: it knows best."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(nvcc)))
    if not os.path.isfile(os.path.join(home, "include/cuda_runtime.h")):
        try:
            said = run([nvcc, "--dryrun", "-x", "cu", os.devnull]).stderr
        except (OSError, subprocess.SubprocessError):
            return home
        if match := re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE):
            top = os.path.realpath(match[1].strip())
            if all(os.path.isfile(os.path.join(top, path)) for path in ("bin/nvcc", "include/cuda_runtime.h")):
                return top
    return home


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=120, stdin=subprocess.DEVNULL
    )


def one_line(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + "..."


def dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def nvcc_knows(architecture: Version, nvcc: Version, torch_cuda: Version | None = None) -> bool:
    """Whether an nvcc compiles for an architecture. One that is not in the table is known to the CUDA that torch was
    built with, torch_cuda, and to any of the same major version after it."""
    if architecture not in NVCC_SINCE:
        return torch_cuda is not None and torch_cuda <= nvcc and torch_cuda[0] == nvcc[0]
    return NVCC_SINCE[architecture] <= nvcc < NVCC_UNTIL.get(architecture, (nvcc[0] + 1, 0))


def built_for(flags: str, kinds: str = "sm|compute") -> list[Version]:
    """Architectures in the flags of a torch, ascending: of machine code (sm), PTX (compute) or both. Those of features
    of one architecture alone (sm_90a) count as that architecture."""
    numbers = {int(number) for number in re.findall(rf"\b(?:{kinds})_(\d{{2,}})[a-z]?\b", flags)}
    return sorted(divmod(number, 10) for number in numbers)


def architectures(nvcc: Version, torch: Torch) -> list[Version]:
    """The architectures to compile for, ascending: all of torch's that the kernels and nvcc support. If torch does not
    say what it was built for, or runs on such GPUs but nvcc knows none of its architectures, the default ones that nvcc
    knows (the PTX of the last runs on newer GPUs). UnavailableError if torch runs on none that the kernels support."""
    own = built_for(torch.flags)
    if own and own[-1] < OLDEST and not built_for(torch.flags, "compute"):
        raise UnavailableError(
            f"torch {torch.version} is built for {' '.join(map(dotted, own))}, and the kernels need {dotted(OLDEST)} "
            "(install a torch for newer GPUs, or set TORCH_CUDA_ARCH_LIST)"
        )
    cuda = torch_cuda(torch)
    chosen = [one for one in own if one >= OLDEST and nvcc_knows(one, nvcc, cuda)]
    return chosen or defaults(nvcc)


def defaults(nvcc: Version) -> list[Version]:
    return [one for one in DEFAULT if nvcc_knows(one, nvcc)]


def arch_list(chosen: Iterable[Version]) -> str:
    """As in TORCH_CUDA_ARCH_LIST, with PTX for the newest."""
    return " ".join(map(dotted, chosen)) + "+PTX"


def gencode(chosen: Iterable[Version]) -> list[str]:
    """The flags of nvcc for machine code of all of them and PTX of the newest. Given to nvcc directly, since a torch
    does not accept every architecture in TORCH_CUDA_ARCH_LIST that its nvcc knows."""
    numbers = [f"{major}{minor}" for major, minor in chosen]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]
