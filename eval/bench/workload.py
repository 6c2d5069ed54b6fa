"""What a benchmark of decoding computes: a run's target, head and test prompts.

workload = read_workload(Path("runs/tiny"), None, count=8)
target = load_checked(workload, capacity=700)
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from ...configs.errors import UserError
from ...configs.loader import load
from ...configs.settings import EvalSettings, TargetSettings
from ...data.chat import prompt_ids
from ...data.choice import deal
from ...data.conversations import read_conversations
from ...models.checkpoint import CONFIG, load_draft
from ...models.draft import Eagle3Draft
from ...models.native.loading import load_native
from ...models.native.target import NativeTarget
from ...models.target import load_text
from ..speculate import Limits


class Workload(NamedTuple):
    """Which target, in the numerics of evaluation; the head in its own; token ids of the prompts, and where answers end."""

    run: Path
    target: TargetSettings
    eval: EvalSettings
    draft: Eagle3Draft
    prompts: list[list[int]]
    limits: Limits

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer."""
        return max(map(len, self.prompts)) + self.limits.max_new_tokens


def read_workload(run: Path, target: str | None, count: int) -> Workload:
    """The first ``count`` test prompts of ``run``, its head, and ``target`` in place of the one that its recipe names.

    Raises:
        UserError: it has no head or no prompts.
    """
    prompts = run / "conversations" / "prompts.jsonl"
    for path, what in ((run / "draft" / CONFIG, "head"), (prompts, "prompts")):
        if not path.is_file():
            raise UserError("--run", run, f"it has no {what}", "give a trained run, such as that of `make demo`")
    settings = load(run / "config.yaml", [])
    chosen = dataclasses.replace(
        settings.target, dtype=settings.eval.dtype, path=settings.target.path if target is None else target
    )
    text = load_text(chosen)
    test = [conversation for conversation in read_conversations(prompts) if conversation.split == "test"]
    if not test:
        raise UserError("--run", run, "it has no test prompts", "give a run with prepare.test above 0")
    ids = [prompt_ids(text.tokenizer, conversation) for conversation in itertools.islice(deal(test), count)]
    draft = load_draft(run / "draft").eval()
    return Workload(run, chosen, settings.eval, draft, ids, Limits(settings.eval.max_new_tokens, text.eos_ids))


def load_checked(workload: Workload, capacity: int) -> NativeTarget:
    """The target, with room for ``capacity`` tokens.

    Raises:
        UserError: it is not the one that the head was trained on, or as :func:`load_native`.
    """
    target, config = load_native(workload.target, capacity), workload.draft.config
    theirs = (target.info.hidden_size, target.info.vocab_size, tuple(target.info.layers))
    if (config.hidden_size, config.vocab_size, tuple(config.target_layers)) != theirs:
        problem = f"the head in {workload.run / 'draft'} was trained on another target"
        raise UserError("--target", workload.target.path, problem, "give the target that it was trained on")
    return target
