"""What a run will cost, before anything of it starts: tokens, disk, memory, hours.

    eagle3 plan maverick --tokens-per-s 5000 --train-tokens-per-s 20000

Only the target's configuration is read. Tokens are those of the store, or of the answers, where the run has them
already; else as many as the recipe's limits allow, and the output says so. Bytes follow from tokens. A speed is what the
user measured: none is made up.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ..configs.errors import UserError
from ..configs.settings import RecordSettings, Settings
from ..models import costs
from ..models.costs import Micro
from ..models.draft import DraftConfig
from ..models.shapes import TargetShape, draft_config
from ..models.target_files import read_shape
from .files import encode_json
from .store import MANIFEST, read_manifest
from .units import in_bytes
from .vocabulary import check_draft_size

BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
SCALE = 4  # bytes beside a token's float8 states, for each layer
TOKEN = 5  # bytes of its id and its place in the loss mask
STORED = (("bfloat16", "bfloat16"), ("float8_e4m3fn", "bfloat16"), ("float8_e4m3fn", "float8_e4m3fn"))
CHECKPOINT = 14  # bytes a parameter: bfloat16 weights, float32 ones, AdamW's two moments; 12 without DeepSpeed
OPTIONS = {
    "regenerate": "--answer-tokens-per-s",
    "record": "--tokens-per-s",
    "train": "--train-tokens-per-s",
}
STAGES = (None, 0, 1, 2, 3)  # ZeRO's, None: without DeepSpeed


class Speeds(NamedTuple):
    """Tokens per second as the user measured them: answers written, tokens recorded, tokens trained on."""

    regenerate: float | None
    record: float | None
    train: float | None


class Tokens(NamedTuple):
    """``conversations``, ``training`` ones among them, tokens of all; whether and where the tokens were counted.

    The target need not write the ``given`` ones of the answers' tokens.
    """

    conversations: int
    training: int
    prompt: int
    answer: int
    given: int
    measured: bool
    origin: str

    @property
    def all(self) -> int:
        return self.prompt + self.answer

    @property
    def trained(self) -> int:
        """Tokens of training conversations, taken to be as long as the others."""
        return self.all * self.training // max(1, self.conversations)


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
    tokens = count_tokens(settings, folder)
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
        tokens=tokens._asdict() | {"all": tokens.all, "trained": tokens.trained * settings.train.epochs},
        store_bytes_per_token=per_token,
        store_bytes=store,
        stored_as=stored_as,
        disk=disk,
        gpus=gpus,
        memory=_memory(settings, shape, gpus),
        training_memory=_training_memory(settings, config, tokens, per_token[stored_as], gpus),
        hours={
            "regenerate": _hours(tokens.answer - tokens.given, speeds.regenerate),
            "record": _hours(tokens.all, speeds.record),
            "train": _hours(tokens.trained * settings.train.epochs, speeds.train),
        },
        warnings=_warnings(settings, disk),
    )


def count_tokens(settings: Settings, folder: Path) -> Tokens:
    """What the run's store or answers hold; else its prompts, or the recipe's, each as long as the recipe allows."""
    asked, origin = settings.prepare, "the recipe's counts"
    training, conversations = asked.train, asked.train + asked.validation + asked.test
    answers = {"asked": conversations, "given": 0}
    chosen, answered = folder / "conversations" / "summary.json", folder / "conversations" / "answers.summary.json"
    if chosen.exists():
        summary = json.loads(chosen.read_bytes())
        kept = {split: sum(counts.values()) for split, counts in summary["kept"].items()}
        training, conversations, origin = kept["train"], sum(kept.values()), "the chosen prompts"
        answers = summary["answers"]
    prompt, said = conversations * asked.max_prompt_tokens, sum(answers.values()) * settings.regenerate.max_new_tokens
    measured = True
    if (folder / "store" / MANIFEST).exists():
        manifest, origin = read_manifest(folder / "store"), "the recorded store"
        conversations, said = manifest.samples, manifest.supervised_tokens
        prompt = manifest.tokens - said
    elif answered.exists():
        found, origin = json.loads(answered.read_bytes()), "the answers"
        conversations, prompt, said = found["answers"], found["prompt_tokens"], found["answer_tokens"]
    else:
        measured = False
    given = said * answers["given"] // max(1, sum(answers.values()))
    return Tokens(conversations, training, prompt, said, given, measured, origin)


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
    return tokens.all * (states + TOKEN) + ends


def _disk(settings: Settings, folder: Path, config: DraftConfig, tokens: Tokens, store: int) -> dict[str, int]:
    """What the run will take, what of it is there, and what the disk has left."""
    count, existing = costs.parameters(config), next(path for path in (folder, *folder.parents) if path.exists())
    needed = {
        "conversations": tokens.all * (len(str(config.vocab_size)) + 2),  # ids as text, with a comma and a space
        "store": store,
        "checkpoints": (settings.train.keep_checkpoints + 1)
        * CHECKPOINT
        * count,  # the oldest goes after the newest came
        "best head": 2 * BYTES["bfloat16"] * count,  # the old one goes after the new one came
    }
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free
    return needed | {"all": sum(needed.values()), "there": there, "free": free}


def _memory(settings: Settings, shape: TargetShape, gpus: int) -> dict[str, int]:
    """Bytes on each GPU while the target answers and is recorded: its weights, and what we ask of it."""
    width = BYTES[settings.target.dtype]
    weights = shape.parameters * width // gpus
    longest = settings.prepare.max_prompt_tokens + settings.regenerate.max_new_tokens
    pairs = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * width
    captured = settings.record.batch_tokens * shape.hidden_size * (2 * len(shape.layers) + 1) * width
    return {
        "weights": weights,
        "regenerate": weights + settings.regenerate.batch_size * longest * pairs // gpus,
        "record": weights + captured,
    }


def _training_memory(
    settings: Settings, config: DraftConfig, tokens: Tokens, stored: int, gpus: int
) -> dict[str, dict[str, int]]:
    """Bytes on each GPU while the head is trained, by ZeRO stage and purpose.

    Where answers are measured, their share of a micro-batch is; else every token of it may be an answer's.
    """
    share = tokens.answer / max(1, tokens.all) if tokens.measured else 1.0
    longest = round(settings.regenerate.max_new_tokens / share)  # of a sample with the longest answer and that share
    batch = max(settings.train.batch_tokens // (gpus * settings.train.accumulation), longest)
    micro = Micro(batch, round(batch * share), longest)
    found = {}
    for stage in STAGES:
        width = BYTES["float32" if stage is None else "bfloat16"]
        held = {
            "weights, gradients, optimiser": costs.state_bytes(costs.parameters(config), stage, gpus),
            "the target's ends": costs.constant_bytes(config),
            "batch": costs.batch_bytes(config, micro, stored),
            **costs.activation_bytes(config, micro, settings.train.ttt_steps, width)._asdict(),
        }
        name = "float32, no DeepSpeed" if stage is None else f"bfloat16, ZeRO-{stage}"
        found[name] = held | {"all": sum(held.values())}
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
