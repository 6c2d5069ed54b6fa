"""Stage 1: choose the prompts, deal them evenly over their sources, and say what was left out.

    eagle3 prepare configs/tiny.yaml prepare.prompts=questions.jsonl
    eagle3 prepare configs/tiny.yaml prepare.prompts=HuggingFaceH4/ultrachat_200k prepare.hub_split=train_sft \\
        prepare.column=messages

However many rows there are, they pass by once, and no more are held than are chosen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from ..configs.errors import UserError
from ..configs.settings import PrepareSettings, Settings
from ..configs.signals import StopRequest
from .chat import TemplateRefusal, left_out, prompt_ids, tokenizer_hash
from .choice import Choice
from .conversations import SPLITS, Conversation, Found
from .files import encode_json, encode_line, remove_temporaries, write_atomic
from .progress import Progress
from .prompts import library_prompts, read_prompts
from .sources import Row, fingerprint, rows
from .stage import Json, Stage, at_least

LIBRARY = "stdlib"
PROMPTS, SUMMARY = "prompts.jsonl", "summary.json"
TOO_LONG = "conversations: prompt longer than prepare.max_prompt_tokens"
TEMPLATE = "conversations: the target's chat template refuses them"
LEFT_OUT = "conversations: the target's chat template leaves out"


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
        Interrupted: a signal came; nothing is written, and the stage begins anew.
    """
    chosen = settings.prepare
    for split, least in (("train", 1), ("validation", 1), ("test", 0)):
        at_least(f"prepare.{split}", _asked(chosen)[split], least)
    folder = run_dir / "conversations"
    stage = Stage("prepare", run_dir, folder, _inputs(chosen, tokenizer))
    with StopRequest(stage.resume) as stop:
        if not _whole(stage):
            notes: Counter[str] = Counter()
            kept = _choose(chosen, tokenizer, notes, stop)
            stage.begin()  # only now: prompts that were refused shall not tie the run to them
            remove_temporaries(folder)
            write_atomic(folder / PROMPTS, b"".join(encode_line(c._asdict()) for c in kept))
            write_atomic(folder / SUMMARY, encode_json(_summary(chosen, kept, notes)))
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


def _choose(
    settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase, notes: Counter[str], stop: StopRequest
) -> list[Conversation]:
    """The conversations of each split that are asked for and short enough, in the order of a hash of their ids."""
    asked = _asked(settings)
    choice = Choice(asked, partial(_refusal, tokenizer, settings.max_prompt_tokens), notes)
    for found in _found(settings, notes, stop):
        choice.offer(found)
    chosen = choice.chosen()
    for split, count in asked.items():
        if count and all(conversation.split != split for conversation in chosen):
            left_out = ", ".join(f"{reason}: {number:,}" for reason, number in sorted((+notes).items()))
            problem = (
                f"{settings.prompts} has no short enough prompt in this split ({left_out or 'it has none at all'})"
            )
            raise UserError(f"prepare.{split}", count, problem, "add rows to it, or raise prepare.max_prompt_tokens")
    return chosen


def _found(settings: PrepareSettings, notes: Counter[str], stop: StopRequest) -> Iterator[Found]:
    if settings.prompts == LIBRARY:
        yield from library_prompts(notes)
        stop.check("the prompts are not chosen yet")
    else:
        yield from read_prompts(settings, _counted(rows(settings), stop), notes)


def _counted(found: Iterable[Row], stop: StopRequest) -> Iterator[Row]:
    """The same rows, saying now and then how many there were."""
    progress = Progress("prepare", "rows", None)
    for row in found:
        yield row
        progress.advance(1, 0)
        stop.check("the prompts are not chosen yet")
    progress.finish()


def _refusal(tokenizer: PreTrainedTokenizerBase, longest: int, conversation: Conversation) -> str | None:
    """Why the target is not asked this."""
    try:
        if what := left_out(tokenizer, conversation):
            return f"{LEFT_OUT} {what}"
        tokens = len(prompt_ids(tokenizer, conversation))
    except TemplateRefusal as refusal:
        return f"{TEMPLATE} ({refusal.reason})"
    tokens += sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in conversation.follow_ups)
    return TOO_LONG if tokens > longest else None


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
        **({"prepare.prompts": LIBRARY} if settings.prompts == LIBRARY else fingerprint(settings)),
        **{f"prepare.{split}": count for split, count in _asked(settings).items()},
        "prepare.max_prompt_tokens": settings.max_prompt_tokens,
    }


def _whole(stage: Stage) -> bool:
    return stage.begun() and (stage.folder / PROMPTS).exists() and (stage.folder / SUMMARY).exists()
