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

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..models.target_info import TargetHead
from .files import check_size, damaged, file_sha256, read_tensors
from .index import Index
from .manifest import (
    HEAD,
    INDEX,
    TOKENIZER,
    VOCABULARY,
    Manifest,
    check_recording,
    damage,
    foreign,
    read_manifest,
)
from .quantise import dtype_name
from .shards import Shard, StoreSample, read_entry, shard_path
from .vocabulary import DraftVocabulary, TokenCounts, choose_vocabulary

OPEN_SHARDS = 4096  # mapped at once; a system allows some 65,000 maps to a process


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
        if strangers := foreign(path, self.manifest):
            raise UserError("store", path / strangers[0], "it does not belong to this store", "delete it")
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


def _read_index(path: Path, manifest: Manifest) -> Index:
    """The store's index, every byte of it checked."""
    file = path / INDEX
    if file_sha256(file) != manifest.files[INDEX].sha256:
        raise damaged(file, "it is not what was recorded")
    tensors, metadata = read_tensors(file)
    if metadata["recording"] != manifest.recording:
        raise damaged(file, "it is another recording's")
    return Index.read(tensors, metadata)
