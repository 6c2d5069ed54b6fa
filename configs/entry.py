"""What every command shares: how its settings are explained, its recipe is read, what it may take, and how it ends."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import Eagle3Error, Interrupted, Told, UserError
from .loader import describe, save, write_recipe
from .settings import Settings

RESUMABLE = Interrupted.exit_code
FULL = {errno.ENOSPC, errno.EDQUOT}
#: OMP_NUM_THREADS as the user, or a launcher, gave it to this process; :func:`share_cores` may set it later.
REQUESTED_THREADS = os.environ.get("OMP_NUM_THREADS")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of a period, or "max", and the period


class Lazy:
    """Stands for a module and imports it when a name in it is first used.

    Stages import torch and transformers, which takes seconds; ``--help`` and a mistyped setting must not wait for them.
    (:class:`importlib.util.LazyLoader` will not do: whatever walks over ``sys.modules`` wakes its modules.)
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def finish(command: Callable[[], None]) -> int:
    """Run ``command``; returns its exit code, having said on stderr, in one line, why it is not 0.

    SIGTERM outside a stage's units ends the command as Ctrl-C does. What a stage has finished stays, so both are
    resumable; so is a command whose reader went away. A disk that is full, or a quota that is used up, is the user's to
    mend wherever it shows. Other exceptions are bugs and keep their traceback.

    A launcher that sees a process end tells the others to: one that has its exit code by then ends with that.
    """
    earlier = signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
        sys.stdout.flush()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except Told as told:
        return told.exit_code
    except Eagle3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; resume with the same command", file=sys.stderr)
        return RESUMABLE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails once more
        return RESUMABLE
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = Path(error.filename).parent if isinstance(error.filename, str) else "(unknown)"
        remedy = "free some space and run the command again: what is finished is kept"
        print(f"error: {UserError('disk', place, f'it is full ({error.strerror})', remedy)}", file=sys.stderr)
        return UserError.exit_code
    finally:
        signal.signal(signal.SIGTERM, earlier if started() == 1 else signal.SIG_IGN)
    return 0


def started() -> int:
    """How many processes a launcher such as torchrun has started with this one; 1: it was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this is the first of them."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def said_once() -> Iterator[None]:
    """What several processes do together: of an end to which they all come the first tells, and the others are quiet.

    Raises:
        Told: in the others.
    """
    try:
        yield
    except Eagle3Error as error:
        if first():
            raise
        raise Told(error.exit_code) from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def opened(settings: Settings) -> Iterator[Path]:
    """The run's folder, with the recipe in ``config.yaml``, so that a command can be resumed from there alone.

    A recipe that a stage refuses does not replace the one that the run was made with. Of several processes the first
    writes it.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(settings.run.root) / settings.run.name
    recipe = folder / "config.yaml"
    earlier = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if first():
            earlier = recipe.read_bytes() if recipe.exists() else None
            save(settings, recipe)
    except OSError as error:
        problem = f"{folder} cannot be written ({error.strerror})"
        remedy = "free some space or choose a folder that you may write to"
        raise UserError("run.root", settings.run.root, problem, remedy) from error
    try:
        yield folder
    except UserError:
        if earlier is not None:
            with suppress(OSError):  # the disk may be what was refused
                write_recipe(earlier, recipe)
        raise


def share_cores() -> None:
    """Give each of several processes on this machine its part of the cores, unless the user has chosen.

    Before torch is imported: more threads than cores wait for each other. With how many a stage computes is chosen when
    it begins.
    """
    if local_processes() > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(own_cores()))


def own_cores() -> int:
    """The cores that this process may keep busy: its part of those that the machine or a container gives to all."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if CPU_QUOTA.exists():
        quota, _, period = CPU_QUOTA.read_text().partition(" ")
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // local_processes())


def local_processes() -> int:
    """How many processes a launcher has started on this machine, with this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def explain(sections: Sequence[str]) -> str:
    """Every setting of ``sections`` with its default and its explanation."""
    width = min(100, shutil.get_terminal_size().columns) - 6
    lines = ["settings, with their defaults:"]
    for section in sections:
        for setting in describe()[section]:
            text = textwrap.fill(setting.text, width)
            lines += [f"  {setting.name}={setting.default}", textwrap.indent(text, " " * 6)]
    return "\n".join(lines)
