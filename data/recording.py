"""Recording what is missing of a store or a spool, while the thread that runs the target does nothing else.

    place = StoreWriter(folder, len(shards))
    Recording(place, name, settings.record, target, answers, recorder).run(shards, ours, stop)

=========  ===========================================================  =========================================
thread     does                                                         holds at most
=========  ===========================================================  =========================================
caller's   runs the target, or waits for servers                        a batch
checker    checks a batch, encodes it, copies it to its shard           ``BATCHES`` batches
writers    hash, write and publish a shard                              ``WRITERS`` shards, and one that is filled
=========  ===========================================================  =========================================

A thread that is too far behind holds up the one before it. On a GPU a batch is checked and encoded there, in a stream of
its own, and copied to pinned memory.

Shapes: N tokens of a shard.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from itertools import accumulate, islice

import numpy as np
import torch
from torch import Tensor

from ..configs.errors import Incomplete
from ..configs.settings import RecordSettings
from ..configs.signals import StopRequest
from ..models.parallel import Place
from ..models.target_files import TargetEnds
from .answers import Answer
from .chat import sequence
from .checks import check_agreement, check_states
from .files import remove_temporaries
from .index import Identity, Index
from .planning import Batch
from .progress import Progress
from .quantise import encode
from .recorders import RecordedTarget, Recorder, States
from .shards import ShardEntry, publish, shard_path
from .spool import SpoolWriter, StoreWriter

POLL = 0.2  # seconds between looks for the shards of other ranks
BATCHES, WRITERS = 2, 2


class Recording:
    """Recording what is missing.

    Args:
        place: where the shards go.
        name: what the recording calls itself.
        settings: how the states are stored.
        target: whose states they are.
        answers: those that the shards are planned of.
        recorder: what computes the states.
    """

    def __init__(
        self,
        place: StoreWriter | SpoolWriter,
        name: str,
        settings: RecordSettings,
        target: RecordedTarget,
        answers: Sequence[Answer],
        recorder: Recorder,
    ) -> None:
        self.place, self.name, self.settings = place, name, settings
        self.target, self.answers, self.recorder = target, answers, recorder

    def run(self, shards: list[list[Batch]], ours: Place, stop: StopRequest) -> None:
        """Record this rank's missing shards; the first rank then waits until those of the others are there.

        Args:
            shards: the plan of all.
            ours: this rank, or the group of them for which it writes.
            stop: whether to end after the current shard.

        Raises:
            Incomplete: states are not what the target's own answers say they are.
            UserError: a shard cannot be written, or as the recorder does.
            Interrupted: a signal came; the shard that was being recorded is kept too.
        """
        missing = self.place.missing()
        # By the shard's number and not by its place among the missing: ranks may look at different moments.
        mine = deque(number for number in missing if ours.does(number))
        there = len(shards) - len(missing)
        progress = Progress("record", "shards", there + len(mine), there)
        while mine:
            # No further than there is room: nothing that is begun may wait for what a trainer has yet to read.
            end = self.place.wait_for_room(mine[0], stop.check)
            planned = [mine.popleft() for number in tuple(mine) if number < end]
            for entry in self._record({number: shards[number] for number in planned}, stop):
                progress.advance(1, entry.tokens)
            stop.check(f"{progress.done} of {progress.total} shards are recorded")
        for number in missing if ours.group == 0 else []:
            while not self.place.done(number):
                stop.check("the shards of this rank are recorded, those of others are not")
                time.sleep(POLL)

    def _record(self, shards: Mapping[int, list[Batch]], stop: StopRequest) -> Iterator[ShardEntry]:
        """Yield shards as they are published; after a signal no other is begun."""
        batches = ([self._ids(sample) for sample in batch] for planned in shards.values() for batch in planned)
        behind, written = deque[Future[None]](), deque[Future[ShardEntry]]()
        with (
            closing(self.recorder.record(batches)) as states,
            self._threads(1) as checker,
            self._threads(WRITERS) as writers,
        ):
            for number, planned in shards.items():
                shard = Filling([self.answers[sample] for batch in planned for sample in batch])
                checks = list[Future[None]]()
                for batch in planned:
                    found = list(islice(states, len(batch)))
                    if len(found) != len(batch):
                        problem = f"the recorder gave the states of {len(found)} sequences for {len(batch)}"
                        raise Incomplete(f"{problem}; it is at fault")
                    checks.append(checker.submit(self._fill, shard, found, _computed(found[0])))
                    behind.append(checks[-1])
                    if len(behind) > BATCHES:
                        behind.popleft().result()
                written.append(writers.submit(self._publish, number, shard, checks))
                if len(written) > WRITERS:
                    yield written.popleft().result()
                if stop.requested:
                    break
            for shard_written in written:
                yield shard_written.result()

    @contextmanager
    def _threads(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads each of which keeps to one core where the target runs on all of them.

        The target's own wait for each other at every step, and so for whoever else has a core of theirs.
        """
        own = torch.get_num_threads()
        cores = own if isinstance(self.target, TargetEnds) else 1
        try:
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(cores,)) as threads:
                yield threads
        finally:
            torch.set_num_threads(own)  # it is also what later threads begin with

    def _ids(self, sample: int) -> np.ndarray:
        return np.array(self.answers[sample].ids, dtype=np.int32)

    @torch.no_grad()
    def _fill(self, shard: Filling, found: list[States], computed: torch.cuda.Event | None) -> None:
        """Put one batch, checked, where it is stored."""
        with _aside(computed):
            for states in found:
                missed = check_states(shard.next, states, self.target)
                features = encode("features", states.features, self.settings.features_dtype)
                shard.put(features | encode("last_hidden", states.last_hidden, self.settings.last_hidden_dtype), missed)

    def _publish(self, number: int, shard: Filling, checks: Sequence[Future[None]]) -> ShardEntry:
        for check in checks:
            check.result()
        check_agreement(number, shard.answers, shard.missed)
        documents = [sequence(answer) for answer in shard.answers]
        packed = {
            "input_ids": torch.from_numpy(np.concatenate([document.input_ids for document in documents])),
            "loss_mask": torch.from_numpy(np.concatenate([document.loss_mask for document in documents])),
            **shard.states,
        }
        greedy = sum(len(answer.said) for answer in shard.answers if answer.temperature == 0.0)
        folder = self.place.folder
        remove_temporaries(folder, f"{shard_path(folder, number).stem}.*")
        return publish(folder, number, self.name, index_of(shard.answers), packed, greedy, sum(shard.missed))


class Filling:
    """The states of one shard while they come in.

    Args:
        answers: its samples, in the order in which they are recorded and stored.

    Attributes:
        states: encoded, ``[N, ...]`` by name.
        missed: for each sample that is in, how many of its greedy tokens the states do not predict.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self.states: dict[str, Tensor] = {}
        self.missed: list[int] = []
        self._offsets = list(accumulate((len(answer.ids) for answer in answers), initial=0))

    @property
    def next(self) -> Answer:
        """The sample that is to be put in next."""
        return self.answers[len(self.missed)]

    def put(self, encoded: Mapping[str, Tensor], missed: int) -> None:
        """Copy the next sample to its place; of one on a GPU, the copy is done when its stream is."""
        start, end = self._offsets[len(self.missed) :][:2]
        for name, tensor in encoded.items():
            if name not in self.states:
                shape = (self._offsets[-1], *tensor.shape[1:])
                self.states[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.states[name][start:end].copy_(tensor, non_blocking=True)
        self.missed.append(missed)


def index_of(answers: Iterable[Answer]) -> Index:
    """The index of samples, one or more, that are stored in this order; each is looked at once."""
    rows = (
        (Identity(answer.id, answer.source, answer.split, answer.temperature), len(answer.ids), len(answer.said))
        for answer in answers
    )
    return Index.of(*zip(*rows, strict=True))


def _computed(states: States) -> torch.cuda.Event | None:
    """When the work that was begun for ``states`` ends; None where it has."""
    device = states.last_hidden.device
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def _aside(computed: torch.cuda.Event | None) -> Iterator[None]:
    """Work that waits for ``computed`` and is done when the block ends, beside what that GPU does in the meantime."""
    if computed is None:
        yield
        return
    stream = _stream(computed.device)
    with torch.cuda.stream(stream):
        stream.wait_event(computed)
        yield
        stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
