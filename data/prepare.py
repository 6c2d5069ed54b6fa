"""Stage 1: choose the prompts, deal them evenly over their sources, and say what was left out.

    eagle3 prepare configs/demo.yaml
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..configs.errors import UserError
from ..configs.settings import PrepareSettings, Settings
from ..configs.signals import StopRequest
from .chat import prompt_ids, tokenizer_hash
from .conversations import SPLITS, Conversation, Prompts, library_prompts, load_prompts
from .corpus import digest
from .files import encode_json, encode_line, file_sha256, remove_temporaries, write_atomic
from .progress import Progress
from .stage import Json, Stage

LIBRARY = "stdlib"
TOO_LONG = "conversations: prompt longer than prepare.max_prompt_tokens"
NOT_NEEDED = "conversations: more than were asked for"


def prepare(settings: Settings, run_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write ``conversations/prompts.jsonl`` and ``conversations/summary.json``, and print the summary.

    Args:
        settings: the recipe.
        run_dir: the run's folder.
        tokenizer: the target's, which measures the prompts.

    Raises:
        UserError: malformed prompts, a split without any, or a run begun with other settings.
        Interrupted: a signal came; nothing is lost, since the stage takes seconds.
    """
    folder = run_dir / "conversations"
    stage = Stage("prepare", run_dir, folder, _inputs(settings.prepare, tokenizer))
    summary = folder / "summary.json"
    if not (stage.begun() and (folder / "prompts.jsonl").exists() and summary.exists()):
        with StopRequest(stage.resume) as stop:
            prompts = library_prompts() if settings.prepare.prompts == LIBRARY else load_prompts(_path(settings.prepare))
            stop.check("the prompts are read")
            kept = _choose(prompts, settings.prepare, lambda c: len(prompt_ids(tokenizer, c)))
            stop.check("the prompts are chosen")
            stage.begin()
            remove_temporaries(folder)
            write_atomic(folder / "prompts.jsonl", b"".join(encode_line(c._asdict()) for c in kept))
            write_atomic(summary, encode_json(_summary(settings.prepare, kept, prompts.notes)))
    print(render(json.loads(summary.read_bytes())))


def prepared(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    folder = run_dir / "conversations"
    stage = Stage("prepare", run_dir, folder, _settings_inputs(settings.prepare))
    return stage.begun() and (folder / "prompts.jsonl").exists() and (folder / "summary.json").exists()


def render(summary: dict[str, Json]) -> str:
    """The summary as the lines that a person reads."""
    lines = [f"prompts from {summary['prompts']}"]
    for split in SPLITS:
        by_source = summary["kept"][split]
        listed = ", ".join(f"{source} {count:,}" for source, count in by_source.items())
        lines.append(f"  {split:<10} {sum(by_source.values()):>7,} of {summary['asked'][split]:,} asked for ({listed})")
    lines += [f"  left out or cut, {reason}: {count:,}" for reason, count in summary["notes"].items()]
    return "\n".join(lines)


def deal(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """Yield conversations of each source in turn, each source in the order of a hash of its ids, until all are dealt."""
    by_source: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_source.setdefault(conversation.source, []).append(conversation)
    hands = deque(iter(sorted(by_source[source], key=_order)) for source in sorted(by_source))
    while hands:
        hand = hands.popleft()
        conversation = next(hand, None)
        if conversation is not None:
            hands.append(hand)
            yield conversation


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


def _summary(settings: PrepareSettings, kept: list[Conversation], notes: Counter[str]) -> dict[str, Json]:
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
        "prepare.prompts": settings.prompts if settings.prompts == LIBRARY else file_sha256(_path(settings)),
        **{f"prepare.{split}": count for split, count in _asked(settings).items()},
        "prepare.max_prompt_tokens": settings.max_prompt_tokens,
    }


def _path(settings: PrepareSettings) -> Path:
    path = Path(settings.prompts)
    if not path.is_file():
        raise UserError("prepare.prompts", settings.prompts, "there is no such file", f'give a JSONL file or "{LIBRARY}"')
    return path


def _order(conversation: Conversation) -> int:
    return digest(f"order:{conversation.id}")
