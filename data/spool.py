"""A store that is read while it is recorded, and never larger than a few shards: for states that no disk holds at once.

    writer = SpoolWriter(folder, recording, lengths, limit=64)    # the recorder: tokens of the samples of every shard
    for index in writer.missing():
        writer.wait_for_room(index, stop.check)
        publish(folder, index, recording, ...)

    reader = SpoolReader(folder, manifest, stop.check)    # the trainer, at the same time, on any host that sees the folder
    sample = reader[0]                                    # waits for what is not recorded yet
    reader.acknowledge(1)                                 # once a durable checkpoint covers every sample of shard 0

=========================  ===================================================================================
file                       holds
=========================  ===================================================================================
plan.json                  whose states they are (the recording), and the tokens of every sample, shard by shard;
                           written before anything is recorded
shard-NNNNN.safetensors    as in the store, until it is consumed
shard-NNNNN.json           as in the store; it stays
consumed.json              how many shards, from the first on, a durable checkpoint of the trainer covers
=========================  ===================================================================================

Shards are consumed in the order of the plan, once. A shard may be recorded only when less than ``limit`` places separate it
from the first one that is not consumed. So the spool never holds more, whatever the number of recorders, and the shard
that the trainer waits for always has room. Deletion follows the durable ``consumed.json``: whoever dies in between, no
shard is made twice and none is missed, and what should be gone is deleted by whoever looks next.

Nothing but files and renames joins the two sides, so a shared file system will do, and either may die and come back.
Held-out samples are not spooled: a finished store has them, whose manifest says what every shard of the spool is, too.
"""

from __future__ import annotations

import errno
import json
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from ..configs.errors import UserError
from .files import encode_json, make_folder, write_atomic
from .manifest import Manifest
from .shards import Shard, StoreSample, shard_path
from .store import read_shard

SPOOL, PLAN, CONSUMED = "spool", "plan.json", "consumed.json"
FIRST_POLL, LONGEST_POLL = 0.02, 2.0  # seconds between looks: each wait is half as long again as the one before
PATIENCE = 30.0  # seconds of waiting after which the user is told

Check: TypeAlias = Callable[[str], None]  # StopRequest.check: raises if the user wants to stop, saying how far it is


class StoreWriter:
    """What :class:`SpoolWriter` is, where every shard stays.

    Args:
        folder: the store.
        shards: how many it will hold.
    """

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder, self.shards = folder, shards

    def done(self, index: int) -> bool:
        """Whether a shard is recorded."""
        return shard_path(self.folder, index).exists()

    def missing(self) -> list[int]:
        """The shards that are not, in order."""
        return [index for index in range(self.shards) if not self.done(index)]

    def wait_for_room(self, index: int, check: Check) -> int:
        """There is room for all of them."""
        return self.shards


class SpoolWriter:
    """The recorder's side; any number of ranks may each have one.

    Args:
        folder: the spool; made where it is missing.
        recording: what its shards bear.
        lengths: tokens of every sample, shard by shard; a pure function of the conversations.
        limit: most shards that the spool holds at once.

    Raises:
        UserError: the spool was begun with another plan, or cannot be written.
    """

    def __init__(self, folder: Path, recording: str, lengths: Sequence[Sequence[int]], limit: int) -> None:
        self.folder, self.shards, self.limit = folder, len(lengths), limit
        self._swept = 0
        plan = encode_json({"recording": recording, "lengths": [list(shard) for shard in lengths]})
        path = folder / PLAN
        if not path.exists():
            make_folder(folder)
            write_atomic(path, plan)
        elif path.read_bytes() != plan:
            remedy = f"delete {folder} to begin anew, or bring back what it was begun with"
            raise UserError("spool", folder, "it was planned for another recording", remedy)

    def done(self, index: int) -> bool:
        """Whether a shard is not to be recorded (any more): it waits to be read, or was consumed."""
        return not _missing(self.folder, range(index, index + 1))

    def missing(self) -> list[int]:
        """The shards that are not done, in order."""
        return _missing(self.folder, range(self.shards))

    def wait_for_room(self, index: int, check: Check) -> int:
        """Return when shard ``index`` may be recorded; until then the trainer has enough to read.

        Returns:
            the first shard that has no room yet.
        """
        state = f"shard {index} of {self.shards} has no room in {self.folder} before the trainer's next checkpoint"
        _wait(lambda: index < self._sweep() + self.limit, state, check)
        return self._sweep() + self.limit

    def _sweep(self) -> int:
        """Delete what a reader that died has left, before its place is taken; returns how many shards are consumed."""
        covered = consumed(self.folder)
        _delete(self.folder, range(self._swept, covered))
        self._swept = max(self._swept, covered)
        return covered


class SpoolReader:
    """The trainer's side: like a :class:`Store`, but a sample that is not recorded yet is waited for.

    Every rank may have one, and the main process acknowledges. Samples are views of mapped files; they are not to be
    used once their shard was acknowledged.

    Args:
        folder: the spool.
        manifest: what every shard is: that of the store with the held-out samples of the same recording.
        check: called while waiting.
    """

    def __init__(self, folder: Path, manifest: Manifest, check: Check) -> None:
        self.folder, self._manifest, self._check = folder, manifest, check
        wait_for(folder / PLAN, f"{folder} holds no plan yet", check)
        plan = json.loads((folder / PLAN).read_bytes())
        if plan["recording"] != manifest.recording:
            remedy = f"delete {folder} and run eagle3 record again"
            raise UserError("spool", folder, "it belongs to another recording than the held-out store", remedy)
        self._plan: list[list[int]] = plan["lengths"]
        self._first = list(accumulate((len(shard) for shard in self._plan), initial=0))
        self._open: dict[int, Shard] = {}
        _delete(folder, range(consumed(folder)))

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def shards(self) -> int:
        """How many there are in all, consumed ones and those that are not recorded yet included."""
        return len(self._plan)

    def lengths(self) -> list[int]:
        """Tokens of every sample, those included that are not recorded yet."""
        return [length for shard in self._plan for length in shard]

    def samples_of(self, start: int, end: int) -> range:
        """The samples of shards ``start`` to ``end - 1``, of which the last need not exist."""
        return range(self._first[start], self._first[min(end, self.shards)])

    def recorded(self, start: int, end: int) -> bool:
        """Whether shards ``start`` to ``end - 1`` are there: where not, a trainer saves and acknowledges what it has read.

        The recorder may be waiting for that.
        """
        return all(shard_path(self.folder, shard).exists() for shard in range(start, min(end, self.shards)))

    def __getitem__(self, index: int) -> StoreSample:
        """Sample ``index`` in the order of the plan, waited for.

        Raises:
            UserError: it was consumed, or its shard is damaged.
        """
        shard, row = self._place(index)
        return shard[row]

    def loss_mask(self, index: int) -> Tensor:
        """Of sample ``index``, bool ``[T]``; no state is read. Raises as for the sample."""
        shard, row = self._place(index)
        return shard.loss_mask(row)

    def _place(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample, waited for, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._first, index) - 1
        if shard not in self._open:
            self._open = {number: held for number, held in self._open.items() if number >= consumed(self.folder)}
            self._open[shard] = self._read(shard)
        return self._open[shard], index - self._first[shard]

    def acknowledge(self, shards: int) -> None:
        """Delete the first ``shards`` shards: a checkpoint that nothing can take back covers all of their samples."""
        before = consumed(self.folder)
        if shards > before:
            write_atomic(self.folder / CONSUMED, encode_json({"shards": shards}))
        self._open = {number: held for number, held in self._open.items() if number >= shards}
        _delete(self.folder, range(before, shards))

    def _read(self, shard: int) -> Shard:
        if shard < (covered := consumed(self.folder)):
            problem = f"shard {shard} was consumed, as were all before shard {covered}: a later checkpoint covers them"
            raise UserError("spool", self.folder, problem, "go on from that checkpoint, or record again")
        path = shard_path(self.folder, shard)
        wait_for(path, f"shard {shard} of {self.shards} is not recorded yet", self._check)
        found = read_shard(self.folder, shard, self._manifest)
        if found.index.lengths().tolist() != self._plan[shard]:
            raise UserError("spool", path, f"its samples are not those of {PLAN}", f"delete {self.folder}")
        return found


def spooled(folder: Path) -> bool:
    """Whether every shard of the spool at ``folder`` was recorded, whatever became of it."""
    if not (folder / PLAN).exists():
        return False
    return not _missing(folder, range(len(json.loads((folder / PLAN).read_bytes())["lengths"])))


def consumed(folder: Path) -> int:
    """How many shards, from the first on, were read and are covered by a durable checkpoint."""
    while True:
        try:
            return int(json.loads((folder / CONSUMED).read_bytes())["shards"])
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: another host replaced the file between opening and reading it
                raise


def wait_for(path: Path, state: str, check: Check) -> None:
    """Return once ``path`` is there; ``state`` says why it is waited for."""
    _wait(path.exists, state, check)


def _missing(folder: Path, shards: range) -> list[int]:
    absent = [index for index in shards if not shard_path(folder, index).exists()]
    covered = consumed(folder)  # read last: a shard that was deleted while we looked is known to be consumed
    return [index for index in absent if index >= covered]


def _delete(folder: Path, shards: range) -> None:
    for index in shards:
        shard_path(folder, index).unlink(missing_ok=True)


def _wait(ready: Callable[[], bool], state: str, check: Check) -> None:
    """Look until ``ready``, ever less often, and tell the user what takes long."""
    poll, begun, told = FIRST_POLL, time.monotonic(), PATIENCE
    while not ready():
        check(state)
        waited = time.monotonic() - begun
        if waited >= told:
            print(f"waiting for {waited:,.0f} s: {state}", file=sys.stderr, flush=True)
            told *= 2
        time.sleep(poll)
        poll = min(1.5 * poll, LONGEST_POLL)
