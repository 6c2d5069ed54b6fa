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
vocabulary.safetensors     how often the target said each token in training answers, int64 [V]
tokenizer/                 the target's tokenizer
manifest.json              derived from all of these once every shard is there
=========================  ===================================================================================

A shard's existence means that it is done. Files are written under another name, synced and renamed, so that a writer
killed at any moment loses only what it was writing.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..models.target import TargetHead
from .files import encode_json, file_sha256, sha256, write_atomic

SCHEMA = 1
MANIFEST, HEAD, VOCABULARY, TOKENIZER = "manifest.json", "head.safetensors", "vocabulary.safetensors", "tokenizer"
TENSORS = ("features", "input_ids", "last_hidden", "loss_mask", "offsets")


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
class ShardEntry:
    """A shard as the manifest lists it."""

    name: str
    sha256: str
    bytes: int
    samples: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a store was made from and what it holds; ``target`` is the target's info, ``files`` the other checksums."""

    schema: int
    target: dict[str, Any]
    tokenizer_sha256: str
    chat_template_sha256: str
    last_hidden: str
    dtypes: dict[str, str]
    samples: int
    tokens: int
    supervised_tokens: int
    files: dict[str, str]
    shards: tuple[ShardEntry, ...]


def shard_name(index: int) -> str:
    """``shard-00007``."""
    return f"shard-{index:05d}"


def write_shard(folder: Path, index: int, samples: list[StoreSample]) -> ShardEntry:
    """Publish one shard; nothing of it is visible before all of it is durable."""
    offsets = torch.tensor([0] + [len(sample.input_ids) for sample in samples]).cumsum(0)
    tensors = {
        "input_ids": torch.cat([sample.input_ids for sample in samples]),
        "loss_mask": torch.cat([sample.loss_mask for sample in samples]),
        "features": torch.cat([sample.features for sample in samples]),
        "last_hidden": torch.cat([sample.last_hidden for sample in samples]),
        "offsets": offsets,
    }
    described = [[sample.id, sample.source, sample.split, sample.temperature] for sample in samples]
    content = save(tensors, metadata={"samples": json.dumps(described, ensure_ascii=False)})
    entry = ShardEntry(
        name=shard_name(index),
        sha256=sha256(content),
        bytes=len(content),
        samples=len(samples),
        tokens=int(offsets[-1]),
        supervised_tokens=int(tensors["loss_mask"].sum()),
    )
    write_atomic(folder / f"{entry.name}.json", encode_json(asdict(entry)))
    write_atomic(folder / f"{entry.name}.safetensors", content)
    return entry


def recorded_shards(folder: Path, count: int) -> set[int]:
    """Which of the ``count`` planned shards are done."""
    return {index for index in range(count) if (folder / f"{shard_name(index)}.safetensors").exists()}


def read_entry(folder: Path, index: int) -> ShardEntry:
    """The published facts of a shard that is done."""
    return ShardEntry(**json.loads((folder / f"{shard_name(index)}.json").read_bytes()))


def write_head(folder: Path, head: TargetHead) -> None:
    """Write the target's head; a tied LM head is written once."""
    tensors = {"embedding": head.embedding.detach(), "norm.weight": head.norm_weight.detach()}
    if head.lm_head.data_ptr() != head.embedding.data_ptr():
        tensors["lm_head"] = head.lm_head.detach()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(folder / HEAD, save(tensors, metadata={"norm_eps": repr(head.norm_eps)}))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The store's last file: a store without it is not finished."""
    write_atomic(folder / MANIFEST, encode_json(asdict(manifest)))


class Store:
    """A finished store, read by random access.

    Args:
        path: its folder.

    Raises:
        UserError: it is not finished, or a file is missing or not the one the manifest lists (sizes and counts are
            checked here, every byte by :meth:`verify`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        self._shards = [_open(path, entry) for entry in self.manifest.shards]
        self._first = [0]
        for shard in self._shards:
            self._first.append(self._first[-1] + len(shard.samples))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> StoreSample:
        shard_index = bisect_right(self._first, index) - 1
        shard, number = self._shards[shard_index], index - self._first[shard_index]
        start, end = shard.offsets[number], shard.offsets[number + 1]
        tensors = shard.tensors
        identity, source, split, temperature = shard.samples[number]
        return StoreSample(
            identity,
            source,
            split,
            temperature,
            tensors["input_ids"][start:end],
            tensors["loss_mask"][start:end],
            tensors["features"][start:end],
            tensors["last_hidden"][start:end],
        )

    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return [b - a for shard in self._shards for a, b in zip(shard.offsets, shard.offsets[1:], strict=False)]

    def indices(self, split: str) -> list[int]:
        """The samples of a split."""
        splits = [sample[2] for shard in self._shards for sample in shard.samples]
        return [index for index, found in enumerate(splits) if found == split]

    def head(self) -> TargetHead:
        """The target's embedding, final norm and LM head."""
        with safe_open(self.path / HEAD, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            eps = float(file.metadata()["norm_eps"])
        embedding = tensors["embedding"]
        return TargetHead(embedding, tensors["norm.weight"], eps, tensors.get("lm_head", embedding))

    def token_counts(self) -> Tensor:
        """How often the target said each token in training answers, int64 ``[V]``."""
        return load_file(self.path / VOCABULARY)["counts"]

    def check(self, settings: Settings) -> None:
        """Refuse a store that was not recorded as the recipe says.

        Raises:
            UserError: naming the recipe's value and the store's.
        """
        target, recipe = self.manifest.target, settings.target
        for setting, wanted, found in (
            ("target.path", recipe.path, target["name"]),
            ("target.revision", recipe.revision, target["revision"]),
            ("target.dtype", recipe.dtype, target["dtype"]),
            ("target.layers", recipe.layers and list(recipe.layers), target["layers"]),
            ("record.dtype", settings.record.dtype, self.manifest.dtypes["features"]),
        ):
            if wanted is not None and wanted != found:
                problem = f"{self.path} was recorded with {found}"
                raise UserError(setting, wanted, problem, "set it back, or record under another run.name")

    def verify(self) -> list[str]:
        """Read every byte; returns what is wrong, one line a file."""
        expected = {f"{entry.name}.safetensors": entry.sha256 for entry in self.manifest.shards} | self.manifest.files
        problems = []
        for name, checksum in expected.items():
            path = self.path / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif file_sha256(path) != checksum:
                problems.append(f"{name} is not what was recorded: its checksum differs")
        known = expected.keys() | {f"{entry.name}.json" for entry in self.manifest.shards}
        foreign = {path.name for path in self.path.glob("shard-*")} - known
        return problems + [f"{name} does not belong to this store" for name in sorted(foreign)]


class _Shard(NamedTuple):
    tensors: dict[str, Tensor]
    offsets: list[int]
    samples: list[tuple[str, str, str, float]]


def _read_manifest(path: Path) -> Manifest:
    if not (path / MANIFEST).is_file():
        raise UserError("store", path, "it holds no manifest, so it is not finished", "run eagle3 record first")
    try:
        fields = json.loads((path / MANIFEST).read_bytes())
        if fields["schema"] != SCHEMA:
            problem = f"its schema is {fields['schema']}, this version reads {SCHEMA}"
            raise UserError("store", path, problem, "record it again")
        shards = tuple(ShardEntry(**entry) for entry in fields.pop("shards"))
        return Manifest(**fields, shards=shards)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("store", path / MANIFEST, f"it is damaged ({error})", "delete it and run eagle3 record") from None


def _open(path: Path, entry: ShardEntry) -> _Shard:
    """Map a shard into memory; cheap checks only, the checksum is :meth:`Store.verify`'s."""
    file = path / f"{entry.name}.safetensors"
    remedy = "delete it and the manifest, and run eagle3 record"
    if not file.is_file():
        raise UserError("store", file, "the manifest lists it and it is missing", remedy)
    if file.stat().st_size != entry.bytes:
        problem = f"it has {file.stat().st_size:,} bytes and not {entry.bytes:,}"
        raise UserError("store", file, problem, remedy)
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in TENSORS}
            samples = [tuple(sample) for sample in json.loads(opened.metadata()["samples"])]
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError("store", file, f"it is damaged ({error})", remedy) from None
    offsets = tensors["offsets"].tolist()
    if len(samples) != entry.samples or offsets[-1] != entry.tokens or len(offsets) != len(samples) + 1:
        raise UserError("store", file, "its counts are not those of the manifest", remedy)
    return _Shard(tensors, offsets, samples)
