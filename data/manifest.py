"""The manifest of a store: what it was made from and holds, and whether the files beside it are those.

    manifest = read_manifest(Path("runs/tiny/store"))
    damage(Path("runs/tiny/store"), manifest, every_byte=False)    # {name: what is wrong with it}

It is derived from the shards once all are there, and written last. Its first field is the checksum of the others.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..configs.errors import UserError
from .files import FileEntry, damaged, encode_json, file_sha256, sha256, write_atomic
from .shards import PATTERN, ShardEntry, facts, facts_path
from .verification import differing

SCHEMA = 2
MANIFEST, STAGE, INDEX, HEAD = "manifest.json", "record.stage.json", "index.safetensors", "head.safetensors"
VOCABULARY, TOKENIZER = "vocabulary.safetensors", "tokenizer"


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


def damage(path: Path, manifest: Manifest, every_byte: bool) -> dict[str, str]:
    """What is wrong with the store at ``path``: the files that are to be made again, with what is wrong with each.

    Args:
        path: its folder.
        manifest: what it should be.
        every_byte: whether to read all of it, or the sizes and what a description is made from.
    """
    files = {shard.name: shard for shard in manifest.shards} | manifest.files
    strangers = dict.fromkeys(foreign(path, manifest), "it does not belong to this store")
    alone = {
        shard.name: f"its {facts_path(path / shard.name).name} is missing or damaged"
        for shard in manifest.shards
        if not _has_facts(path, shard)
    }
    return strangers | alone | differing(path, files, files if every_byte else (INDEX, VOCABULARY))


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


def foreign(path: Path, manifest: Manifest) -> list[str]:
    """Shards that the manifest does not list."""
    return sorted({shard.name for shard in path.glob(PATTERN)} - {entry.name for entry in manifest.shards})


def _has_facts(path: Path, shard: ShardEntry) -> bool:
    """Whether what is published of a shard is what the manifest says of it."""
    stands = facts_path(path / shard.name)
    return stands.is_file() and stands.read_bytes() == facts(shard)


def _checksum(fields: bytes) -> bytes:
    """How a manifest of these fields begins; its checksum is that of the bytes, not of what they mean."""
    return encode_json({"sha256": sha256(fields)})[:-3] + b","
