"""Checkpoint to device: each tensor is read, put where the decoder has it, and forgotten before the next.

    target = load_native(TargetSettings(), capacity=700)

Of the matrices of all experts of a layer, which are one tensor of up to 21 GB, one expert's is read at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ...configs.errors import UserError
from ...configs.settings import TargetSettings
from ..target import DTYPES, located, opened
from ..target_files import TargetFiles
from ..target_info import TargetInfo, configured, end_ids
from ..weights import weights_sha256
from .cpu.operations import make_operations
from .decoder import Decoder
from .families import SETTING, family_of
from .memory import check_memory
from .operations import Operations
from .parallel import Group, join_members, shard
from .target import NativeTarget
from .weights import Place, allocate, places


def load_native(
    settings: TargetSettings,
    capacity: int,
    device: torch.device | None = None,
    group: Group | None = None,
    beside: int = 0,
    whole_head: bool = False,
) -> NativeTarget:
    """Load the target in a folder, of a hub name, or the model that ships ("embedded").

    Args:
        settings: which, in which numerics, and which layers it captures.
        capacity: tokens of all the caches that it will be asked for; 0 for recording.
        device: where it runs; default the group's, else the first GPU, or the CPU where there is none.
        group: the processes that hold it together, all of which call this; each reads its share alone.
        beside: bytes of a draft head for which there must be room too.
        whole_head: whether every process has all of the LM head.

    Raises:
        UserError: no such folder, a hub that cannot be reached, a family that is not computed here, files that are not
            all there or do not belong together, a layer that the target does not have, too little memory, or a group to
            which it cannot be dealt evenly.
    """
    if device is None:
        alone = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = alone if group is None else group.device
    with opened(settings) as (path, where):
        whole = AutoConfig.from_pretrained(path, **where)
        family, config = family_of(whole, settings.path)
        if group is not None:
            config = shard(replace(config, whole_head=whole_head), group.share, setting=group.setting)
        dtype = DTYPES[settings.dtype]
        fields = configured(whole.get_text_config(), settings)  # which refuses layers that it has not
        check_memory(settings.path, config, capacity, device, dtype, group, beside)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        info = TargetInfo(
            **fields,
            revision=whole.to_dict().get("_commit_hash") or settings.revision,
            weights_sha256=_weights_sha256(path, where, group),
            vocab_size=config.vocab_size,
            eos_ids=_end_ids(settings, whole, tokenizer),
            dtype=settings.dtype,
        )
        weights = allocate(config, device, dtype)
        fill(places(weights, config, family), settings, device)
    # Recording runs over whole packs of documents, which have no few rows.
    operations = make_operations(config, device, dtype) if capacity else Operations(config, device)
    decoder = Decoder(config, weights, operations, info.layers, group)
    return NativeTarget(decoder, info, tokenizer)


def load_recorded(settings: TargetSettings, members: int) -> NativeTarget:
    """The target for recording, held by the ``members`` of this process's group (:mod:`..parallel`), each of which loads it.

    The first checks and stores what is recorded, while the others are elsewhere: so it has all of the LM head.
    """
    return load_native(settings, capacity=0, group=join_members(members), whole_head=True)


def fill(wanted: dict[str, Place], settings: TargetSettings, device: torch.device) -> None:
    """Read what is ``wanted``, file by file.

    Raises:
        UserError: a tensor is not there, or has another shape, or its file is damaged.
    """
    try:
        for file, names in _by_file(wanted, TargetFiles(settings)).items():
            with safe_open(file, "pt", device=str(device)) as tensors:
                for stored, name in names:
                    _fill_one(wanted[name], tensors.get_slice(stored), stored, settings)
    except SafetensorError as error:
        problem = f"its weights are damaged ({error})"
        raise UserError(SETTING, settings.path, problem, "get the files again") from error


def _by_file(wanted: Iterable[str], files: TargetFiles) -> dict[str, list[tuple[str, str]]]:
    """Of every file the tensors that are wanted: what it calls them, and what they are called here."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in wanted:
        file, stored = files.find(name)
        found[file].append((stored, name))
    return found


def _fill_one(place: Place, part: Any, stored: str, settings: TargetSettings) -> None:
    found = tuple(part.get_shape())
    if found != place.shape:
        problem = f"its {stored} is {found} and not {place.shape}"
        raise UserError(SETTING, settings.path, problem, "take files that belong together")
    for view, (first, *others) in place.parts:
        if len(found) < 3:
            view.copy_(part[(first, *others)].view(view.shape))
            continue
        for index, expert in enumerate(view):
            expert.copy_(part[(index, *others)])


def _weights_sha256(path: str, where: dict[str, Any], group: Group | None) -> str:
    """Of a group one reads all files to know it, and tells the others."""
    checksum = weights_sha256(path, where) if group is None or group.rank == 0 else ""
    return checksum if group is None else group.from_first(checksum)


def _end_ids(settings: TargetSettings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    path, where = located(settings)
    found = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **where)
    generation = (
        GenerationConfig.from_pretrained(path, **where)
        if found and Path(found).is_file()
        else GenerationConfig.from_model_config(config)
    )
    return end_ids(generation, config.get_text_config(), tokenizer)
