"""The rows of prompt files and of datasets of the Hugging Face hub, one after another and never all in memory.

Parquet and the hub are read through ``datasets``. JSON is not: it would give a column one type throughout, which changes
what stands in a list of messages whose contents are now a text and now parts, and could not say where a file is broken.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from ..configs.errors import UserError
from ..configs.settings import PrepareSettings
from .files import file_sha256, read_lines, sha256
from .stage import Json

SETTING = "prepare.prompts"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SHARD = re.compile(r"-\d+-of-\d+$")  # of a dataset in several files, which are one source


class Row(NamedTuple):
    """``values`` by column; ``where`` they stand, for whoever has to mend them; the ``source`` if they name none."""

    where: str
    source: str
    values: dict[str, Any]


def rows(settings: PrepareSettings) -> Iterator[Row]:
    """All rows of ``prepare.prompts``, in their order.

    Raises:
        UserError: there is no such file or dataset, or it cannot be read.
    """
    found = files(settings.prompts)
    if found is None:
        yield from hub_rows(settings)
    for path in found or ():
        source = SHARD.sub("", path.stem)
        for where, values in READERS[path.suffix](path):
            yield Row(f"{path}, {where}", source, values)


def files(prompts: str) -> list[Path] | None:
    """The files that ``prepare.prompts`` names, sorted, or None where it is the name of a dataset of the hub.

    Raises:
        UserError: there are none.
    """
    path, remedy = Path(prompts), f"give a file ({', '.join(READERS)}), a folder or a glob of them"
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(SETTING, prompts, f'files that end in "{path.suffix}" are not read', remedy)
        return [path]
    if path.is_dir() or glob.has_magic(prompts):
        pattern = f"{glob.escape(prompts)}/**/*" if path.is_dir() else prompts
        inside = map(Path, glob.iglob(pattern, recursive=True))
        found = sorted(one for one in inside if one.suffix in READERS and one.is_file())
        if not found:
            raise UserError(SETTING, prompts, "there is no file that can be read", remedy)
        return found
    if path.suffix in READERS or not HUB_NAME.fullmatch(prompts):
        raise UserError(SETTING, prompts, "there is no such file", f'{remedy}, a dataset (owner/name) or "stdlib"')
    return None


def fingerprint(settings: PrepareSettings) -> dict[str, Json]:
    """What determines the rows, under the names of the settings: checksums of files, or which dataset it is."""
    found = files(settings.prompts)
    if found is None:
        hub = ("hub_config", "hub_split", "hub_revision")
        values: dict[str, Json] = {
            SETTING: settings.prompts,
            **{f"prepare.{key}": value for key, value in asdict(settings).items() if key in hub},
        }
    else:
        try:
            sums = [f"{path.stem} {file_sha256(path)}" for path in found]
        except OSError as error:
            raise _unreadable(settings.prompts, error) from None
        values = {SETTING: sums[0].split()[-1] if len(sums) == 1 else sha256("\n".join(sums).encode())}
    return values if settings.column is None else {**values, "prepare.column": settings.column}


def hub_rows(settings: PrepareSettings) -> Iterator[Row]:
    """The rows of a dataset of the hub, or of a folder of that layout, as they come over the network.

    An "id" or "split" there is not meant for us: it need not be unique, nor one of our splits.
    """
    name, source = settings.prompts, Path(settings.prompts).name
    try:
        dataset = _open(settings, streaming=True)
        if dataset.features is None:  # JSON whose types are only known at its end; streamed, texts come in quotes
            dataset = _open(settings, streaming=False)
    except (DatasetsError, OSError, ValueError) as error:
        remedy = "check name, prepare.hub_config, prepare.hub_split and prepare.hub_revision, and that you may read it"
        raise UserError(SETTING, name, f"it is no file, and datasets cannot load it ({error})", remedy) from None
    for where, values in _numbered(dataset, name):
        yield Row(f"{name}, {where}", source, {key: values[key] for key in values if key not in ("id", "split")})


def _open(settings: PrepareSettings, *, streaming: bool) -> Dataset | IterableDataset:
    return load_dataset(
        settings.prompts,
        settings.hub_config,
        split=settings.hub_split,
        revision=settings.hub_revision,
        streaming=streaming,
    )


def _numbered(dataset: Iterable[dict[str, Any]], name: object) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, values in enumerate(dataset, 1):
            yield f"row {number}", values
    except (
        DatasetsError,
        OSError,
        ValueError,
        TypeError,
    ) as error:  # datasets lets through what Arrow and the net raise
        raise UserError(SETTING, name, f"it cannot be read to its end ({error})", "repair or replace it") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        dataset = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (DatasetsError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    yield from _numbered(dataset, path)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, values in read_lines(path, SETTING):
        yield f"line {number}", values


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, or one after another; the file's text is held in memory, of the objects one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    decode, position = json.JSONDecoder().raw_decode, _next(text, 0, "[")
    for number in itertools.count(1):
        if position == len(text):
            if text.lstrip().startswith("[") and not text.rstrip().endswith("]"):
                problem = f"the list breaks off before row {number}"
                raise UserError(SETTING, path, problem, "write it again, whole")
            return
        try:
            values, end = decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(SETTING, f"{path}, row {number}", f"not JSON ({error})", "repair the file") from None
        if not isinstance(values, dict):
            raise UserError(SETTING, f"{path}, row {number}", "not a JSON object", "write a list of objects")
        yield f"row {number}", values
        position = _next(text, end, ",]")


def _next(text: str, start: int, marks: str) -> int:
    """Where the next value begins, behind white space and ``marks``."""
    while start < len(text) and (text[start].isspace() or text[start] in marks):
        start += 1
    return start


def _unreadable(path: object, error: Exception) -> UserError:
    return UserError(SETTING, path, f"it cannot be read ({error})", "check the path")


#: How the files of each kind are read: "line 3" or "row 3", and what stands there by column.
READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
