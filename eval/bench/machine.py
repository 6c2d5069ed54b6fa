"""What a benchmark runs on: the processor with its instruction set and commit, and processes that keep its cores busy.

with spinning(2):                   # two busy processes, which end with the block, and with this process
    ...
restrict("avx2", "eagle3.eval.bench.decoding", sys.argv[1:])    # the same command, as on a CPU without AVX-512
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ...configs.errors import UserError
from ..environment import environment

#: What PyTorch's kernels (and inductor's vectors), oneDNN and MKL read, each once, before they compute anything. Code that
#: a compiler makes for the machine at hand (``-march=native``) is not restricted by them.
RESTRICTIONS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
}
INSTRUCTIONS = {"AVX512": "AVX-512"}
ROOT = Path(__file__).parents[2]
#: It ends by itself once its parent has ended, however that did.
SPIN = """
import os, sys
print("busy", flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


def processor() -> str:
    """The processor's name."""
    return str(environment(torch.device("cpu"))["processor"])


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def spinning(count: int) -> Iterator[list[int]]:
    """So many processes that compute without end, until the block does; their process ids."""
    with ExitStack() as stack:
        processes = list[int]()
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", SPIN, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # Ctrl-C reaches it too, and must not print a traceback
            )
            stack.callback(_end, process)
            processes.append(process.pid)
            assert process.stdout is not None
            process.stdout.readline()
        yield processes


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def busy_seconds() -> float | None:
    """Seconds that this process's cores have computed since the machine started; None on systems that do not say."""
    path = Path("/proc/stat")
    if sys.platform != "linux" or not path.exists():
        return None
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in path.read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields[:8])
            ticks += user + nice + system + sum(interrupts_and_stolen)
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """How busy other processes keep this one's cores from now on."""

    def __init__(self) -> None:
        self._all, self._own, self._clock = busy_seconds(), time.process_time(), time.perf_counter()

    def others(self) -> float | None:
        """Cores, on average; None on systems that do not say."""
        now = busy_seconds()
        if self._all is None or now is None:
            return None
        spent, own = now - self._all, time.process_time() - self._own
        return max(0.0, spent - own) / (time.perf_counter() - self._clock)


def restrict(isa: str | None, module: str, arguments: Sequence[str]) -> None:
    """Start ``module`` anew in this process's place where it is not restricted to ``isa`` yet; None: nothing to do.

    Raises:
        UserError: the processor does not have these instructions.
    """
    if isa is None:
        return
    wanted = RESTRICTIONS[isa]
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise UserError("--isa", isa, f"{processor()} has no such instructions", "leave the option out")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], os.environ | wanted)


def hardware(name: str) -> str:
    """What a results file calls the machine: ``name``, or else processor, cores and instruction set; any restriction."""
    capability = torch.backends.cpu.get_cpu_capability()
    isa = INSTRUCTIONS.get(capability, capability)
    names = {variable for variables in RESTRICTIONS.values() for variable in variables}
    variables = [f"{variable}={os.environ[variable]}" for variable in sorted(names & os.environ.keys())]
    parts, count = [name], cores()
    if not name:
        gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
        parts = [*gpu, processor(), f"{count} core{'s' if count > 1 else ''}"]
    if variables:
        parts.append(f"restricted to {isa} ({' '.join(variables)})")
    elif not name:
        parts.append(isa)
    return ", ".join(parts)


def commit(name: str) -> str:
    """``name``, or else the commit of the code that runs, where that is a repository's; "-dirty" if it was changed."""
    if name or not (ROOT / ".git").exists():
        return name
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
