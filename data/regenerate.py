"""Stage 2: the target answers the prompts itself, so that the draft learns what the target says and not what people said.

    eagle3 regenerate configs/tiny.yaml

Training answers are sampled at mixed temperatures; validation and test answers are greedy. Batches are planned from the
prompts alone and every answer has its own stream of random numbers, so a resumed run says the same as an uninterrupted one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..configs.settings import Settings
from ..configs.signals import StopRequest
from ..models.target import Target
from .chat import prompt_ids
from .conversations import Answer, Conversation, read_answers, read_conversations
from .corpus import digest
from .files import encode_line, file_sha256
from .progress import Progress
from .stage import Json, Stage


class Question(NamedTuple):
    """A conversation to be answered: its ids, and the temperature of its answer."""

    conversation: Conversation
    prompt_ids: list[int]
    temperature: float


def regenerate(settings: Settings, run_dir: Path, target: Target) -> None:
    """Write ``conversations/answers.jsonl``, one batch of answers after another.

    Raises:
        UserError: the run was begun with other settings, or there are no prompts.
        Interrupted: a signal came; the finished batches are kept.
    """
    folder = run_dir / "conversations"
    stage = Stage("regenerate", run_dir, folder, _inputs(settings, folder, target))
    stage.begin()
    path = folder / "answers.jsonl"
    drop_torn_line(path)
    answered = {answer.id for answer in read_answers(path)} if path.exists() else set()
    questions = ask(settings, read_conversations(folder / "prompts.jsonl"), target)
    batches = plan(questions, settings.regenerate.batch_size)
    progress = Progress("regenerate", "answers", len(questions), len(answered))
    with StopRequest(stage.resume) as stop, path.open("ab") as file:
        for batch in batches:
            missing = [question for question in batch if question.conversation.id not in answered]
            if not missing:
                continue
            answers = _answer(settings, target, batch)
            file.write(b"".join(encode_line(a._asdict()) for a in answers if a.id not in answered))
            file.flush()
            os.fsync(file.fileno())
            answered |= {answer.id for answer in answers}
            progress.advance(len(missing), sum(len(answer.answer_ids) for answer in answers))
            stop.check(f"{len(answered)} of {len(questions)} answers are written")


def ask(settings: Settings, conversations: list[Conversation], target: Target) -> list[Question]:
    """The questions in the order of the prompts; temperatures are dealt to training questions in turn."""
    heats = settings.regenerate.temperatures
    training = 0
    questions = []
    for conversation in conversations:
        temperature = 0.0
        if conversation.split == "train":
            temperature = heats[training % len(heats)]
            training += 1
        questions.append(Question(conversation, prompt_ids(target.tokenizer, conversation), temperature))
    return questions


def plan(questions: list[Question], batch_size: int) -> list[list[Question]]:
    """Batches of prompts of similar length, the same whatever was answered before."""
    ordered = sorted(questions, key=lambda question: (len(question.prompt_ids), question.conversation.id))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed writer did not finish."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)


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


def _inputs(settings: Settings, folder: Path, target: Target) -> dict[str, Json]:
    return {
        "target.path": target.info.name,
        "target.dtype": target.info.dtype,
        "weights of the target": target.info.weights_sha256,
        "conversations/prompts.jsonl": file_sha256(folder / "prompts.jsonl"),
        "regenerate.temperatures": list(settings.regenerate.temperatures),
        "regenerate.max_new_tokens": settings.regenerate.max_new_tokens,
        "regenerate.batch_size": settings.regenerate.batch_size,
        "run.seed": settings.run.seed,
    }
