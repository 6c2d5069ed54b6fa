"""A head that another trainer made, in the format of any engine, as a head of ours.

    imported = take("trtllm", read_files(Path("heads/theirs")), TargetFiles(settings.target))
    imported.draft, imported.assumed

It becomes what the engine of the format would compute from the same files, its defaults included. Files say little of
how they are to be read: all that was taken from elsewhere is listed in ``assumed``. Acceptance is the proof: a head that
was misread still drafts, badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..configs.errors import UserError
from .checkpoint import CONFIG, FIELDS, check_tensor
from .draft import DraftConfig, Eagle3Draft
from .engines import ENGINES, FLAGS, OURS, TRTLLM_OPTIONS, Engine, Files, Reading, read
from .formats import FORMATS
from .target_files import TargetFiles

EMBEDDING = "embed_tokens.weight"
#: What no file says and every engine does.
CONVENTIONS = (
    "RoPE turns halves (NeoX), at the position of the row's feature, whatever the target's own does",
    "fc takes the captured layers ascending, and the attention the embedding before the hidden state",
    "row t pairs the features of token t with the embedding of token t+1",
)


class Imported(NamedTuple):
    """The head, and every convention under which it was read, each in a line."""

    draft: Eagle3Draft
    assumed: list[str]


def take(name: str, path: Path, files: Files, target: TargetFiles) -> Imported:
    """The head in ``files``, which came from ``path``, as the engines of format ``name`` read it.

    Raises:
        UserError: the head belongs to another target, contradicts itself, computes something that is not known here,
            or engines of the format disagree on what it is.
    """
    engine, reading = _agreed(name, path, files, target)
    config = _config(path, reading, target)
    tensors = dict(_renamed(engine, files.tensors))
    assumed = [*_said(files, engine, reading), *_take_embedding(engine, path, tensors, target)]
    assumed += _take_lm_head(engine, path, files, config, tensors, target)
    ids = _take_vocabulary(path, config, tensors)
    draft = Eagle3Draft(config, ids)
    expected = {key: tensor for key, tensor in draft.state_dict().items() if key not in ("d2t", "t2d")}
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise _refusal(path, f"there is no tensor {key}")
        if key not in expected:
            raise _refusal(path, f"its tensor {key} has no place in a head of one layer")
        check_tensor(path, key, tensors[key], expected[key])
    draft.load_state_dict(draft.state_dict() | tensors)
    return Imported(draft, [*assumed, *CONVENTIONS])


def _agreed(name: str, path: Path, files: Files, target: TargetFiles) -> tuple[Engine, Reading]:
    """The format's first engine and its reading, which must be that of the others."""
    engines = [ENGINES[key] for key in FORMATS[name].engines]
    if TRTLLM_OPTIONS not in files.texts and len(engines) > 1:
        engines = [engine for engine in engines if engine is not ENGINES["trtllm"]]  # its layers are not in the files
    readings = [read(engine, files, target.num_layers) for engine in engines]
    for engine, reading in zip(engines, readings, strict=True):
        if reading.strange:
            raise _refusal(path, f"for {engine.title}, {reading.strange[0]}")
        if reading.values != readings[0].values:
            key = next(key for key, value in reading.values.items() if value != readings[0].values[key])
            both = (
                f"{engines[0].title} reads {key} as {readings[0].values[key]}, {engine.title} as {reading.values[key]}"
            )
            raise UserError("HEAD", path, both, "say for which engine it was made: --format vllm, sglang or trtllm")
    return engines[0], readings[0]


def _config(path: Path, reading: Reading, target: TargetFiles) -> DraftConfig:
    values = reading.values | {"target_layers": tuple(reading.values["target_layers"])}
    for ours, theirs, kind in FIELDS:
        if not isinstance(values[ours], int if kind is int else kind | int):
            raise _refusal(path, f"its {CONFIG} reads {theirs} as {values[ours]}")
    config = DraftConfig(**values)
    for said, found, wanted in (
        ("hidden_size", config.hidden_size, target.hidden_size),
        ("vocab_size", config.vocab_size, target.vocab_size),
    ):
        if found != wanted:
            raise _refusal(path, f"its {said} is {found}, and that of {target.name} is {wanted}")
    layers = config.target_layers
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= target.num_layers:
        raise _refusal(path, f"it captures the outputs of layers {list(layers)} of {target.num_layers}")
    if config.num_heads % config.num_kv_heads or config.head_dim % 2 or config.draft_vocab_size > config.vocab_size:
        shape = f"{config.num_heads} heads over {config.num_kv_heads}, {config.head_dim} wide"
        raise _refusal(path, f"it has {shape}, and a draft vocabulary of {config.draft_vocab_size:,}")
    return config


def _renamed(engine: Engine, tensors: dict[str, Tensor]) -> Sequence[tuple[str, Tensor]]:
    """The tensors under our names, for those prefixes that the engine knows."""
    found = []
    for name, tensor in tensors.items():
        for prefix in engine.layer:
            if name.startswith(prefix):
                name = OURS + name.removeprefix(prefix)
        found.append((name, tensor))
    return found


def _said(files: Files, engine: Engine, reading: Reading) -> list[str]:
    """Where the captured layers and the settings come from."""
    values, unsaid = reading.values, reading.unsaid
    source = (
        f"{engine.title}'s default: the files name none" if "target_layers" in unsaid else f"as {engine.title} reads"
    )
    lines = [f"captured layers, by output: {list(values['target_layers'])} ({source})"]
    lines += [
        f"{theirs} {values[ours]} ({engine.title}'s default: the files do not say)"
        for ours, theirs, _ in FIELDS
        if ours in unsaid and theirs not in FLAGS
    ]
    flags = ", ".join(f"{flag} {'not said, so ' if flag in unsaid else ''}{values[flag]}" for flag in FLAGS)
    ignored = [f"{flag}, which {engine.title} ignores" for flag in FLAGS if files.config.get(flag) and not values[flag]]
    return [*lines, "; ".join([flags, *ignored])]


def _take_embedding(engine: Engine, path: Path, tensors: dict[str, Tensor], target: TargetFiles) -> list[str]:
    """The embedding is the target's; another one cannot be kept."""
    own = tensors.pop(EMBEDDING, None)
    if own is None:
        return ["the embedding is the target's: the files hold none"]
    if not engine.own_embedding:
        return [f"the embedding is the target's, as in {engine.title}: the files' own is left out"]
    theirs = target.embedding
    if own.shape != theirs.shape or not torch.equal(own, theirs.to(own.dtype)):
        raise _refusal(path, f"its {EMBEDDING}, which {engine.title} would use, is not the target's")
    return ["the embedding is the target's, and the files' own is equal to it"]


def _take_lm_head(
    engine: Engine, path: Path, files: Files, config: DraftConfig, tensors: dict[str, Tensor], target: TargetFiles
) -> list[str]:
    """The LM head; that of the target where the engine would take it."""
    if "lm_head.weight" in tensors:
        return []
    shared = engine is ENGINES["trtllm"] or (engine is ENGINES["sglang"] and not files.config.get("draft_vocab_size"))
    if not shared or config.draft_vocab_size < config.vocab_size:
        raise _refusal(path, f"there is no lm_head.weight, {engine.lm_head}")
    tensors["lm_head.weight"] = target.lm_head
    return [f"the LM head is the target's, as in {engine.title}: the files hold none"]


def _take_vocabulary(path: Path, config: DraftConfig, tensors: dict[str, Tensor]) -> Tensor | None:
    """The target ids of the draft vocabulary, ascending; rows of ``lm_head`` are put into the same order."""
    offsets, chosen = tensors.pop("d2t", None), tensors.pop("t2d", None)
    size, rows = config.draft_vocab_size, len(tensors["lm_head.weight"])
    if rows != size:
        raise _refusal(path, f"its lm_head has {rows:,} rows, and its {CONFIG} a draft vocabulary of {size:,}")
    if offsets is None and size == config.vocab_size:
        return None
    if offsets is None:
        raise _refusal(path, f"there is no d2t, and its draft vocabulary is {size:,} of {config.vocab_size:,}")
    if offsets.is_floating_point() or offsets.shape != (size,):
        raise _refusal(path, f"its d2t is {offsets.dtype} {list(offsets.shape)}, and must be whole numbers [{size}]")
    ids = offsets.long() + torch.arange(size)
    if ids.min() < 0 or ids.max() >= config.vocab_size or len(ids.unique()) < size:
        problem = "its d2t, as offsets, leads outside the vocabulary or twice to one token"
        raise UserError("HEAD", path, problem, "let its trainer write target id - draft id")
    if chosen is not None and not torch.equal(chosen.nonzero()[:, 0], ids.sort().values):
        raise _refusal(path, "its d2t and t2d name different parts of the vocabulary")
    order = ids.argsort()
    tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
    return None if size == config.vocab_size else ids[order]


def _refusal(path: Path, problem: str) -> UserError:
    return UserError("HEAD", path, problem, "check --format, and that it is a head of one layer for this target")
