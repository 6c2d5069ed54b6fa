"""How many tokens a run has, or will have at most.

    tokens = count_tokens(settings, Path("runs/maverick"), read_shape(settings.target).max_positions)
    tokens.all, tokens.longest, tokens.measured

A conversation has as many turns of the target as it has questions, and all its questions together are one prompt in
``prepare.max_prompt_tokens``, in which the chat template's tokens up to the first answer are counted too. What the
template writes between two turns comes on top: as many tokens as the target's own tokenizer makes of it. A conversation
ends where the target's positions do.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ..configs.errors import UserError
from ..configs.settings import Settings, TargetSettings
from ..models.target import load_text
from .answers import SUMMARY
from .chat import tokenizer_hash, tokens_between
from .conversations import PROMPTS, written
from .files import check_size, read_tensors
from .index import Index
from .manifest import INDEX, MANIFEST, read_manifest
from .prepare import LIBRARY
from .prepare import SUMMARY as CHOSEN

ASSUMED_BETWEEN = 16  # more than the ten or so of Llama's and Qwen's templates


class Tokens(NamedTuple):
    """Conversations, ``training`` ones among them, and their tokens.

    ``prompt`` and ``answer`` tokens are of all conversations, and ``all`` are no more than these together; ``trained``
    ones are of training conversations. The target need not write the ``given`` ones of the answers' tokens. No
    conversation has more than ``longest`` tokens, nor more than ``most_said`` of the target's own. ``measured``: whether
    they were counted, in ``origin``; else they are what the recipe allows at most for ``origin``.
    """

    conversations: int
    training: int
    prompt: int
    answer: int
    all: int
    given: int
    trained: int
    longest: int
    most_said: int
    measured: bool
    origin: str


class Asked(NamedTuple):
    """A kind of conversation: whether it is trained on, its turns, and whether their answers are given."""

    trains: bool
    turns: int
    given: bool


class Longest(NamedTuple):
    """Most tokens that a conversation is asked, that it is answered, and that it has in all."""

    prompt: int
    answer: int
    all: int


def count_tokens(settings: Settings, folder: Path, positions: int) -> Tokens:
    """What the run's store or answers hold; else its prompts, or the recipe's, each as long as the recipe allows.

    Args:
        settings: the recipe.
        folder: the run's.
        positions: the target's.
    """
    kept = _kept(folder / "conversations" / CHOSEN)
    # A store beside a spool has the held-out conversations alone.
    if (folder / "store" / MANIFEST).exists() and settings.record.spool_shards is None:
        return _recorded(folder / "store", kept)
    prompts, answers = folder / "conversations" / PROMPTS, folder / "conversations" / SUMMARY
    chosen, origin = _asked(settings)
    if prompts.exists():
        chosen, origin = _chosen(prompts), "the chosen prompts"
        if (turns := sum(asked.turns * count for asked, count in chosen.items())) > chosen.total():
            origin += f" and their {turns:,} turns"
    between, told = _between(settings.target) if max(asked.turns for asked in chosen) > 1 else (0, "")
    counted = [(asked, longest_of(settings, positions, asked, between), count) for asked, count in chosen.items()]
    most = Longest(*(max(column) for column in zip(*(each for _, each, _ in counted), strict=True)))
    if answers.exists():
        return _answered(answers, most, kept)
    return Tokens(
        conversations=chosen.total(),
        training=sum(count for asked, _, count in counted if asked.trains),
        prompt=sum(each.prompt * count for _, each, count in counted),
        answer=sum(each.answer * count for _, each, count in counted),
        all=sum(each.all * count for _, each, count in counted),
        given=sum(each.answer * count for asked, each, count in counted if asked.given),
        trained=sum(each.all * count for asked, each, count in counted if asked.trains),
        longest=most.all,
        most_said=most.answer,
        measured=False,
        origin=origin + told,
    )


def longest_of(settings: Settings, positions: int, asked: Asked, between: int) -> Longest:
    """The longest conversation of a kind, with so many tokens of the template ``between`` two turns.

    What outgrows the target's positions is cut short: a turn is only begun where there is room for the whole of it. Given
    answers are there already, and need none.
    """
    turn = settings.regenerate.max_new_tokens
    prompt = settings.prepare.max_prompt_tokens + (asked.turns - 1) * between
    prompt = max(0, min(prompt, positions - (1 if asked.given else turn)))
    answer, all_of_it = asked.turns * turn, max(turn, positions)
    return Longest(prompt, min(answer, all_of_it), min(prompt + answer, all_of_it))


def _between(settings: TargetSettings) -> tuple[int, str]:
    """Tokens of the template between two turns, and in words where that is from."""
    try:
        text = load_text(settings)
        tokenizer_hash(text.tokenizer)  # it refuses one without a chat template
        tokens, source = tokens_between(text), "as the target's tokenizer counts them"
    except UserError:  # a plan is made of a configuration alone, too
        tokens, source = ASSUMED_BETWEEN, "assumed, since the target's tokenizer and template cannot be read"
    return tokens, f", with {tokens} tokens of the chat template between two turns ({source})"


def _asked(settings: Settings) -> tuple[Counter[Asked], str]:
    """Conversations by kind; of turns and given answers a recipe alone knows nothing."""
    asked, origin = settings.prepare, "the recipe's counts"
    if asked.prompts != LIBRARY:
        origin += ", a turn each (eagle3 prepare counts the turns)"
    held_out = asked.validation + asked.test
    return Counter({Asked(True, 1, False): asked.train, Asked(False, 1, False): held_out}), origin


def _chosen(prompts: Path) -> Counter[Asked]:
    """The same of the prompts that were chosen."""
    return Counter(
        Asked(row["split"] == "train", 1 + len(row["follow_ups"]) + _earlier(row), bool(row["given"]))
        for _, row in written(prompts)
    )


def _earlier(row: dict[str, Any]) -> int:
    """Answers in the messages of a conversation whose answers are given: they are trained on as well."""
    return sum(message["role"] == "assistant" for message in row["messages"]) if row["given"] else 0


def _kept(summary: Path) -> float:
    """The share of the answers that conversations bring with them."""
    if not summary.exists():
        return 0.0
    answers = json.loads(summary.read_bytes())["answers"]
    return float(answers["given"] / max(1, sum(answers.values())))


def _recorded(store: Path, kept: float) -> Tokens:
    manifest = read_manifest(store)
    check_size(store / INDEX, manifest.files[INDEX])
    index = Index.read(*read_tensors(store / INDEX))
    lengths, training, said = index.lengths(), index.rows("train"), manifest.supervised_tokens
    return Tokens(
        conversations=manifest.samples,
        training=len(training),
        prompt=manifest.tokens - said,
        answer=said,
        all=manifest.tokens,
        given=round(said * kept),
        trained=int(lengths[training].sum()),
        longest=int(lengths.max()),
        most_said=int(index.supervised.max()),
        measured=True,
        origin="the recorded store",
    )


def _answered(summary: Path, most: Longest, kept: float) -> Tokens:
    """What the answers' summary says; training conversations are taken to be as long as the others."""
    found = json.loads(summary.read_bytes())
    count, training = found["answers"], found["by_split"].get("train", 0)
    prompt, answer = found["prompt_tokens"], found["answer_tokens"]
    trained = (prompt + answer) * training // max(1, count)
    given = round(answer * kept)
    return Tokens(
        count, training, prompt, answer, prompt + answer, given, trained, most.all, most.answer, True, "the answers"
    )
