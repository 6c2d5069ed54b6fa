"""Hidden states from vLLM servers: the way to record a target that needs an engine, such as Maverick on 8 B200s.

    recorder = VllmRecorder(settings, load_ends(settings.target))
    for states in recorder.record(batches):
        ...

Each server works on several sequences at once, of whatever batches, and states come back in the order of the sequences
whichever server is faster. A server may end and return: its sequences are tried again, there or elsewhere. No file outlives its reading.
"""

from __future__ import annotations

import fcntl
import itertools
import shlex
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..models.target_files import TargetEnds
from ..models.target_info import TargetText
from .recorders import States
from .vllm_launch import launch_command, layer_ids, served_name
from .vllm_server import Capture, Unavailable, VllmServer

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # before a sequence is tried again
ANY_TAG = "[0-9a-f]" * 32


class VllmRecorder:
    """Records with the servers of ``record.endpoints``.

    Args:
        settings: the recipe.
        ends: its target's.
    """

    def __init__(self, settings: Settings, ends: TargetEnds) -> None:
        recipe, info = settings.record, ends.info
        ids = layer_ids(info.layers, info.num_layers)
        self._ends, self._folder, self._patience_s = ends, Path(recipe.states_folder), recipe.patience_s
        text = TargetText(ends.tokenizer, info.eos_ids, info.max_positions)

        def command() -> str:
            return shlex.join(launch_command(settings, info.layers, info.num_layers, text))

        capture = Capture(ends, served_name(settings, ids), len(ids), self._folder, recipe.patience_s, command)
        servers = [VllmServer(url, capture) for url in recipe.endpoints]
        # A server stands in the queue once for each sequence that it can take.
        self._idle = SimpleQueue[VllmServer]()
        self._slots = recipe.in_flight * len(servers)
        for _ in range(recipe.in_flight):
            for server in servers:
                self._idle.put(server)

    def record(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[States, None, None]:
        """One :class:`States` per sequence of token ids ``[T]``, in order.

        At most twice as many sequences as the servers take at once are ahead of the one that is yielded. Several threads
        may record at once; they share what the servers take.

        Raises:
            UserError: a server is not what the recipe needs, or none has answered for ``record.patience_s``.
        """
        stop, threads = threading.Event(), ThreadPoolExecutor(self._slots)
        waiting = deque[Future[States]]()
        with spool(self._folder) as name:
            try:
                for number, ids in enumerate(itertools.chain.from_iterable(batches)):
                    waiting.append(threads.submit(self._states, ids, f"{name}-{number}", stop))
                    if len(waiting) > 2 * self._slots:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                stop.set()
                threads.shutdown(cancel_futures=True)

    def _states(self, ids: np.ndarray, request: str, stop: threading.Event) -> States:
        """The states of one sequence, from whichever server has room and is well."""
        deadline = time.monotonic() + self._patience_s
        for attempt in itertools.count():
            server = self._idle.get()
            try:
                states_TSH = server.states(ids, f"{request}-{attempt}")
                return States(states_TSH[:, : len(self._ends.info.layers)], self._ends.norm(states_TSH[:, -1]))
            except Unavailable as failure:
                server.lost(failure)
                if time.monotonic() > deadline:
                    raise server.refused(str(failure)) from failure
                if stop.wait(min(SHORTEST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)):
                    raise
            finally:
                self._idle.put(server)
        raise AssertionError  # it counts for ever


@contextmanager
def spool(folder: Path) -> Iterator[str]:
    """A name for one recorder's requests, which is part of their files' names; when it ends, they go.

    Those of recorders that were killed go first: the system has let go of the lock on a file that says they live.

    Raises:
        UserError: the folder cannot be written.
    """
    name = f"eagle3-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = list(folder.glob(f"*eagle3-{ANY_TAG}*"))  # before the living: who comes in between has none of these
        living = [owner.stem for owner in folder.glob(f"eagle3-{ANY_TAG}.owner") if _held(owner)]
        for path in found:
            if not any(owner in path.name for owner in living):
                path.unlink(missing_ok=True)
        # It gets its name once it is locked: another recorder that looks in between must not think it abandoned.
        unnamed = folder / f"{name.removeprefix('eagle3-')}.starting"
        lock = unnamed.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(folder / f"{name}.owner")
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise UserError("record.states_folder", folder, problem, "choose a folder that you may write to") from error
    with lock:
        try:
            yield name
        finally:
            for path in folder.glob(f"*{name}*"):
                path.unlink(missing_ok=True)


def _held(path: Path) -> bool:
    """Whether another process, or another recorder of this one, holds the lock on ``path``."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # it has ended
        return False
    except BlockingIOError:
        return True
    return False
