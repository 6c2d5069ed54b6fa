"""Who the samples of a shard or a store are: columns that are mapped and not parsed, so that a million cost nothing.

    index = Index.of([Identity("a", "words", "train", 0.0)], lengths=[12], supervised=[5])
    index.rows("train")        # int64: the samples of a split
    index.identity(0)          # Identity(id="a", ...)

Every shard holds the index of its own samples, the store that of all.

Shapes: S samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Identity(NamedTuple):
    """What tells a sample from the others."""

    id: str
    source: str
    split: str
    temperature: float


@dataclass(frozen=True)
class Index:
    """One row a sample.

    ``sources`` and ``splits`` name the codes; ``offsets`` counts the tokens before each sample, ``supervised`` its
    tokens in the loss mask; the id of sample i is UTF-8, bytes ``id_offsets[i]`` to ``id_offsets[i + 1]`` of ``ids``.
    """

    sources: tuple[str, ...]
    splits: tuple[str, ...]
    offsets: Tensor  # [S + 1] int64
    source: Tensor  # [S] int32
    split: Tensor  # [S] int32
    temperature: Tensor  # [S] float64
    supervised: Tensor  # [S] int64
    id_offsets: Tensor  # [S + 1] int64
    ids: Tensor  # uint8

    COLUMNS = ("offsets", "source", "split", "temperature", "supervised", "id_offsets", "ids")

    @classmethod
    def of(cls, identities: Sequence[Identity], lengths: Sequence[int], supervised: Sequence[int]) -> Index:
        """The index of samples of ``lengths`` tokens each, of which ``supervised`` are in the loss mask."""
        sources, source = _coded([identity.source for identity in identities])
        splits, split = _coded([identity.split for identity in identities])
        ids = [identity.id.encode() for identity in identities]
        return cls(
            sources,
            splits,
            torch.tensor([*accumulate(lengths, initial=0)]),
            source,
            split,
            torch.tensor([identity.temperature for identity in identities], dtype=torch.float64),
            torch.tensor(supervised, dtype=torch.int64),
            torch.tensor([*accumulate(map(len, ids), initial=0)]),
            torch.frombuffer(bytearray(b"".join(ids)), dtype=torch.uint8)
            if any(ids)
            else torch.empty(0, dtype=torch.uint8),
        )

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Index:
        """The index in a file's tensors and metadata; KeyError or ValueError where there is none."""
        sources, splits = (tuple(json.loads(metadata[kind])) for kind in ("sources", "splits"))
        return cls(sources, splits, *(tensors[name] for name in cls.COLUMNS))

    def tensors(self) -> dict[str, Tensor]:
        """The columns as a file's tensors."""
        return {name: self.__dict__[name] for name in self.COLUMNS}

    def metadata(self) -> dict[str, str]:
        """The names as a file's metadata."""
        return {"sources": json.dumps(self.sources), "splits": json.dumps(self.splits)}

    def __len__(self) -> int:
        return len(self.source)

    def identity(self, row: int) -> Identity:
        """Who sample ``row`` is."""
        start, end = self.id_offsets[row : row + 2].tolist()
        name = bytes(self.ids[start:end].tolist()).decode()
        source, split = self.sources[int(self.source[row])], self.splits[int(self.split[row])]
        return Identity(name, source, split, float(self.temperature[row]))

    def lengths(self) -> Tensor:
        """Tokens of every sample, int64 ``[S]``."""
        return self.offsets.diff()

    def rows(self, split: str) -> Tensor:
        """The samples of a split, int64, ascending."""
        if split not in self.splits:
            return torch.empty(0, dtype=torch.int64)
        return (self.split == self.splits.index(split)).nonzero()[:, 0]

    def contradiction(self) -> str | None:
        """What is wrong with the columns' lengths and order, if anything is."""
        for name, offsets, end in (("offsets", self.offsets, None), ("id_offsets", self.id_offsets, len(self.ids))):
            if len(offsets) != len(self) + 1 or offsets[0] != 0 or (end is not None and offsets[-1] != end):
                return f"its {name} are not those of {len(self)} samples"
        if (self.lengths() <= 0).any():
            return "its offsets do not ascend"
        return None


def _coded(values: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    names = tuple(sorted(set(values)))
    codes = {name: code for code, name in enumerate(names)}
    return names, torch.tensor([codes[value] for value in values], dtype=torch.int32)
