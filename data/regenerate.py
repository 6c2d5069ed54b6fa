"""Stage 2: the target answers the prompts itself, so that the draft learns what the target says.

    eagle3 regenerate configs/tiny.yaml

Training answers are sampled at mixed temperatures; validation and test answers are greedy. Batches are planned from the
prompts alone and every answer has its own stream of random numbers, so a resumed run says the same as one that was not
interrupted.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ..configs.errors import UserError
from ..configs.settings import RegenerateSettings, Settings
from ..configs.signals import StopRequest
from ..models.target import Target
from .chat import prompt_ids, tokenizer_hash
from .conversations import Answer, Conversation, read_answers, read_conversations
from .corpus import digest
from .files import (
    drop_torn_line,
    encode_json,
    encode_line,
    exclusive,
    file_sha256,
    remove_temporaries,
    unwritable,
    write_atomic,
)
from .progress import Progress
from .stage import Json, Stage, at_least

ANSWERS, SUMMARY = "answers.jsonl", "answers.summary.json"
WEIGHTS = "weights of the target"


class Question(NamedTuple):
    """A conversation to be answered: its ids, and the temperature of its answer."""

    conversation: Conversation
    prompt_ids: list[int]
    temperature: float


def regenerate(settings: Settings, run_dir: Path, target: Target) -> None:
    """Write ``conversations/answers.jsonl``, one batch of answers after another, and then a summary of it.

    Raises:
        UserError: the run was begun with other settings, there are no prompts, or the target has no room to answer.
        Interrupted: a signal came; the finished batches are kept.
    """
    _validate(settings.regenerate)
    folder = run_dir / "conversations"
    stage = Stage("regenerate", run_dir, folder, _inputs(settings, folder, target))
    with StopRequest(stage.resume) as stop:
        if _whole(stage):
            return
        stage.begin()
        with exclusive(folder / ".regenerate.lock"):
            remove_temporaries(folder)
            questions = ask(settings, read_conversations(folder / "prompts.jsonl"), target)
            _answer_all(settings, folder / ANSWERS, questions, target, stop)
            write_atomic(folder / SUMMARY, encode_json(_summary(folder / ANSWERS)))


def regenerated(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    folder = run_dir / "conversations"
    return _whole(Stage("regenerate", run_dir, folder, _inputs(settings, folder, None)))


def answered_by(target: Target, run_dir: Path) -> None:
    """Refuse answers that this run got from another target; of answers that came from elsewhere nothing is known."""
    folder = run_dir / "conversations"
    Stage("regenerate", run_dir, folder, {WEIGHTS: target.info.weights_sha256}).begun()


def ask(settings: Settings, conversations: list[Conversation], target: Target) -> list[Question]:
    """The questions in the order of the prompts; temperatures are dealt to training questions in turn.

    Raises:
        UserError: an answer may grow beyond the target's positions.
    """
    heats, room = settings.regenerate.temperatures, target.info.max_positions - settings.regenerate.max_new_tokens
    training = 0
    questions = []
    for conversation in conversations:
        temperature = 0.0
        if conversation.split == "train":
            temperature = heats[training % len(heats)]
            training += 1
        ids = prompt_ids(target.tokenizer, conversation)
        if len(ids) > room:
            problem = f"a prompt has {len(ids)} tokens and the target {target.info.max_positions} positions"
            remedy = f"give at most {max(0, target.info.max_positions - len(ids))}, or lower prepare.max_prompt_tokens"
            raise UserError("regenerate.max_new_tokens", settings.regenerate.max_new_tokens, problem, remedy)
        questions.append(Question(conversation, ids, temperature))
    return questions


def plan(questions: list[Question], batch_size: int) -> list[list[Question]]:
    """Batches of prompts of similar length, the same whatever was answered before."""
    ordered = sorted(questions, key=lambda question: (len(question.prompt_ids), question.conversation.id))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _answer_all(settings: Settings, path: Path, questions: list[Question], target: Target, stop: StopRequest) -> None:
    """Append the answers that ``path`` lacks; a batch of which some are there is answered again as it was."""
    if path.exists():
        drop_torn_line(path)
    answered = {answer.id for answer in read_answers(path)} if path.exists() else set()
    progress = Progress("regenerate", "answers", len(questions), len(answered))
    for batch in plan(questions, settings.regenerate.batch_size):
        if answered.issuperset(question.conversation.id for question in batch):
            continue
        new = [answer for answer in _answer(settings, target, batch) if answer.id not in answered]
        _append(path, b"".join(encode_line(answer._asdict()) for answer in new))
        answered |= {answer.id for answer in new}
        progress.advance(len(new), sum(len(answer.answer_ids) for answer in new))
        stop.check(f"{len(answered)} of {len(questions)} answers are written")


def _append(path: Path, lines: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def _answer(settings: Settings, target: Target, batch: list[Question]) -> list[Answer]:
    seeds = [digest(f"answer:{settings.run.seed}:{question.conversation.id}") >> 1 for question in batch]
    generated = target.generate(
        [question.prompt_ids for question in batch],
        [question.temperature for question in batch],
        settings.regenerate.max_new_tokens,
        seeds,
    )
    return [
        Answer(
            id=question.conversation.id,
            source=question.conversation.source,
            split=question.conversation.split,
            temperature=question.temperature,
            prompt_ids=question.prompt_ids,
            answer_ids=answer.ids,
            finish="stop" if answer.finished else "length",
        )
        for question, answer in zip(batch, generated, strict=True)
    ]


def _summary(path: Path) -> dict[str, Json]:
    """What was answered; its ``bytes`` say that the file it describes is the whole one."""
    answers = read_answers(path)
    splits, temperatures = (Counter(a.split for a in answers), Counter(str(a.temperature) for a in answers))
    return {
        "bytes": path.stat().st_size,
        "answers": len(answers),
        "prompt_tokens": sum(len(answer.prompt_ids) for answer in answers),
        "answer_tokens": sum(len(answer.answer_ids) for answer in answers),
        "stopped_by_themselves": sum(answer.finish == "stop" for answer in answers),
        "by_split": dict(sorted(splits.items())),
        "by_temperature": dict(sorted(temperatures.items())),
    }


def _whole(stage: Stage) -> bool:
    answers, summary = stage.folder / ANSWERS, stage.folder / SUMMARY
    if not (stage.begun() and answers.exists() and summary.exists()):
        return False
    return bool(json.loads(summary.read_bytes())["bytes"] == answers.stat().st_size)


def _validate(settings: RegenerateSettings) -> None:
    at_least("regenerate.max_new_tokens", settings.max_new_tokens, 1)
    at_least("regenerate.batch_size", settings.batch_size, 1)
    heats = settings.temperatures
    if not heats or not all(math.isfinite(heat) and heat >= 0.0 for heat in heats):
        problem = "not a list of temperatures"
        raise UserError("regenerate.temperatures", list(heats), problem, "give one or more, each 0 or above")


def _inputs(settings: Settings, folder: Path, target: Target | None) -> dict[str, Json]:
    """What determines the answers; without a target, as much of it as can be told without it."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        raise UserError("conversations", folder, "it holds no prompts", "run eagle3 prepare first")
    inputs: dict[str, Json] = {
        "target.path": settings.target.path,
        "target.revision": settings.target.revision,
        "target.dtype": settings.target.dtype,
        "conversations/prompts.jsonl": file_sha256(prompts),
        "regenerate.temperatures": list(settings.regenerate.temperatures),
        "regenerate.max_new_tokens": settings.regenerate.max_new_tokens,
        "regenerate.batch_size": settings.regenerate.batch_size,
        "run.seed": settings.run.seed,
    }
    if target is not None:
        inputs[WEIGHTS] = target.info.weights_sha256
        inputs["chat template of the target"] = tokenizer_hash(target.tokenizer).chat_template
    return inputs
