"""A shard: the unit that is recorded, published, read and, when it is damaged, recorded again.

    entry = publish(folder, 7, recording, index, packed, greedy_tokens, disagreeing)
                                                           # shard-00007.json, then shard-00007.safetensors
    shard = Shard.open(folder, entry)
    shard[0]                                               # StoreSample; its states are mapped

A shard is readable by itself, without a manifest and whatever became of the others.

Shapes: N tokens of a shard, S samples of a shard, T tokens of a sample, F captured layers, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .files import FileEntry, check_size, damaged, encode_json, read_tensors, sha256, tensor_file, write_atomic
from .index import Index
from .mapped import bring
from .quantise import decode

HEADER_LENGTH = 8  # bytes of a safetensors file that hold the length of what follows
PATTERN = "shard-*.safetensors"
STATES = ("features", "last_hidden")
DISAGREEING = "disagreeing"  # in a shard's metadata too, where its checksum covers it


class StoreSample(NamedTuple):
    """One conversation with the target's states: ``stored`` as the shard has them, mapped and not copied."""

    id: str
    source: str
    split: str
    temperature: float
    input_ids: Tensor  # [T] int32
    loss_mask: Tensor  # [T] bool
    stored: Mapping[str, Tensor]  # of STATES, and where they are in FP8 their scales

    @property
    def features(self) -> Tensor:
        """``[T, F, H]`` in bfloat16 or float32; those in FP8 are decoded whenever this is asked for."""
        return decode("features", self.stored)

    @property
    def last_hidden(self) -> Tensor:
        """``[T, H]``, likewise."""
        return decode("last_hidden", self.stored)


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A shard as it was when it was written; its states do not predict ``disagreeing`` of its ``greedy_tokens``.

    ``recording`` tells the shards of this store from those of any other.
    """

    header_sha256: str
    name: str
    recording: str
    samples: int
    tokens: int
    supervised_tokens: int
    greedy_tokens: int
    disagreeing: int


def shard_path(folder: Path, number: int) -> Path:
    """``<folder>/shard-00007.safetensors``."""
    return folder / f"shard-{number:05d}.safetensors"


def publish(
    folder: Path,
    number: int,
    recording: str,
    index: Index,
    packed: Mapping[str, Tensor],
    greedy_tokens: int,
    disagreeing: int,
) -> ShardEntry:
    """Publish one shard; nothing of it is visible before all of it is durable.

    Args:
        folder: the store's.
        number: the shard's.
        recording: what its store calls itself.
        index: its samples.
        packed: their tensors back to back, ``[N, ...]`` each: ``input_ids``, ``loss_mask`` and the encoded states.
        greedy_tokens: how many of its supervised tokens were said greedily.
        disagreeing: how many of those the states do not predict.
    """
    path = shard_path(folder, number)
    parts = tensor_file(
        {**packed, **index.tensors()}, {**index.metadata(), "recording": recording, DISAGREEING: str(disagreeing)}
    )
    entry = ShardEntry(
        sha256=sha256(*parts),
        bytes=sum(len(part) for part in parts),
        header_sha256=sha256(parts[0]),
        name=path.name,
        recording=recording,
        samples=len(index),
        tokens=int(index.offsets[-1]),
        supervised_tokens=int(index.supervised.sum()),
        greedy_tokens=greedy_tokens,
        disagreeing=disagreeing,
    )
    write_atomic(facts_path(path), facts(entry))
    write_atomic(path, *parts)
    return entry


def facts_path(path: Path) -> Path:
    """Where the facts of the shard at ``path`` are published."""
    return path.with_suffix(".json")


def facts(entry: ShardEntry) -> bytes:
    """The content of a shard's facts."""
    return encode_json(asdict(entry))


def read_entry(path: Path) -> ShardEntry:
    """The published facts of the shard at ``path``.

    Raises:
        UserError: the shard has not the size that was written, or its facts are lost or not what was written.
    """
    stands = facts_path(path)
    try:
        content = stands.read_bytes()
        entry = ShardEntry(**json.loads(content))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, f"its {stands.name} is missing or damaged ({error})") from None
    if content != facts(entry) or entry.name != path.name:
        raise damaged(path, f"its {stands.name} is damaged")
    check_size(path, entry)
    return entry


class Shard:
    """One shard, mapped into memory.

    Args:
        path: its file.
        tensors: those of ``[N, ...]``, views of the mapped file.
        index: who its samples are.
    """

    def __init__(self, path: Path, tensors: dict[str, Tensor], index: Index) -> None:
        self.path, self.tensors, self.index = path, tensors, index

    @classmethod
    def open(cls, folder: Path, entry: ShardEntry) -> Shard:
        """Map a shard; its header and counts are checked, every byte only by its checksum.

        Raises:
            UserError: it is missing, or not what was written.
        """
        path = folder / entry.name
        check_size(path, entry)
        with path.open("rb") as file:
            length = file.read(HEADER_LENGTH)
            header = file.read(min(int.from_bytes(length, "little"), entry.bytes))
        if sha256(length, header) != entry.header_sha256:
            raise damaged(path, "its header is not what was recorded")
        tensors, metadata = read_tensors(path)
        if metadata["recording"] != entry.recording:
            raise damaged(path, "it is another recording's")
        if metadata[DISAGREEING] != str(entry.disagreeing):
            raise damaged(path, f"its {facts_path(path).name} is damaged")
        index = Index.read(tensors, metadata)
        packed = {name: tensor for name, tensor in tensors.items() if name not in Index.COLUMNS}
        counts = (len(index), *(len(tensor) for tensor in packed.values()))
        problem = index.contradiction()
        if (
            problem
            or int(index.offsets[-1]) != entry.tokens
            or counts != (entry.samples, *[entry.tokens] * len(packed))
        ):
            raise damaged(path, problem or "its counts are not those that were recorded")
        return cls(path, packed, index)

    def __len__(self) -> int:
        return len(self.index)

    def loss_mask(self, row: int) -> Tensor:
        """Of one sample, bool ``[T]``; its states are not touched."""
        return self.tensors["loss_mask"][slice(*self.index.offsets[row : row + 2].tolist())]

    def __getitem__(self, row: int) -> StoreSample:
        start, end = self.index.offsets[row : row + 2].tolist()
        stored = {name: tensor[start:end] for name, tensor in self.tensors.items()}
        for view in stored.values():
            bring(view)
        ids, mask = stored.pop("input_ids"), stored.pop("loss_mask")
        return StoreSample(*self.index.identity(row), ids, mask, stored)
