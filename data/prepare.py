"""Stage 1: choose the prompts, deal them evenly over their sources, and say what was left out.

    eagle3 prepare configs/tiny.yaml prepare.prompts=questions.jsonl
    eagle3 prepare configs/tiny.yaml prepare.prompts=HuggingFaceH4/ultrachat_200k prepare.hub_split=train_sft \\
        prepare.column=messages

However many rows there are, they pass by once. Those that may be chosen are set aside on disk (:mod:`.spill`); of each
some 400 bytes are held.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypedDict

from ..configs.errors import UserError
from ..configs.settings import PrepareSettings, Settings
from ..configs.signals import StopRequest
from ..models.target import TargetText
from .chat import TemplateRefusal, left_out, prompt_ids, tokenizer_hash
from .choice import Choice
from .conversations import PROMPTS, SPLITS, Conversation, Found, read_conversations
from .files import encode_json, remove_temporaries, write_atomic, write_each
from .given import Keeper
from .messages import Refused
from .progress import Progress
from .prompts import library_prompts, read_prompts
from .sources import Row, fingerprint, rows
from .spill import Spill
from .stage import Json, Stage, at_least

LIBRARY = "stdlib"
SUMMARY = "summary.json"
TOO_LONG = "conversations: prompt longer than prepare.max_prompt_tokens"
TEMPLATE = "conversations: the target's chat template refuses them"
LEFT_OUT = "conversations: the target's chat template leaves out"


class Summary(TypedDict):
    """``conversations/summary.json``: prompts asked for, prompts kept by split and source, and what was left out.

    ``answers``: how many the target is to give, and how many are given.
    """

    prompts: str
    asked: dict[str, int]
    kept: dict[str, dict[str, int]]
    answers: dict[str, int]
    notes: dict[str, int]


def prepare(settings: Settings, run_dir: Path, text: TargetText) -> None:
    """Write ``conversations/prompts.jsonl`` and ``conversations/summary.json``, and print the summary.

    Args:
        settings: the recipe.
        run_dir: the run's folder.
        text: the target's, which measures the prompts, and the answers that are kept.

    Raises:
        UserError: malformed prompts, a split without any, a folder that cannot be written, or a run begun with other
            settings.
        Interrupted: a signal came; nothing is written, and the stage begins anew.
    """
    chosen = settings.prepare
    for split, least in (("train", 1), ("validation", 1), ("test", 0)):
        at_least(f"prepare.{split}", _asked(chosen)[split], least)
    folder = run_dir / "conversations"
    stage = Stage("prepare", run_dir, folder, _inputs(settings, text))
    with StopRequest(stage.resume) as stop:
        if not _whole(stage):
            notes: Counter[str] = Counter()
            refusal = partial(
                _refusal, text, chosen.max_prompt_tokens, Keeper(text, settings.regenerate.max_new_tokens)
            )
            with Spill(folder) as spill:
                kept = _choose(chosen, refusal, notes, spill, stop)
                stage.begin()  # only now: prompts that were refused shall not tie the run to them
                remove_temporaries(folder)
                write_each(folder / PROMPTS, map(spill.line, kept))
            write_atomic(folder / SUMMARY, encode_json(_summary(chosen, folder / PROMPTS, notes)))
    print(render(json.loads((folder / SUMMARY).read_bytes())), flush=True)


def prepared(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    return _whole(Stage("prepare", run_dir, run_dir / "conversations", _settings_inputs(settings)))


def render(summary: Summary) -> str:
    """The summary as the lines that a person reads."""
    lines = [f"prompts from {summary['prompts']}"]
    for split in SPLITS:
        by_source = summary["kept"][split]
        listed = ", ".join(f"{source} {count:,}" for source, count in by_source.items())
        lines.append(f"  {split:<10} {sum(by_source.values()):>7,} of {summary['asked'][split]:,} asked for ({listed})")
    if given := summary["answers"]["given"]:
        lines.append(
            f"  {given:,} answers are kept as they were given, {summary['answers']['asked']:,} are the target's to give"
        )
    lines += [f"  left out or cut, {reason}: {count:,}" for reason, count in summary["notes"].items()]
    return "\n".join(lines)


def _choose(
    settings: PrepareSettings,
    refusal: Callable[[Conversation], str | None],
    notes: Counter[str],
    spill: Spill,
    stop: StopRequest,
) -> list[int]:
    """Where the conversations of each split are that are asked for and short enough, in their order."""
    asked = _asked(settings)
    choice = Choice(asked, refusal, notes, spill)
    for found in _found(settings, notes, stop):
        choice.offer(found)
    chosen = choice.chosen()
    for split, count in asked.items():
        if count and not chosen[split]:
            left_out = ", ".join(f"{reason}: {number:,}" for reason, number in sorted((+notes).items()))
            problem = (
                f"{settings.prompts} has no short enough prompt in this split ({left_out or 'it has none at all'})"
            )
            raise UserError(f"prepare.{split}", count, problem, "add rows to it, or raise prepare.max_prompt_tokens")
    return [place for split in SPLITS for place in chosen[split]]


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


def _refusal(text: TargetText, longest: int, keeper: Keeper, conversation: Conversation) -> str | None:
    """Why the target is not asked this, or why its given answers are not kept."""
    tokenizer = text.tokenizer
    try:
        if what := left_out(tokenizer, conversation):
            return f"{LEFT_OUT} {what}"
        tokens = len(prompt_ids(tokenizer, conversation))
        tokens += sum(len(tokenizer(asked, add_special_tokens=False).input_ids) for asked in conversation.follow_ups)
        if tokens > longest:
            return TOO_LONG
        if conversation.given:
            keeper.answer(conversation)
    except TemplateRefusal as refusal:
        return f"{TEMPLATE} ({refusal.reason})"
    except Refused as refusal:
        return f"conversations: {refusal}"
    return None


def _summary(settings: PrepareSettings, prompts: Path, notes: Counter[str]) -> Summary:
    kept = {split: Counter[str]() for split in SPLITS}
    answers = {"asked": 0, "given": 0}
    for conversation in read_conversations(prompts):
        kept[conversation.split][conversation.source] += 1
        if conversation.given:
            answers["given"] += len(conversation.given)
        else:
            answers["asked"] += 1 + len(conversation.follow_ups)
    return {
        "prompts": settings.prompts,
        "asked": _asked(settings),
        "kept": {split: dict(sorted(counts.items())) for split, counts in kept.items()},
        "answers": answers,
        "notes": dict(sorted((+notes).items())),
    }


def _asked(settings: PrepareSettings) -> dict[str, int]:
    return {"train": settings.train, "validation": settings.validation, "test": settings.test}


def _inputs(settings: Settings, text: TargetText) -> dict[str, Json]:
    hashes = tokenizer_hash(text.tokenizer)
    return {
        **_settings_inputs(settings),
        **({"positions of the target": text.max_positions} if settings.prepare.keep_answers else {}),
        "tokenizer of the target": hashes.tokenizer,
        "chat template of the target": hashes.chat_template,
    }


def _settings_inputs(settings: Settings) -> dict[str, Json]:
    chosen = settings.prepare
    return {
        **({"prepare.prompts": LIBRARY} if chosen.prompts == LIBRARY else fingerprint(chosen)),
        **{f"prepare.{split}": count for split, count in _asked(chosen).items()},
        "prepare.max_prompt_tokens": chosen.max_prompt_tokens,
        "prepare.keep_answers": chosen.keep_answers,
        **({"regenerate.max_new_tokens": settings.regenerate.max_new_tokens} if chosen.keep_answers else {}),
    }


def _whole(stage: Stage) -> bool:
    return stage.begun() and (stage.folder / PROMPTS).exists() and (stage.folder / SUMMARY).exists()
