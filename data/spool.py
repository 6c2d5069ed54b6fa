"""A store that is read while it is recorded, and never larger than a few shards: for states that no disk holds at once.

    writer = SpoolWriter(folder, lengths, limit=64)       # the recorder: lengths of the samples of every planned shard
    for index in writer.missing():
        writer.wait_for_room(index, stop.check)
        publish(folder, index, recording, ...)

    reader = SpoolReader(folder, manifest, stop.check)    # the trainer, at the same time, on any host that sees the folder
    for sample in reader.samples(start=trained):          # waits for what is not recorded yet
        ...                                               # once a checkpoint behind ``trained`` samples is durable:
    reader.acknowledge(reader.whole_shards(trained))

=========================  ===================================================================================
file                       holds
=========================  ===================================================================================
plan.json                  tokens of every sample, shard by shard, written before anything is recorded
shard-NNNNN.safetensors    as in the store, until it is consumed
shard-NNNNN.json           as in the store; it stays
consumed.json              how many shards, from the first on, a durable checkpoint of the trainer covers
=========================  ===================================================================================

Samples are read in the order of the plan, once. A shard may be recorded only when less than ``limit`` places separate it
from the first one that is not consumed. So the spool never holds more, whatever the number of recorders, and the shard
that the trainer waits for always has room. Deletion follows the durable ``consumed.json``: whoever dies in between, no
shard is made twice and none is missed, and what should be gone is deleted by whoever looks next.

Nothing but files and renames joins the two sides, so a shared file system will do, and either may die and come back.
No stage records to a spool yet, and the trainer does not read one.
"""

from __future__ import annotations

import errno
import json
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from ..configs.errors import UserError
from .files import encode_json, write_atomic
from .shards import Shard, StoreSample, shard_path
from .store import Manifest, read_shard

PLAN, CONSUMED = "plan.json", "consumed.json"
FIRST_POLL, LONGEST_POLL = 0.02, 2.0  # seconds between looks: each wait is half as long again as the one before
PATIENCE = 30.0  # seconds of waiting after which the user is told

Check: TypeAlias = Callable[[str], None]  # StopRequest.check: raises if the user wants to stop, saying how far it is


class SpoolWriter:
    """The recorder's side; any number of ranks may each have one.

    Args:
        folder: the spool.
        lengths: tokens of every sample, shard by shard; a pure function of the conversations.
        limit: most shards that the spool holds at once.

    Raises:
        UserError: the spool was begun with another plan.
    """

    def __init__(self, folder: Path, lengths: Sequence[Sequence[int]], limit: int) -> None:
        self.folder, self.shards, self.limit = folder, len(lengths), limit
        self._swept = 0
        plan = encode_json([list(shard) for shard in lengths])
        path = folder / PLAN
        if not path.exists():
            write_atomic(path, plan)
        elif path.read_bytes() != plan:
            remedy = f"delete {folder}, or bring back the conversations that it was begun with"
            raise UserError("spool", folder, "it was planned for other conversations", remedy)

    def done(self, index: int) -> bool:
        """Whether a shard is not to be recorded (any more): it waits to be read, or was consumed."""
        return index not in self._missing(range(index, index + 1))

    def missing(self) -> list[int]:
        """The shards that are not done, in order."""
        return self._missing(range(self.shards))

    def wait_for_room(self, index: int, check: Check) -> None:
        """Return when shard ``index`` may be recorded; until then the trainer has enough to read."""
        state = f"shard {index} of {self.shards} has no room in {self.folder} before the trainer's next checkpoint"
        _wait(lambda: index < self._sweep() + self.limit, state, check)

    def _missing(self, shards: range) -> list[int]:
        absent = [index for index in shards if not shard_path(self.folder, index).exists()]
        covered = consumed(self.folder)  # read last: a shard that was deleted while we looked is known to be consumed
        return [index for index in absent if index >= covered]

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
        self._wait_for(folder / PLAN, f"{folder} holds no plan yet")
        self._plan: list[list[int]] = json.loads((folder / PLAN).read_bytes())
        self._first = list(accumulate((len(shard) for shard in self._plan), initial=0))
        self._open: dict[int, Shard] = {}
        _delete(folder, range(consumed(folder)))

    def __len__(self) -> int:
        return self._first[-1]

    def lengths(self) -> list[int]:
        """Tokens of every sample, those included that are not recorded yet."""
        return [length for shard in self._plan for length in shard]

    def __getitem__(self, index: int) -> StoreSample:
        """Sample ``index`` in the order of the plan, waited for.

        Raises:
            UserError: it was consumed, or its shard is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = self.whole_shards(index)
        if shard not in self._open:
            self._open = {number: held for number, held in self._open.items() if number >= consumed(self.folder)}
            self._open[shard] = self._read(shard)
        return self._open[shard][index - self._first[shard]]

    def samples(self, start: int = 0) -> Iterator[StoreSample]:
        """The samples from number ``start`` on, in the order of the plan."""
        return (self[index] for index in range(start, len(self)))

    def whole_shards(self, samples: int) -> int:
        """How many shards the first ``samples`` samples fill to the end; also the shard that holds the next one."""
        return bisect_right(self._first, samples) - 1

    def available(self, index: int) -> bool:
        """Whether sample ``index`` is there: where not, a trainer saves and acknowledges before it waits for it.

        The recorder may be waiting for that.
        """
        return shard_path(self.folder, self.whole_shards(index)).exists()

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
        self._wait_for(path, f"shard {shard} of {len(self._plan)} is not recorded yet")
        found = read_shard(self.folder, shard, self._manifest)
        if found.index.lengths().tolist() != self._plan[shard]:
            raise UserError("spool", path, f"its samples are not those of {PLAN}", f"delete {self.folder}")
        return found

    def _wait_for(self, path: Path, state: str) -> None:
        _wait(path.exists, state, self._check)


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
