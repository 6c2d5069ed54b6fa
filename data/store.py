"""The store: what recording hands to training.

    store = Store(Path("runs/tiny/store"))
    sample = store[0]            # sample.features [T, F, H], memory-mapped
    store.verify()               # reads every byte against its checksum; [] if all is well

=========================  ===================================================================================
file                       holds
=========================  ===================================================================================
shard-NNNNN.safetensors    samples packed back to back: ``input_ids`` int32 [N], ``loss_mask`` bool [N],
                           ``features`` [N, F, H], ``last_hidden`` [N, H] after the final norm, ``offsets`` int64
                           [S + 1]; its metadata names every sample's id, source, split and temperature
shard-NNNNN.json           the shard's checksum, bytes and counts, published just before the shard itself
head.safetensors           the target's embedding, final norm and LM head
vocabulary.safetensors     how often the target said each token in training answers, int64 [sources, V]
tokenizer/                 the target's tokenizer
manifest.json              derived from all of these once every shard is there
=========================  ===================================================================================

A shard's existence means that it is done. Files are written under another name, synced and renamed, so that a writer
killed at any moment loses only what it was writing.

Shapes: N tokens of a shard, S samples of a shard, T tokens of a sample, F captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..models.target_info import TargetHead
from .files import FileEntry, check_size, damaged, encode_json, file_sha256, read_tensors, sha256, write_atomic
from .vocabulary import DraftVocabulary, TokenCounts, choose_vocabulary

SCHEMA = 1
MANIFEST, HEAD, VOCABULARY, TOKENIZER = "manifest.json", "head.safetensors", "vocabulary.safetensors", "tokenizer"


class StoreSample(NamedTuple):
    """One conversation with the target's states."""

    id: str
    source: str
    split: str
    temperature: float
    input_ids: Tensor  # [T] int32
    loss_mask: Tensor  # [T] bool
    features: Tensor  # [T, F, H]
    last_hidden: Tensor  # [T, H]


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A shard as it was when it was written; its states do not predict ``disagreeing`` of its ``greedy_tokens``."""

    header_sha256: str
    name: str
    samples: int
    tokens: int
    supervised_tokens: int
    greedy_tokens: int
    disagreeing: int


@dataclass(frozen=True)
class Manifest:
    """What a store was made from and what it holds.

    ``recipe``: the settings it was made with. ``target``: the target's :class:`TargetInfo`, with its weights' hash,
    captured layers and the numerics it ran in. ``files``: what stands beside the shards.
    """

    schema: int
    recipe: dict[str, Any]
    target: dict[str, Any]
    tokenizer_sha256: str
    chat_template_sha256: str
    last_hidden: str
    dtypes: dict[str, str]
    samples: int
    tokens: int
    supervised_tokens: int
    greedy_tokens: int
    disagreeing: int
    files: dict[str, FileEntry]
    shards: tuple[ShardEntry, ...]


def shard_path(folder: Path, index: int) -> Path:
    """``<folder>/shard-00007.safetensors``."""
    return folder / f"shard-{index:05d}.safetensors"


def write_shard(folder: Path, index: int, samples: Sequence[StoreSample], disagreeing: int) -> ShardEntry:
    """Publish one shard; nothing of it is visible before all of it is durable."""
    path = shard_path(folder, index)
    offsets = torch.tensor([0] + [len(sample.input_ids) for sample in samples]).cumsum(0)
    packed = (torch.cat(parts) for parts in zip(*(sample[4:] for sample in samples), strict=True))
    tensors = {**dict(zip(StoreSample._fields[4:], packed, strict=True)), "offsets": offsets}
    described = [[sample.id, sample.source, sample.split, sample.temperature] for sample in samples]
    content = save(tensors, metadata={"samples": json.dumps(described, ensure_ascii=False)})
    entry = ShardEntry(
        sha256=sha256(content),
        bytes=len(content),
        header_sha256=sha256(_header(BytesIO(content), len(content))),
        name=path.name,
        samples=len(samples),
        tokens=int(offsets[-1]),
        supervised_tokens=int(tensors["loss_mask"].sum()),
        greedy_tokens=sum(int(sample.loss_mask.sum()) for sample in samples if sample.temperature == 0.0),
        disagreeing=disagreeing,
    )
    write_atomic(path.with_suffix(".json"), encode_json(asdict(entry)))
    write_atomic(path, content)
    return entry


def read_entry(folder: Path, index: int) -> ShardEntry:
    """The published facts of a shard that is done.

    Raises:
        UserError: the shard is not the file that was written, or its facts are lost.
    """
    path = shard_path(folder, index)
    try:
        entry = ShardEntry(**json.loads(path.with_suffix(".json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, f"its {path.with_suffix('.json').name} is missing or damaged ({error})") from None
    check_size(path, entry)
    return entry


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The store's last file: a store without it is not finished."""
    fields = asdict(manifest)
    write_atomic(folder / MANIFEST, encode_json({"sha256": sha256(encode_json(fields)), **fields}))


class Store:
    """A finished store, read by random access; samples are views of the mapped files, nothing is copied.

    Args:
        path: its folder.

    Raises:
        UserError: it is not finished, a file is missing, foreign, or not the one the manifest lists (names, sizes,
            headers and counts are checked here, every byte by :meth:`verify`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        for name, entry in self.manifest.files.items():
            check_size(path / name, entry)
        if foreign := self._foreign():
            raise UserError("store", path / foreign[0], "it does not belong to this store", "delete it")
        self._shards = [_open(path, entry, self.manifest) for entry in self.manifest.shards]
        self._first = list(accumulate((len(shard.samples) for shard in self._shards), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> StoreSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard_index = bisect_right(self._first, index) - 1
        shard, number = self._shards[shard_index], index - self._first[shard_index]
        return shard.sample(number)

    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return [b - a for shard in self._shards for a, b in pairwise(shard.offsets)]

    def indices(self, split: str) -> list[int]:
        """The samples of a split."""
        samples = (sample for shard in self._shards for sample in shard.samples)
        return [index for index, (_, _, found, _) in enumerate(samples) if found == split]

    @property
    def tokenizer_dir(self) -> Path:
        """The target's tokenizer, as transformers saves it."""
        return self.path / TOKENIZER

    def head(self) -> TargetHead:
        """The target's embedding, final norm and LM head."""
        tensors, metadata = read_tensors(self.path / HEAD)
        embedding, epsilon = tensors["embedding"], float(metadata["norm_eps"])
        return TargetHead(embedding, tensors["norm.weight"], epsilon, tensors.get("lm_head", embedding))

    def token_counts(self) -> Tensor:
        """How often the target said each token in training answers, int64 ``[V]``."""
        return TokenCounts.read(self.path / VOCABULARY).total

    def draft_vocabulary(self, size: int) -> DraftVocabulary:
        """The draft vocabulary of ``size`` tokens; UserError where the target has fewer."""
        return choose_vocabulary(TokenCounts.read(self.path / VOCABULARY), size)

    def check(self, settings: Settings) -> None:
        """Refuse a store that was not recorded as the recipe says, or whose target is too small for it.

        Raises:
            UserError: naming the recipe's value and the store's.
        """
        made, target = self.manifest.recipe, settings.target
        layers, captured = None if target.layers is None else list(target.layers), self.manifest.target["layers"]
        for setting, wanted, found in (
            ("target.path", target.path, made["target.path"]),
            ("target.revision", target.revision, made["target.revision"]),
            ("target.dtype", target.dtype, made["target.dtype"]),
            ("target.layers", layers, made["target.layers"] if layers is None else captured),
            ("record.dtype", settings.record.dtype, made["record.dtype"]),
        ):
            if wanted != found:
                problem = f"{self.path} was recorded with {found}"
                raise UserError(setting, wanted, problem, "set it back, or record under another run.name")
        self.draft_vocabulary(settings.draft.vocab_size)

    def verify(self) -> list[str]:
        """Read every byte; returns what is wrong, one line a file."""
        shards = {entry.name: entry for entry in self.manifest.shards}
        expected: dict[str, FileEntry] = {**shards, **self.manifest.files}
        problems = [f"{name} does not belong to this store" for name in self._foreign()]
        for name, entry in expected.items():
            path = self.path / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif file_sha256(path) != entry.sha256:
                problems.append(f"{name} is not what was recorded: its checksum differs")
        return problems

    def _foreign(self) -> list[str]:
        """Shards that the manifest does not list."""
        known = {entry.name for entry in self.manifest.shards}
        return sorted({path.name for path in self.path.glob("shard-*.safetensors")} - known)


class _Shard(NamedTuple):
    tensors: dict[str, Tensor]
    offsets: list[int]
    samples: list[list[Any]]  # id, source, split, temperature

    def sample(self, number: int) -> StoreSample:
        rows = slice(self.offsets[number], self.offsets[number + 1])
        views = (self.tensors[name][rows] for name in StoreSample._fields[4:])
        return StoreSample(*self.samples[number], *views)


def read_shard(folder: Path, index: int, manifest: Manifest) -> list[StoreSample]:
    """The samples of a published shard, as a :class:`Store` gives them, before ``manifest`` lists it.

    Raises:
        UserError: it is not the file that was written, or not what ``manifest`` says of every shard.
    """
    shard = _open(folder, read_entry(folder, index), manifest)
    return [shard.sample(number) for number in range(len(shard.samples))]


def read_manifest(path: Path) -> Manifest:
    if not (path / MANIFEST).is_file():
        raise UserError("store", path, "it holds no manifest, so it is not finished", "run eagle3 record first")
    try:
        fields = json.loads((path / MANIFEST).read_bytes())
        if fields["schema"] != SCHEMA:
            problem = f"its schema is {fields['schema']}, this version reads {SCHEMA}"
            raise UserError("store", path, problem, "record it again")
        if fields.pop("sha256") != sha256(encode_json(fields)):
            raise ValueError("its checksum differs")
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        shards = tuple(ShardEntry(**entry) for entry in fields.pop("shards"))
        return Manifest(**fields, files=files, shards=shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path / MANIFEST, f"it is damaged ({error})") from None


def _header(file: BinaryIO, limit: int) -> bytes:
    """The start of a safetensors file: names, types, shapes and metadata, preceded by their length."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), limit))


def _open(path: Path, entry: ShardEntry, manifest: Manifest) -> _Shard:
    """Map a shard into memory; cheap checks only, the checksum is :meth:`Store.verify`'s."""
    file = path / entry.name
    check_size(file, entry)
    with file.open("rb") as opened:
        if sha256(_header(opened, entry.bytes)) != entry.header_sha256:
            raise damaged(file, "its header is not what was recorded")
    tensors, metadata = read_tensors(file)
    offsets, samples = tensors.pop("offsets").tolist(), json.loads(metadata["samples"])
    found = {name: (str(tensor.dtype).removeprefix("torch."), *tensor.shape) for name, tensor in tensors.items()}
    layers, width = len(manifest.target["layers"]), manifest.target["hidden_size"]
    shapes = {"input_ids": (), "loss_mask": (), "features": (layers, width), "last_hidden": (width,)}
    if found != {name: (manifest.dtypes[name], entry.tokens, *shape) for name, shape in shapes.items()}:
        raise damaged(file, "its tensors are not those of the manifest")
    ascending = all(a < b for a, b in pairwise(offsets))
    counts = (offsets[0], offsets[-1], len(offsets) - 1, len(samples))
    if counts != (0, entry.tokens, entry.samples, entry.samples) or not ascending:
        raise damaged(file, "its counts are not those of the manifest")
    return _Shard(tensors, offsets, samples)
