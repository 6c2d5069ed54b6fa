"""What is asked of whom: the test prompts at every temperature, and how much room the longest of them takes.

jobs = make_jobs(settings, run_dir, load_text(settings.target))
requests = validation_requests(settings, run_dir, load_text(settings.target))    # on which a chain is chosen
capacity = positions(settings.eval, draftings, max(len(job.prompt) for job in jobs), text)
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..configs.drafting import Drafting
from ..configs.errors import UserError
from ..configs.settings import EvalSettings, Settings
from ..data.chat import prompt_ids
from ..data.choice import deal
from ..data.conversations import Conversation, read_conversations
from ..data.corpus import digest
from ..models.target import TargetText
from .calibration import PROMPTS, Request
from .speculate import Sampling


class Job(NamedTuple):
    """One prompt at one temperature; ``turn`` counts those of its source, and says which of its answers is the first."""

    conversation: Conversation
    prompt: list[int]
    sampling: Sampling
    turn: int


def make_jobs(settings: Settings, run_dir: Path, text: TargetText) -> list[Job]:
    """The test prompts, dealt evenly over their sources, at each temperature in turn."""
    found = [c for c in read_conversations(run_dir / "conversations" / "prompts.jsonl") if c.split == "test"]
    if not found:
        raise UserError("prepare.test", settings.prepare.test, "there are no test prompts", "give 1 or more")
    chosen, prompts = _dealt(found, settings.eval.prompts, text)
    jobs, turns = [], Counter[str]()
    for temperature in settings.eval.temperatures:
        for conversation, prompt in zip(chosen, prompts, strict=True):
            sampling = Sampling(temperature, settings.eval.sampling, _seed(settings, conversation.id))
            # Dealt prompts go round the sources: turns counted over all of them would give each source one order only.
            jobs.append(Job(conversation, prompt, sampling, turns[conversation.source]))
            turns[conversation.source] += 1
    return jobs


def validation_requests(settings: Settings, run_dir: Path, text: TargetText) -> dict[float, list[Request]]:
    """Some validation prompts by temperature; none where there are none."""
    found = [c for c in read_conversations(run_dir / "conversations" / "prompts.jsonl") if c.split == "validation"]
    chosen, prompts = _dealt(found, PROMPTS, text)
    return {
        temperature: [
            Request(prompt, Sampling(temperature, settings.eval.sampling, _seed(settings, conversation.id)))
            for conversation, prompt in zip(chosen, prompts, strict=True)
        ]
        for temperature in settings.eval.temperatures
    }


def _dealt(found: Sequence[Conversation], count: int, text: TargetText) -> tuple[list[Conversation], list[list[int]]]:
    """At most so many of them, evenly of their sources, and their prompts."""
    chosen = list(itertools.islice(deal(found), count))
    return chosen, [prompt_ids(text.tokenizer, conversation) for conversation in chosen]


def _seed(settings: Settings, prompt_id: str) -> int:
    """A seed of the prompt's own, so that a report over fewer prompts has the same answers."""
    return digest(f"eval:{settings.run.seed}:{prompt_id}") % (1 << 31)


def positions(settings: EvalSettings, draftings: Sequence[Drafting], longest: int, text: TargetText) -> int:
    """Positions of a request whose prompt has ``longest`` tokens; of a tree, whose nodes stand side by side, each takes room and a level a position.

    Raises:
        UserError: the target has not as many.
    """
    answered = longest + settings.max_new_tokens + 1
    needed = answered + max(drafting.length for drafting in draftings)
    if needed > text.max_positions:
        problem = f"prompt, answer and drafted tokens take {needed} positions, the target has {text.max_positions}"
        raise UserError("eval.max_new_tokens", settings.max_new_tokens, problem, "lower it or leave out long prompts")
    return answered + max(drafting.most for drafting in draftings)
