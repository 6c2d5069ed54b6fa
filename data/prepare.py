"""Stage 1: choose the prompts, deal them evenly over their sources, and say what was left out.

eagle3 prepare configs/tiny.yaml
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from ..configs.errors import UserError
from ..configs.settings import PrepareSettings, Settings
from ..configs.signals import StopRequest
from .chat import prompt_ids, tokenizer_hash
from .conversations import SPLITS, Conversation, Prompts, library_prompts, load_prompts
from .corpus import digest
from .files import encode_json, encode_line, file_sha256, remove_temporaries, write_atomic
from .progress import Progress
from .stage import Json, Stage, at_least

LIBRARY = "stdlib"
PROMPTS, SUMMARY = "prompts.jsonl", "summary.json"
TOO_LONG = "conversations: prompt longer than prepare.max_prompt_tokens"
NOT_NEEDED = "conversations: more than were asked for"


class Summary(TypedDict):
    """``conversations/summary.json``: prompts asked for, prompts kept by split and source, and what was left out."""

    prompts: str
    asked: dict[str, int]
    kept: dict[str, dict[str, int]]
    notes: dict[str, int]


def prepare(settings: Settings, run_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write ``conversations/prompts.jsonl`` and ``conversations/summary.json``, and print the summary.

    Args:
        settings: the recipe.
        run_dir: the run's folder.
        tokenizer: the target's, which measures the prompts.

    Raises:
        UserError: malformed prompts, a split without any, a folder that cannot be written, or a run begun with other
            settings.
        Interrupted: a signal came; nothing is lost, since the stage takes seconds.
    """
    chosen = settings.prepare
    for split, least in (("train", 1), ("validation", 1), ("test", 0)):
        at_least(f"prepare.{split}", _asked(chosen)[split], least)
    folder = run_dir / "conversations"
    stage = Stage("prepare", run_dir, folder, _inputs(chosen, tokenizer))
    with StopRequest(stage.resume) as stop:
        if not _whole(stage):
            prompts = library_prompts() if chosen.prompts == LIBRARY else load_prompts(Path(chosen.prompts))
            stop.check("the prompts are read")
            kept = _choose(prompts, chosen, lambda c: len(prompt_ids(tokenizer, c)))
            stop.check("the prompts are chosen")
            stage.begin()  # only now: prompts that were refused shall not tie the run to them
            remove_temporaries(folder)
            write_atomic(folder / PROMPTS, b"".join(encode_line(c._asdict()) for c in kept))
            write_atomic(folder / SUMMARY, encode_json(_summary(chosen, kept, prompts.notes)))
    print(render(json.loads((folder / SUMMARY).read_bytes())), flush=True)


def prepared(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    return _whole(Stage("prepare", run_dir, run_dir / "conversations", _settings_inputs(settings.prepare)))


def render(summary: Summary) -> str:
    """The summary as the lines that a person reads."""
    lines = [f"prompts from {summary['prompts']}"]
    for split in SPLITS:
        by_source = summary["kept"][split]
        listed = ", ".join(f"{source} {count:,}" for source, count in by_source.items())
        lines.append(f"  {split:<10} {sum(by_source.values()):>7,} of {summary['asked'][split]:,} asked for ({listed})")
    lines += [f"  left out or cut, {reason}: {count:,}" for reason, count in summary["notes"].items()]
    return "\n".join(lines)


def deal(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """Yield conversations of each source in turn, those of a source in the order of a hash of their ids."""
    by_source: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_source.setdefault(conversation.source, []).append(conversation)
    hands = deque(iter(sorted(by_source[source], key=_order)) for source in sorted(by_source))
    while hands:
        hand = hands.popleft()
        if (dealt := next(hand, None)) is not None:
            hands.append(hand)
            yield dealt


def _choose(prompts: Prompts, settings: PrepareSettings, length: Callable[[Conversation], int]) -> list[Conversation]:
    """The conversations of each split that are asked for and short enough, in the order of a hash of their ids."""
    asked = _asked(settings)
    progress = Progress("prepare", "prompts", sum(asked.values()))
    chosen: list[Conversation] = []
    for split in SPLITS:
        found = [conversation for conversation in prompts.conversations if conversation.split == split]
        kept: list[Conversation] = []
        hands, looked_at = deal(found), 0
        while len(kept) < asked[split] and (conversation := next(hands, None)) is not None:
            looked_at += 1
            tokens = length(conversation)
            if tokens > settings.max_prompt_tokens:
                prompts.notes[TOO_LONG] += 1
            else:
                kept.append(conversation)
                progress.advance(1, tokens)
        prompts.notes[NOT_NEEDED] += len(found) - looked_at
        if asked[split] and not kept:
            raise UserError(
                f"prepare.{split}", asked[split], f"{settings.prompts} has no short enough prompt in this split",
                f'add lines with "split": "{split}", or raise prepare.max_prompt_tokens',
            )  # fmt: skip
        chosen += sorted(kept, key=_order)
    return chosen


def _summary(settings: PrepareSettings, kept: list[Conversation], notes: Counter[str]) -> Summary:
    by_split = {split: Counter(c.source for c in kept if c.split == split) for split in SPLITS}
    return {
        "prompts": settings.prompts,
        "asked": _asked(settings),
        "kept": {split: dict(sorted(counts.items())) for split, counts in by_split.items()},
        "notes": dict(sorted((+notes).items())),
    }


def _asked(settings: PrepareSettings) -> dict[str, int]:
    return {"train": settings.train, "validation": settings.validation, "test": settings.test}


def _inputs(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Json]:
    hashes = tokenizer_hash(tokenizer)
    return {
        **_settings_inputs(settings),
        "tokenizer of the target": hashes.tokenizer,
        "chat template of the target": hashes.chat_template,
    }


def _settings_inputs(settings: PrepareSettings) -> dict[str, Json]:
    return {
        "prepare.prompts": LIBRARY if settings.prompts == LIBRARY else _file_hash(Path(settings.prompts)),
        **{f"prepare.{split}": count for split, count in _asked(settings).items()},
        "prepare.max_prompt_tokens": settings.max_prompt_tokens,
    }


def _file_hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        problem = f"it cannot be read ({error.strerror})"
        raise UserError("prepare.prompts", path, problem, f'give a JSONL file or "{LIBRARY}"') from None


def _whole(stage: Stage) -> bool:
    return stage.begun() and (stage.folder / PROMPTS).exists() and (stage.folder / SUMMARY).exists()


def _order(conversation: Conversation) -> int:
    return digest(f"order:{conversation.id}")
