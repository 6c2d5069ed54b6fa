"""What a run will cost, before anything of it starts: tokens, disk, memory, hours.

    eagle3 plan maverick --tokens-per-s 5000 --train-tokens-per-s 20000

Of the target only the configuration is read, and for conversations of several turns its tokenizer. Tokens are those of
the store, or of the answers, where the run has them already; else as many as the recipe's limits allow, and the output
says so. Bytes follow from tokens. A speed is what the user measured: none is made up.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ..configs.errors import UserError
from ..configs.settings import RecordSettings, Settings
from ..models import costs, kernels
from ..models.draft import DraftConfig
from ..models.memory import Micro, Numbers, memory, states
from ..models.shapes import TargetShape, draft_config
from ..models.target_files import read_shape
from .files import encode_json
from .plan_tokens import Tokens, count_tokens
from .units import in_bytes
from .vocabulary import check_draft_size

BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
SCALE = 4  # bytes beside a token's float8 states, for each layer
TOKEN = 5  # bytes of its id and its place in the loss mask
TEXT = 5  # bytes of a prompt's token as text, with its share of what stands around it
STORED = (("bfloat16", "bfloat16"), ("float8_e4m3fn", "bfloat16"), ("float8_e4m3fn", "float8_e4m3fn"))
#: Bytes a parameter: bfloat16 weights, float32 ones, AdamW's two moments; 12 without DeepSpeed. Muon has one of a matrix.
CHECKPOINT = {"adamw": 14, "muon": 8}
OPTIONS = {
    "regenerate": "--answer-tokens-per-s",
    "record": "--tokens-per-s",
    "train": "--train-tokens-per-s",
}
STAGES = (None, 0, 1, 2, 3)  # ZeRO's, None: without DeepSpeed
AUTOCAST, HALF, FULL = (4, 2), (2, 2), (4, 4)  # bytes of a number of the head's weights, and of what it computes


class Speeds(NamedTuple):
    """Tokens per second as the user measured them: answers written, tokens recorded, tokens trained on."""

    regenerate: float | None
    record: float | None
    train: float | None


@dataclass(frozen=True)
class Plan:
    """Counts, bytes and hours; ``store`` by dtype of features and last hidden state, ``memory`` by GPU."""

    run: str
    target: TargetShape
    head: dict[str, int]
    tokens: dict[str, int | bool | str]
    store_bytes_per_token: dict[str, int]
    store_bytes: dict[str, int]
    stored_as: str
    disk: dict[str, int]
    gpus: int
    memory: dict[str, int]
    training_memory: dict[str, dict[str, int]]
    hours: dict[str, float | None]
    warnings: list[str]


def make_plan(settings: Settings, speeds: Speeds, gpus: int) -> Plan:
    """The plan of a recipe.

    Args:
        settings: the recipe.
        speeds: what is known of them.
        gpus: those over which the target is spread, and those that train.

    Raises:
        UserError: the target's configuration cannot be read, or the recipe does not suit it.
    """
    _check_options(speeds, gpus)
    folder = Path(settings.run.root) / settings.run.name
    shape = read_shape(settings.target)
    check_draft_size(settings.draft.vocab_size, shape.vocab_size)
    config = draft_config(settings.draft, asdict(shape))
    tokens = count_tokens(settings, folder, shape.max_positions)
    stored_as, per_token = _stored(settings.record, shape)
    store = {name: _store_bytes(settings, shape, tokens, size) for name, size in per_token.items()}
    disk = _disk(settings, folder, config, tokens, store[stored_as])
    return Plan(
        run=str(folder),
        target=shape,
        head={
            "parameters": costs.parameters(config),
            "parameters_per_step": costs.step_parameters(config),
            "flop_per_token": costs.training_flop(config, settings.train.ttt_steps),
            "teacher_flop_per_token": costs.teacher_flop(config),
        },
        tokens=tokens._asdict() | {"trained": tokens.trained * settings.train.epochs},
        store_bytes_per_token=per_token,
        store_bytes=store,
        stored_as=stored_as,
        disk=disk,
        gpus=gpus,
        memory=_memory(settings, shape, tokens.longest, gpus),
        training_memory=_training_memory(settings, config, tokens, per_token[stored_as], gpus),
        hours={
            "regenerate": _hours(tokens.answer - tokens.given, speeds.regenerate),
            "record": _hours(tokens.all, speeds.record),
            "train": _hours(tokens.trained * settings.train.epochs, speeds.train),
        },
        warnings=_warnings(settings, disk),
    )


def bytes_per_token(shape: TargetShape, features: str, last_hidden: str) -> int:
    """Bytes of a token's recorded states; its id and mask take ``TOKEN`` more."""
    kinds = [features] * len(shape.layers) + [last_hidden]
    return sum(shape.hidden_size * BYTES[kind] + (SCALE if kind == "float8_e4m3fn" else 0) for kind in kinds)


def _stored(chosen: RecordSettings, shape: TargetShape) -> tuple[str, dict[str, int]]:
    """The recipe's choice, and bytes per token of it and of every other."""
    names = {
        pair: pair[0] if pair[0] == pair[1] else f"features {pair[0]}, last {pair[1]}"
        for pair in dict.fromkeys((*STORED, (chosen.features_dtype, chosen.last_hidden_dtype)))
    }
    sizes = {name: bytes_per_token(shape, *pair) for pair, name in names.items()}
    return names[chosen.features_dtype, chosen.last_hidden_dtype], sizes


def _store_bytes(settings: Settings, shape: TargetShape, tokens: Tokens, states: int) -> int:
    ends = 2 * shape.vocab_size * shape.hidden_size * BYTES[settings.target.dtype]
    kept, limit = tokens.all, settings.record.spool_shards
    if limit is not None:  # held-out ones stay, and as many training ones as the spool has room for
        kept -= max(0, tokens.trained - limit * settings.record.shard_tokens)
    return kept * (states + TOKEN) + ends


def _disk(settings: Settings, folder: Path, config: DraftConfig, tokens: Tokens, store: int) -> dict[str, int]:
    """What the run will take, what of it is there, and what the disk has left."""
    count, existing = costs.parameters(config), next(path for path in (folder, *folder.parents) if path.exists())
    needed = {
        # The prompts as text, and all ids with a comma and a space.
        "conversations": tokens.prompt * TEXT + tokens.all * (len(str(config.vocab_size)) + 2),
        "store": store,
        "checkpoints": (settings.train.keep_checkpoints + 1)
        * CHECKPOINT[settings.train.optimizer]
        * count,  # the oldest goes after the newest came
        "best head": 2 * BYTES["bfloat16"] * count,  # the old one goes after the new one came
    }
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free
    return needed | {"all": sum(needed.values()), "there": there, "free": free}


def _memory(settings: Settings, shape: TargetShape, longest: int, gpus: int) -> dict[str, int]:
    """Bytes on each GPU while the target answers and is recorded: its weights, and what we ask of it."""
    width = BYTES[settings.target.dtype]
    weights = shape.parameters * width // gpus
    pairs = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * width
    batch = max(settings.record.batch_tokens, longest)  # a longer conversation is a batch of its own
    captured = batch * shape.hidden_size * (2 * len(shape.layers) + 1) * width
    return {
        "weights": weights,
        "regenerate": weights + settings.regenerate.batch_size * longest * pairs // gpus,
        "record": weights + captured,
    }


def _training_memory(
    settings: Settings, config: DraftConfig, tokens: Tokens, stored: int, gpus: int
) -> dict[str, dict[str, int]]:
    """Bytes on each GPU while the head is trained, by what trains it and purpose; last of a process on a CPU.

    Where answers are measured, their share of a micro-batch is; else every token of it may be an answer's.
    """
    share = tokens.answer / max(1, tokens.all) if tokens.measured else 1.0
    batch = max(settings.train.batch_tokens // (gpus * settings.train.accumulation), tokens.longest)
    length = round(tokens.most_said / share)  # of a sample with the longest answers and that share
    rows = (round(batch * share),) * settings.train.ttt_steps
    micro = Micro(batch, rows, math.ceil(batch / length), length, tokens.most_said)
    recorded = settings.record.features_dtype, settings.record.last_hidden_dtype
    read, ends = max(BYTES[name] for name in (*recorded, "bfloat16")), BYTES[settings.target.dtype]
    accumulating = settings.train.accumulation > 1
    found = {}
    optimizer = settings.train.optimizer
    for stage in STAGES if optimizer == "adamw" else (None,):  # Muon is not for DeepSpeed's shards
        fused = stage != 3 and kernels.fits(config.head_dim)  # what else they refuse, no recipe asks for
        held, numbers = (
            states(config, optimizer, stage, gpus),
            Numbers(*(AUTOCAST if stage is None else HALF), read, ends),
        )
        name = "bfloat16, no DeepSpeed" if stage is None else f"bfloat16, ZeRO-{stage}"
        found[f"{name}, {'kernels' if fused else 'plain'}"] = memory(
            config, micro, held, numbers, fused, 0, accumulating
        )
    beside = TOKEN - 1 + (stored if "float8_e4m3fn" in recorded else 0)
    held, numbers = states(config, optimizer, None, 1, cpu=True), Numbers(*FULL, read, BYTES["float32"])
    found["float32 on a CPU, plain"] = memory(config, micro, held, numbers, False, beside, accumulating)
    return found


def _hours(tokens: int, speed: float | None) -> float | None:
    return None if speed is None else tokens / speed / 3600


def _warnings(settings: Settings, disk: dict[str, int]) -> list[str]:
    missing = disk["all"] - disk["there"] - disk["free"]
    if missing <= 0:
        return []
    return [f"the disk of run.root = {settings.run.root} is too small by {in_bytes(missing)}"]


def _check_options(speeds: Speeds, gpus: int) -> None:
    for stage, speed in speeds._asdict().items():
        if speed is not None and not 0 < speed < math.inf:
            raise UserError(OPTIONS[stage], speed, "it is no speed", "give a number of tokens a second, more than 0")
    if gpus < 1:
        raise UserError("--gpus", gpus, "it is too small", "give at least 1")


def to_json(plan: Plan) -> str:
    """The plan with every number in full: bytes, FLOP and hours."""
    return encode_json(asdict(plan)).decode().rstrip()
