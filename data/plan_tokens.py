"""How many tokens a run has, or will have at most.

    tokens = count_tokens(settings, Path("runs/maverick"), read_shape(settings.target).max_positions)
    tokens.all, tokens.longest, tokens.measured

A conversation has as many turns of the target as it has questions, and all its questions together are one prompt in
``prepare.max_prompt_tokens``. It ends where the target's positions do. What the chat template writes between two turns,
some ten tokens, is only counted where tokens are measured.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ..configs.settings import Settings
from .answers import SUMMARY
from .conversations import PROMPTS, written
from .files import check_size, read_tensors
from .index import Index
from .prepare import LIBRARY
from .prepare import SUMMARY as CHOSEN
from .store import INDEX, MANIFEST, read_manifest


class Tokens(NamedTuple):
    """Conversations, ``training`` ones among them, and their tokens.

    ``prompt`` and ``answer`` tokens are of all conversations, ``trained`` ones of training conversations. The target need
    not write the ``given`` ones of the answers' tokens. No conversation has more than ``longest`` tokens, nor more than ``most_said`` of the target's own. ``measured``: whether they were
    counted, in ``origin``; else they are what the recipe allows for ``origin``.
    """

    conversations: int
    training: int
    prompt: int
    answer: int
    given: int
    trained: int
    longest: int
    most_said: int
    measured: bool
    origin: str

    @property
    def all(self) -> int:
        return self.prompt + self.answer


class Asked(NamedTuple):
    """A kind of conversation: whether it is trained on, its turns, and whether their answers are given."""

    trains: bool
    turns: int
    given: bool


class Longest(NamedTuple):
    """Most tokens of a conversation, and which of them are whose."""

    prompt: int
    answer: int

    @property
    def all(self) -> int:
        return self.prompt + self.answer


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
    longest = {asked.turns: longest_of(settings, positions, asked.turns) for asked in chosen}
    most = longest[max(longest)]
    if answers.exists():
        return _answered(answers, most, kept)
    counted = [(asked, longest[asked.turns], count) for asked, count in chosen.items()]
    return Tokens(
        conversations=chosen.total(),
        training=sum(count for asked, _, count in counted if asked.trains),
        prompt=sum(each.prompt * count for _, each, count in counted),
        answer=sum(each.answer * count for _, each, count in counted),
        given=sum(each.answer * count for asked, each, count in counted if asked.given),
        trained=sum(each.all * count for asked, each, count in counted if asked.trains),
        longest=most.all,
        most_said=most.answer,
        measured=False,
        origin=origin,
    )


def longest_of(settings: Settings, positions: int, turns: int) -> Longest:
    """The longest conversation of so many turns: one that would outgrow the target's positions is cut short."""
    prompt, turn = settings.prepare.max_prompt_tokens, settings.regenerate.max_new_tokens
    answer = min(turns * turn, max(turn, positions - prompt))
    return Longest(max(0, min(prompt, positions - answer)), answer)


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
        Asked(row["split"] == "train", 1 + len(row["follow_ups"]), bool(row["given"])) for _, row in written(prompts)
    )


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
    return Tokens(count, training, prompt, answer, given, trained, most.all, most.answer, True, "the answers")
