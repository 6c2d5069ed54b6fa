"""Stage 2: the target answers the prompts itself, so that the draft learns what the target says.

    eagle3 regenerate configs/tiny.yaml
    eagle3 regenerate configs/maverick.yaml regenerate.endpoints=http://node1:8000,http://node2:8000

Training answers are sampled at mixed temperatures; validation and test answers are greedy. Batches are planned from the
prompts alone and every answer has its own stream of random numbers, so a resumed run says the same as one that was not
interrupted. Servers answer in whatever order they like (:mod:`.servers`).

A conversation of several turns is answered turn by turn, each turn's prompt being all ids so far, and written when its
last turn is. Training conversations whose answers the recipe keeps are not asked; they are written first.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import chain
from pathlib import Path

from ..configs.errors import Incomplete, UserError
from ..configs.settings import RegenerateSettings, Settings
from ..configs.signals import StopRequest
from ..models.target import Target, TargetText
from .answers import ANSWERS, FAILED, GIVEN, SUMMARY, Answer, Failure, each_answer, each_failure
from .chat import tokenizer_hash
from .conversations import PROMPTS, places, read_conversations
from .dialogue import Dialogue
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
from .given import Keeper
from .progress import Progress
from .questions import Questions, ask, plan
from .recorders import RecordedTarget
from .servers import Servers
from .stage import Json, Stage, at_least
from .threads import Work, computing, shapes

WEIGHTS, BY = "weights of the target", "regenerate.endpoints"


def regenerate(settings: Settings, run_dir: Path, target: Target | TargetText) -> None:
    """Write ``conversations/answers.jsonl``, one batch of answers after another, and then a summary of it.

    Args:
        settings: the recipe.
        run_dir: the run's folder.
        target: a target answers in process; where there is no more than its text, ``regenerate.endpoints`` are asked.

    Raises:
        UserError: the run was begun with other settings, there are no prompts, the target has no room to answer, or an
            endpoint is none of the target's.
        Incomplete: servers left more conversations without an answer than the recipe allows.
        Interrupted: a signal came; the finished batches are kept.
    """
    _validate(settings.regenerate)
    folder = run_dir / "conversations"
    stage = Stage("regenerate", run_dir, folder, _inputs(settings, folder, target))
    with StopRequest(stage.resume) as stop:
        if _whole(stage, settings):
            return
        stage.begin()
        with exclusive(folder / ".regenerate.lock"):
            remove_temporaries(folder)
            questions = ask(settings, folder / PROMPTS, target.text if isinstance(target, Target) else target)
            total = sum(1 for _ in places(folder / PROMPTS))
            with _threads(settings, folder, target):
                failed = _answer_all(settings, folder, questions, total, target, stop)
            _check_failures(settings, folder, failed, total)
            write_atomic(folder / SUMMARY, encode_json(_summary(folder / ANSWERS, failed)))


def regenerated(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    folder = run_dir / "conversations"
    return _whole(Stage("regenerate", run_dir, folder, _inputs(settings, folder, None)), settings)


def answered_by(target: RecordedTarget, run_dir: Path) -> None:
    """Refuse answers that this run got from another target; of answers that came from elsewhere nothing is known.

    Which weights a server has is its own affair: there the recorder finds out, which compares greedy answers with the
    states it records.
    """
    folder = run_dir / "conversations"
    stage = Stage("regenerate", run_dir, folder, {WEIGHTS: target.info.weights_sha256})
    if WEIGHTS in stage.earlier():
        stage.begun()


def _answer_all(
    settings: Settings,
    folder: Path,
    questions: Questions,
    total: int,
    target: Target | TargetText,
    stop: StopRequest,
) -> int:
    """Append the answers that ``folder`` lacks as they come; returns how many conversations could not be answered."""
    path = folder / ANSWERS
    (folder / FAILED).unlink(missing_ok=True)  # they are tried again
    (folder / SUMMARY).unlink(missing_ok=True)  # which allowed them
    path.touch()
    drop_torn_line(path)
    earlier = {answer.id for answer in each_answer(path)}
    progress = Progress("regenerate", "conversations", total, len(earlier))
    if isinstance(target, Target):
        text, source = target.text, _in_process(settings, target, questions, earlier)
    else:
        unanswered = questions.chosen([row for row, name in enumerate(questions.ids()) if name not in earlier])
        text, source = target, Servers(settings.regenerate, target, progress.say).answer(unanswered)
    keeper = Keeper(text, settings.regenerate.max_new_tokens)
    waiting = (c for c in read_conversations(folder / PROMPTS) if c.given and c.id not in earlier)
    answered, failures = len(earlier), 0
    with closing(source):
        for found in chain(keeper.answers(waiting) if total > len(questions) else (), source):
            new = [entry for entry in found if isinstance(entry, Answer)]
            failed = [entry for entry in found if isinstance(entry, Failure)]
            _append(path, new)
            _append(folder / FAILED, failed)
            answered += len(new)
            failures += len(failed)
            progress.advance(len(found), sum(len(answer.said) for answer in new), len(failed))
            stop.check(f"{answered} of {total} answers are written")
    return failures


def _threads(settings: Settings, folder: Path, target: Target | TargetText) -> AbstractContextManager[None]:
    """Those with which the target answers in process; a unit of its work is two steps of a batch."""
    if not isinstance(target, Target):
        return nullcontext()

    def step(rows: int) -> None:
        target.generate([[row % target.info.vocab_size] for row in range(rows)], [0.0] * rows, 2)

    work = Work.of(shapes(target), settings.regenerate.batch_size)
    return computing("regenerate", work, target.device, step, folder)


def _append(path: Path, entries: list[Answer] | list[Failure]) -> None:
    if not entries:
        return
    try:
        with path.open("ab") as file:
            file.write(b"".join(encode_line(entry._asdict()) for entry in entries))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def _in_process(
    settings: Settings, target: Target, questions: Questions, earlier: set[str]
) -> Generator[list[Answer | Failure], None, None]:
    """Answer batch after batch; one of which some answers are there is answered again as it was."""
    for batch in plan(questions, settings.regenerate.batch_size):
        if not earlier.issuperset(batch.ids()):
            yield [answer for answer in _answer(settings, target, batch) if answer.id not in earlier]


def _answer(settings: Settings, target: Target, batch: Questions) -> list[Answer]:
    most = settings.regenerate.max_new_tokens
    dialogues = [Dialogue(question, target.text, most) for question in batch]
    while going := [dialogue for dialogue in dialogues if not dialogue.finish]:
        generated = target.generate(
            [dialogue.ids for dialogue in going],
            [dialogue.question.temperature for dialogue in going],
            most,
            [dialogue.seed for dialogue in going],
        )
        for dialogue, said in zip(going, generated, strict=True):
            dialogue.say(said.ids, said.finished)
    return [dialogue.answer() for dialogue in dialogues]


def _check_failures(settings: Settings, folder: Path, failed: int, asked: int) -> None:
    """Refuse more failures than are allowed, in the words of the first."""
    if failed > settings.regenerate.allowed_failures * asked:
        first = next(each_failure(folder / FAILED))
        raise Incomplete(
            f"{failed:,} of {asked:,} conversations have no answer, the first {first.id} ({first.reason}); "
            f"{folder / FAILED} lists them: run eagle3 regenerate again to try them again, or raise "
            "regenerate.allowed_failures"
        )


def _summary(path: Path, failed: int) -> dict[str, Json]:
    """What was answered; its ``bytes`` say that the file it describes is the whole one.

    Temperatures are those of the target's own answers; of the others nobody knows any.
    """
    counts = Counter(answers=0, turns=0, prompt_tokens=0, answer_tokens=0, tokenised_again=0)
    finishes, splits, temperatures = Counter[str](), Counter[str](), Counter[str]()
    for answer in each_answer(path):
        said = len(answer.said)
        counts.update(answers=1, turns=len(answer.turns), prompt_tokens=len(answer.ids) - said, answer_tokens=said)
        counts["tokenised_again"] += not answer.exact
        finishes[answer.finish] += 1
        splits[answer.split] += 1
        temperatures[str(answer.temperature)] += answer.finish != GIVEN
    return {
        "bytes": path.stat().st_size,
        **counts,
        "failed": failed,
        "by_finish": dict(sorted(finishes.items())),
        "by_split": dict(sorted(splits.items())),
        "by_temperature": dict(sorted((+temperatures).items())),
    }


def _whole(stage: Stage, settings: Settings) -> bool:
    answers, summary = stage.folder / ANSWERS, stage.folder / SUMMARY
    if not (stage.begun() and answers.exists() and summary.exists()):
        return False
    found = json.loads(summary.read_bytes())
    allowed = settings.regenerate.allowed_failures * (found["answers"] + found["failed"])
    return bool(found["bytes"] == answers.stat().st_size and found["failed"] <= allowed)


def _validate(settings: RegenerateSettings) -> None:
    at_least("regenerate.max_new_tokens", settings.max_new_tokens, 1)
    at_least("regenerate.batch_size", settings.batch_size, 1)
    heats = settings.temperatures
    if not heats or not all(math.isfinite(heat) and heat >= 0.0 for heat in heats):
        problem = "not a list of temperatures"
        raise UserError("regenerate.temperatures", list(heats), problem, "give one or more, each 0 or above")


def _inputs(settings: Settings, folder: Path, target: Target | TargetText | None) -> dict[str, Json]:
    """What determines the answers; without a target, as much of it as can be told without it.

    Which servers answer is no matter, and may change from one start to the next; that they do is.
    """
    prompts = folder / PROMPTS
    if not prompts.exists():
        raise UserError("conversations", folder, "it holds no prompts", "run eagle3 prepare first")
    inputs: dict[str, Json] = {
        "target.path": settings.target.path,
        "target.revision": settings.target.revision,
        "target.dtype": settings.target.dtype,
        "conversations/prompts.jsonl": file_sha256(prompts),
        "regenerate.temperatures": list(settings.regenerate.temperatures),
        "regenerate.max_new_tokens": settings.regenerate.max_new_tokens,
        "run.seed": settings.run.seed,
        BY: "servers" if settings.regenerate.endpoints else "none",
    }
    if not settings.regenerate.endpoints:
        inputs["regenerate.batch_size"] = settings.regenerate.batch_size
    if target is not None:
        inputs["chat template of the target"] = tokenizer_hash(target.tokenizer).chat_template
    if isinstance(target, Target):
        inputs[WEIGHTS] = target.info.weights_sha256
    return inputs
