"""Compiles ``products.cpp`` for this machine, once, and loads it.

    built = load_compiled()          # Compiled, or raises Unavailable
    built.isa                         # "AVX-512"

The compiler is ``$CXX``, or the first of c++, g++ and clang++. What it makes lies in the user's cache folder
(``$XDG_CACHE_HOME/eagle3/kernels`` or ``~/.cache/eagle3/kernels``) under a name made of the source, the compiler, the flags
and the processor: home folders are shared between machines, and instructions are not.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_char_p, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parent / "products.cpp"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
#: Flags for the machine's own instructions, of which a compiler for another kind of processor knows only the second.
NATIVE = ("-march=native", "-mcpu=native")
#: Torch takes no wider vectors than ``ATEN_CPU_CAPABILITY`` says, and neither do these products.
RESTRICTIONS = {"avx2": ("-mno-avx512f",)}
COMPILING_S = 120
CPUINFO = Path("/proc/cpuinfo")
P, N = c_void_p, c_int64
ARGUMENTS: dict[str, list[Any]] = {
    "eagle3_pack": [P, N, N, N, N, P],
    "eagle3_product": [P, N, N, N, P, P, N],
    "eagle3_norm": [P, N, N, P, c_double, P],
    "eagle3_mlp": [P, N, N, N, P, P, P],
    "eagle3_experts": [P, N, N, N, N, N, P, P, P, P, P, P],
    "eagle3_attend": [P, N, N, N, N, N, P, N, N, P, P],
    "eagle3_packed_size": [N, N],
    "eagle3_lanes": [],
    "eagle3_draw": [P, N, c_double, P, P, P],
    "eagle3_accept": [P, N, N, c_double, P, P, P, N, P, P, c_double, P],
}
COUNTS = ("eagle3_packed_size", "eagle3_lanes", "eagle3_accept")


class Unavailable(Exception):
    """There are no compiled products here; the message says why."""


class Compiled(NamedTuple):
    """The loaded functions, the instructions that they use, and the compiler that made them."""

    functions: Any
    isa: str
    compiler: str


@functools.cache
def load_compiled() -> Compiled:
    """The compiled products of this machine.

    Raises:
        Unavailable: there is no compiler, or it cannot compile them.
    """
    compiler = _compiler()
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILING_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{compiler} --version: {_shown(error)}") from error
    version = said.stdout.partition("\n")[0].strip()
    flags = (*FLAGS, *RESTRICTIONS.get(os.environ.get("ATEN_CPU_CAPABILITY", "").lower(), ()))
    path = _folder() / f"products-{_key(compiler, version, flags)}.so"
    if not path.exists():
        _compile(compiler, flags, path)
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # the next start compiles it again
        raise Unavailable(f"{path} cannot be loaded: {error}") from error
    for name, types in ARGUMENTS.items():
        getattr(functions, name).argtypes, getattr(functions, name).restype = types, None
    for name in COUNTS:
        getattr(functions, name).restype = N
    functions.eagle3_isa.restype = c_char_p
    return Compiled(functions, functions.eagle3_isa().decode(), version)


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        if found := shutil.which(name):
            return found
    raise Unavailable("no C++ compiler was found (CXX, c++, g++, clang++)")


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Write ``path``, which another process may be writing too, in one go."""
    errors = []
    for native in NATIVE:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, native, *flags, str(SOURCE), "-o", str(made)]
            try:
                subprocess.run(command, capture_output=True, text=True, timeout=COMPILING_S, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                errors.append(_shown(error))
                continue
            made.replace(path)
            return
    raise Unavailable(f"{compiler} cannot compile them: {errors[0]}")


def _shown(error: Exception) -> str:
    """The first line of what a compiler complained of."""
    output = getattr(error, "stderr", None) or str(error)
    return str(output).strip().partition("\n")[0]


def _folder() -> Path:
    """Where the library is kept; where nothing can be, a folder of this process."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle3" / "kernels"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="eagle3-kernels-"))


def _key(compiler: str, version: str, flags: tuple[str, ...]) -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    processor = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    described = [SOURCE.read_text(), compiler, version, *flags, *NATIVE, platform.machine(), *processor]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
