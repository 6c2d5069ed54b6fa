"""The store: what recording hands to training.

    store = Store(Path("runs/tiny/store"))
    sample = store[0]            # sample.features [T, F, H], memory-mapped
    store.verify()               # reads every byte against its checksum; [] if all is well

=========================  ===================================================================================
file                       holds
=========================  ===================================================================================
shard-NNNNN.safetensors    samples packed back to back: ``input_ids`` int32 [N], ``loss_mask`` bool [N],
                           ``features`` [N, F, H], ``last_hidden`` [N, H] after the final norm, what is in FP8 with
                           ``<name>_scale`` float32 [N, F] or [N]; and the shard's own index of its samples
shard-NNNNN.json           the shard's checksum, bytes and counts, published just before the shard itself
index.safetensors          who all samples are and where each begins (:class:`~.index.Index`)
head.safetensors           the target's embedding, final norm and LM head
vocabulary.safetensors     how often the target said each token in training answers, int64 [sources, V]
tokenizer/                 the target's tokenizer
record.stage.json          the settings and inputs that all of it was made from; its checksum names the recording
manifest.json              derived from all of these once every shard is there
=========================  ===================================================================================

A shard's existence means that it is done. Files are written under another name, synced and renamed, so that a writer
killed at any moment loses only what it was writing. Opening a store reads the manifest and the index; a shard is mapped
when a sample of it is first asked for.

Bytes a token of Maverick (3 features and the last hidden state, 5,120 wide), its id and mask (5 bytes) apart:

==============================  ==========
all bfloat16                      40,960
features FP8, last bfloat16       25,612
all FP8                           20,496
==============================  ==========

Shapes: N tokens of a shard, T tokens of a sample, F captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..models.target_info import TargetHead
from .files import FileEntry, check_size, damaged, encode_json, file_sha256, read_tensors, sha256, write_atomic
from .index import Index
from .quantise import dtype_name
from .shards import PATTERN, Shard, ShardEntry, StoreSample, facts, facts_path, read_entry, shard_path
from .verification import differing
from .vocabulary import DraftVocabulary, TokenCounts, choose_vocabulary

SCHEMA = 2
MANIFEST, STAGE, INDEX, HEAD = "manifest.json", "record.stage.json", "index.safetensors", "head.safetensors"
VOCABULARY, TOKENIZER = "vocabulary.safetensors", "tokenizer"
OPEN_SHARDS = 4096  # mapped at once; a system allows some 65,000 maps to a process


@dataclass(frozen=True)
class Manifest:
    """What a store was made from and what it holds.

    ``recording``: the checksum of its record.stage.json, which its shards and its index bear too. ``recipe``: the
    settings it was made with. ``target``: the target's :class:`TargetInfo`, with its weights' hash, captured layers and
    the numerics it ran in. ``dtypes``: of each tensor of ``[N, ...]``. ``files``: what stands beside the shards.
    """

    schema: int
    recording: str
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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The store's last file: a store without it is not finished."""
    fields = encode_json(asdict(manifest))
    write_atomic(folder / MANIFEST, _checksum(fields), fields[1:])


class Store:
    """A finished store, read by random access; what is not in FP8 is a view of the mapped files, nothing is copied.

    Args:
        path: its folder.

    Raises:
        UserError: it is not finished, a file is missing, foreign, or not the one the manifest lists. Names, sizes and
            the index are checked here, a shard's header and counts when a sample of it is first read, every byte by
            :meth:`verify`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        check_recording(path, self.manifest)
        for name, entry in self.manifest.files.items():
            check_size(path / name, entry)
        for shard in self.manifest.shards:
            check_size(path / shard.name, shard)
        if foreign := _foreign(path, self.manifest):
            raise UserError("store", path / foreign[0], "it does not belong to this store", "delete it")
        self.index = _read_index(path, self.manifest)
        self._first = list(accumulate((shard.samples for shard in self.manifest.shards), initial=0))
        self._shard: Callable[[int], Shard] = lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> StoreSample:
        shard, row = self._place(index)
        return self._shard(shard)[row]

    def loss_mask(self, index: int) -> Tensor:
        """Of one sample, bool ``[T]``; its states are not read."""
        shard, row = self._place(index)
        return self._shard(shard).loss_mask(row)

    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return self.index.lengths().tolist()

    def indices(self, split: str) -> list[int]:
        """The samples of a split."""
        return self.index.rows(split).tolist()

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
        made, target, record = self.manifest.recipe, settings.target, settings.record
        layers, captured = None if target.layers is None else list(target.layers), self.manifest.target["layers"]
        for setting, wanted, found in (
            ("target.path", target.path, made["target.path"]),
            ("target.revision", target.revision, made["target.revision"]),
            ("target.dtype", target.dtype, made["target.dtype"]),
            ("target.layers", layers, made["target.layers"] if layers is None else captured),
            ("record.features_dtype", record.features_dtype, made["record.features_dtype"]),
            ("record.last_hidden_dtype", record.last_hidden_dtype, made["record.last_hidden_dtype"]),
            ("record.spool_shards", record.spool_shards, made["record.spool_shards"]),
        ):
            if wanted != found:
                problem = f"{self.path} was recorded with {found}"
                raise UserError(setting, wanted, problem, "set it back, or record under another run.name")
        self.draft_vocabulary(settings.draft.vocab_size)

    def verify(self) -> list[str]:
        """Read every byte; returns what is wrong, one line a file."""
        return [f"{name}: {problem}" for name, problem in damage(self.path, self.manifest, every_byte=True).items()]

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]

    def _open(self, number: int) -> Shard:
        shard = _checked(Shard.open(self.path, self.manifest.shards[number]), self.manifest)
        first = self._first[number]
        if not shard.index.lengths().equal(self.index.offsets[first : first + len(shard) + 1].diff()):
            raise damaged(shard.path, f"its samples are not those of {INDEX}")
        return shard


def damage(path: Path, manifest: Manifest, every_byte: bool) -> dict[str, str]:
    """What is wrong with the store at ``path``: the files that are to be made again, with what is wrong with each.

    Args:
        path: its folder.
        manifest: what it should be.
        every_byte: whether to read all of it, or the sizes and what a description is made from.
    """
    files = {shard.name: shard for shard in manifest.shards} | manifest.files
    foreign = dict.fromkeys(_foreign(path, manifest), "it does not belong to this store")
    alone = {
        shard.name: f"its {facts_path(path / shard.name).name} is missing or damaged"
        for shard in manifest.shards
        if not _has_facts(path, shard)
    }
    return foreign | alone | differing(path, files, files if every_byte else (INDEX, VOCABULARY))


def check_recording(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest that was made for another store than that at ``path``.

    Raises:
        UserError: naming what both were recorded with; or the store's own record of that is damaged.
    """
    stage = path / STAGE
    if not stage.is_file() or file_sha256(stage) == manifest.recording:
        return
    if manifest.shards[0].recording == manifest.recording and _has_facts(path, manifest.shards[0]):
        raise damaged(stage, "it is not what was recorded")
    try:
        begun = json.loads(stage.read_bytes())
    except ValueError as error:
        raise damaged(stage, f"it is damaged ({error})") from None
    for setting, value in (manifest.recipe | {"weights of the target": manifest.target["weights_sha256"]}).items():
        if setting in begun and begun[setting] != value:
            problem = f"{path / MANIFEST} says so, and the store was recorded with {begun[setting]}"
            raise UserError(setting, value, problem, "delete that manifest and run eagle3 record again")
    raise damaged(path / MANIFEST, "it is another recording's")


def _foreign(path: Path, manifest: Manifest) -> list[str]:
    """Shards that the manifest does not list."""
    return sorted({shard.name for shard in path.glob(PATTERN)} - {entry.name for entry in manifest.shards})


def _has_facts(path: Path, shard: ShardEntry) -> bool:
    """Whether what is published of a shard is what the manifest says of it."""
    stands = facts_path(path / shard.name)
    return stands.is_file() and stands.read_bytes() == facts(shard)


def read_shard(folder: Path, number: int, manifest: Manifest) -> Shard:
    """A published shard, as a :class:`Store` reads it, before ``manifest`` lists it.

    Raises:
        UserError: it is not the file that was written, or not what ``manifest`` says of every shard.
    """
    path = shard_path(folder, number)
    entry = read_entry(path)
    if entry.recording != manifest.recording:
        raise damaged(path, "it is another recording's")
    return _checked(Shard.open(folder, entry), manifest)


def _checked(shard: Shard, manifest: Manifest) -> Shard:
    """``shard``, if its tensors are what ``manifest`` says of every shard."""
    found = {name: (dtype_name(tensor), *tensor.shape[1:]) for name, tensor in shard.tensors.items()}
    layers, width = len(manifest.target["layers"]), manifest.target["hidden_size"]
    shapes = {"features": (layers, width), "features_scale": (layers,), "last_hidden": (width,)}
    if found != {name: (dtype, *shapes.get(name, ())) for name, dtype in manifest.dtypes.items()}:
        raise damaged(shard.path, "its tensors are not those of the manifest")
    return shard


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at ``path``, whose every byte is checked.

    Raises:
        UserError: there is none, it is of another version, or damaged.
    """
    if not (path / MANIFEST).is_file():
        raise UserError("store", path, "it holds no manifest, so it is not finished", "run eagle3 record first")
    try:
        content = (path / MANIFEST).read_bytes()
        fields = json.loads(content)
        if fields["schema"] != SCHEMA:
            problem = f"its schema is {fields['schema']}, this version reads {SCHEMA}"
            raise UserError("store", path, problem, "record it again")
        size = len(_checksum(b""))
        if content[:size] != _checksum(b"{" + content[size:]):
            raise ValueError("its checksum differs")
        del fields["sha256"]
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        shards = tuple(ShardEntry(**entry) for entry in fields.pop("shards"))
        return Manifest(**fields, files=files, shards=shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path / MANIFEST, f"it is damaged ({error})") from None


def _checksum(fields: bytes) -> bytes:
    """How a manifest of these fields begins; its checksum is that of the bytes, not of what they mean."""
    return encode_json({"sha256": sha256(fields)})[:-3] + b","


def _read_index(path: Path, manifest: Manifest) -> Index:
    """The store's index, every byte of it checked."""
    file = path / INDEX
    if file_sha256(file) != manifest.files[INDEX].sha256:
        raise damaged(file, "it is not what was recorded")
    tensors, metadata = read_tensors(file)
    if metadata["recording"] != manifest.recording:
        raise damaged(file, "it is another recording's")
    return Index.read(tensors, metadata)
