"""Compiles device code with g++ for the CPU and caches the result by content.

Four builds of the same sources, by ``sanitizer``:

- ``"none"``: optimised, with GCC's undefined-behaviour checks reported as errors of the launch.
- ``"access"``: every load and store checked by the runtime itself (races, uninitialised shared memory, bounds).
- ``"address"``: AddressSanitizer and UndefinedBehaviorSanitizer.
- ``"thread"``: ThreadSanitizer.

The first two load into any process; the other two run as an executable, or in a Python that
:func:`sanitized_python` starts.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SANITIZERS = ("none", "access", "address", "thread")
SANITIZER_EXIT_CODE = 66

_COMMON = "-std=c++17 -fPIC -g1 -Wall -Wextra -Wno-unknown-pragmas -fno-gnu-unique -fno-semantic-interposition".split()
_UNDEFINED = "-fsanitize=undefined"
_NO_VPTR = "-fno-sanitize=vptr"  # this check alone needs the compiler's runtime library
_DEVICE_FLAGS: Mapping[str, Sequence[str]] = {
    "none": ("-O2", _UNDEFINED, _NO_VPTR),
    "access": ("-O1", "-fsanitize=thread", _UNDEFINED, _NO_VPTR, "-DCUDA_ON_HOST_ACCESS_CHECK"),
    "address": ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address", _UNDEFINED, "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-fno-omit-frame-pointer", "-fsanitize=thread"),
}
_RUNTIME_FLAGS: Mapping[str, Sequence[str]] = {
    "none": (),
    "access": ("-DCUDA_ON_HOST_ACCESS_CHECK",),
    "address": ("-DCUDA_ON_HOST_ADDRESS",),
    "thread": ("-DCUDA_ON_HOST_THREAD",),
}
_LINK_FLAGS: Mapping[str, Sequence[str]] = {
    "none": (),
    "access": (),
    "address": ("-fsanitize=address", _UNDEFINED),
    "thread": ("-fsanitize=thread",),
}


def build_folder() -> Path:
    """Where results are kept: ``CUDA_ON_HOST_BUILD``, or build/cuda_on_host in the repository."""
    return Path(os.environ.get("CUDA_ON_HOST_BUILD", REPOSITORY / "build" / "cuda_on_host"))


def compiler() -> str:
    """The C++ compiler, ``CXX`` or g++. Raises FileNotFoundError if there is none."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"the C++ compiler {name!r} was not found; install g++ or set CXX")
    return found


def compile_kernels(
    sources: Iterable[str | Path],
    *,
    sanitizer: str = "none",
    flags: Sequence[str] = (),
    include: Sequence[str | Path] = (),
    executable: bool = False,
) -> Path:
    """Compiles .cu files together with the runtime into a shared library, or an executable that runs their test cases.

    ``include`` folders come after the runtime's own and csrc; a change of any header in these rebuilds.
    Raises ValueError for an unknown sanitizer; RuntimeError, with the compiler's output, if something does not compile.
    """
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer must be one of {', '.join(SANITIZERS)}, got {sanitizer!r}")
    source_paths = [Path(source).resolve() for source in sources]
    folders = [HERE / "include", REPOSITORY / "csrc", *(Path(folder).resolve() for folder in include)]
    headers = _content(folders + sorted({path.parent for path in source_paths}))
    machine = (compiler(), _compiler_version(compiler()), *_native_flags(compiler()), *_COMMON, sanitizer)

    def compile_one(path: Path, extra: Sequence[str], dependencies: str) -> Path:
        key = _digest(*machine, *extra, *flags, path.name, path.read_text(), dependencies)
        includes = [f"-I{folder}" for folder in folders]
        fixed = [compiler(), *_COMMON, *_native_flags(compiler())]
        command = [*fixed, *extra, *includes, *flags, "-x", "c++", "-c", str(path)]
        return _cached(f"{path.stem}-{sanitizer}-{key}.o", command)

    runtime = HERE / "runtime" / "runtime.cpp"
    device_flags = [*_DEVICE_FLAGS[sanitizer], "-include", "cuda_runtime.h"]
    jobs: list[tuple[Path, Sequence[str], str]] = [(path, device_flags, headers) for path in source_paths]
    runtime_headers = _content([HERE / "include", HERE / "runtime"])
    jobs.append((runtime, ["-O2", *_RUNTIME_FLAGS[sanitizer]], runtime_headers))
    if executable:
        jobs.append((HERE / "runtime" / "harness.cpp", ["-O1"], runtime_headers))
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))

    kind = ["-pie", "-rdynamic"] if executable else ["-shared", "-Wl,-Bsymbolic"]
    key = _digest(*machine, *kind, *(path.name for path in objects))
    name = f"{source_paths[0].stem}-{sanitizer}-{key}" + ("" if executable else ".so")
    return _cached(name, [compiler(), *kind, *_LINK_FLAGS[sanitizer], *map(str, objects), "-ldl", "-pthread"])


def sanitizer_available(sanitizer: str) -> bool:
    """Whether the compiler can link this sanitizer's library, and the machine run it."""
    return sanitizer in ("none", "access") or _links(sanitizer)


def environment(sanitizer: str, seed: int | None = None) -> dict[str, str]:
    """The environment in which to run a sanitized program: a finding ends it with SANITIZER_EXIT_CODE."""
    result = dict(os.environ)
    code = f"exitcode={SANITIZER_EXIT_CODE}"
    result["ASAN_OPTIONS"] = f"{code}:detect_leaks=0:detect_stack_use_after_return=0"
    result["UBSAN_OPTIONS"] = f"{code}:print_stacktrace=1"
    result["TSAN_OPTIONS"] = f"{code}:halt_on_error=1"
    if seed is not None:
        result["CUDA_ON_HOST_SEED"] = str(seed)
    return result


def run(
    executable: Path,
    arguments: Sequence[str] = (),
    *,
    sanitizer: str = "none",
    seed: int | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Runs an executable made by :func:`compile_kernels` and captures what it prints."""
    command = [*_launcher(sanitizer), str(executable), *arguments]
    return subprocess.run(
        command, env=environment(sanitizer, seed), capture_output=True, text=True, timeout=timeout, check=False
    )


def sanitized_python(sanitizer: str) -> tuple[list[str], dict[str, str]]:
    """Command prefix and environment of a Python that can load a library built with this sanitizer."""
    env = environment(sanitizer)
    if sanitizer in ("address", "thread"):
        names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[sanitizer]
        paths = [
            subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
            for name in names
        ]
        env["LD_PRELOAD"] = " ".join(os.path.realpath(path.strip()) for path in paths)
    return [*_launcher(sanitizer), sys.executable], env


def _launcher(sanitizer: str) -> list[str]:
    # ThreadSanitizer gives up where address-space randomisation puts mappings it does not expect.
    setarch = shutil.which("setarch")
    return [setarch, platform.machine(), "-R"] if sanitizer == "thread" and setarch else []


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _content(folders: Iterable[Path]) -> str:
    """A digest of every header in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".hpp", ".inc") and path.is_file():
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _cached(name: str, command: Sequence[str]) -> Path:
    """Runs a command that ends in its inputs, unless its output exists; safe among concurrent processes."""
    target = build_folder() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    try:
        result = subprocess.run([*command, "-o", temporary], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        if result.stderr:
            print(result.stderr, file=sys.stderr)
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return target


@functools.cache
def _compiler_version(name: str) -> str:
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _native_flags(name: str) -> tuple[str, ...]:
    """-march=native (fused multiply-add in one instruction), and a digest of the machine it stands for."""
    probe = subprocess.run(
        [name, "-march=native", "-E", "-dM", "-x", "c++", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        return ()
    return ("-march=native", f"-DCUDA_ON_HOST_MACHINE=0x{_digest(probe.stdout)}")


@functools.cache
def _links(sanitizer: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        program = Path(folder) / "probe"
        command = [compiler(), *_LINK_FLAGS[sanitizer], str(source), "-o", str(program)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return False
        return subprocess.run([*_launcher(sanitizer), str(program)], capture_output=True, check=False).returncode == 0
