"""The head as it drafts is the plain head: what stands, chains, levels of a tree, and what is taken back.

Shapes: T rows that stand, k rows of a step, S drafted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.models.draft import DraftConfig, Eagle3Draft
from eagle3.models.native.config import Share
from eagle3.models.native.draft import NativeDraft, draft_bytes
from torch import Tensor

from .conftest import DEVICE, assert_close

HIDDEN, VOCABULARY, DRAFTED = 32, 96, 24
CAPACITY = 40
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "normed residual": {"norm_before_residual": True},
    "of the speculators package": {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True},
    "one key": {"num_kv_heads": 1, "head_dim": 16},
    "whole vocabulary": {"draft_vocab_size": VOCABULARY},
}
PATHS: list[tuple[int, ...]] = [(3,), (9,), (20,), (3, 4), (3, 5), (20, 4), (3, 5, 1), (20, 4, 1)]


def head_of(changes: dict[str, Any]) -> Eagle3Draft:
    """A random head."""
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
        "vocab_size": VOCABULARY, "draft_vocab_size": DRAFTED, "target_layers": (0, 1, 2), "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_positions": 256,
    }  # fmt: skip
    config = DraftConfig(**fields | changes)
    mapped = config.draft_vocab_size < VOCABULARY
    made = Eagle3Draft(config, torch.arange(DRAFTED) * 4 + 1 if mapped else None).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.requires_grad_(False).to(DEVICE)


@pytest.fixture(params=FORMS)
def draft(request: pytest.FixtureRequest) -> Eagle3Draft:
    return head_of(FORMS[request.param])


@pytest.fixture(scope="module")
def embedding() -> Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def states(count: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[T]`` and features ``[T, F, H]``."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(VOCABULARY, (count,), generator=generator)
    return tokens.to(DEVICE), torch.randn(count, 3, HIDDEN, generator=generator).to(DEVICE)


@torch.inference_mode()
def plain(draft: Eagle3Draft, embedding: Tensor, standing: tuple[Tensor, Tensor], path: Sequence[int]) -> Tensor:
    """Logits ``[D]`` behind ``path`` (draft ids), everything computed anew."""
    tokens, features = standing
    embedded, h_TH = embedding[tokens], draft.combine(features)
    for step in range(len(path) + 1):
        positions = torch.arange(len(h_TH), device=DEVICE)[None]
        y_TH = draft.decode(embedded[None], h_TH[None], positions, draft.new_cache(1, len(h_TH)))[0]
        if step < len(path):
            embedded = torch.cat((embedded, embedding[draft.draft_ids[path[step]]][None]))
            h_TH = torch.cat((h_TH, draft.feedback(y_TH[-1:])))
    return draft.logits(y_TH[-1])


def ids(*tokens: int) -> Tensor:
    return torch.tensor(tokens, device=DEVICE)


@torch.inference_mode()
def test_chains_behind_what_stands(draft: Eagle3Draft, embedding: Tensor) -> None:
    """Over several requests and rounds, of which each leaves drafted rows behind."""
    head = NativeDraft(draft, embedding, CAPACITY, drafted=3)
    for sizes in ((7, 1, 3, 2), (2, 4)):
        head.restart()
        tokens, features = states(sum(sizes))
        for end in torch.tensor(sizes).cumsum(0).tolist():
            start = head.standing
            head.extend(tokens[start:end], features[start:end])
            standing = tokens[:end], features[:end]
            for path in ((), (5, 7, 0), (6,)):
                y_1H = head.begin()
                for token in path:
                    y_1H = head.step(ids(token), y_1H)
                assert_close(head.logits(y_1H)[0], plain(draft, embedding, standing, path))


@torch.inference_mode()
def test_levels_of_a_tree(draft: Eagle3Draft, embedding: Tensor) -> None:
    """A row sees what stands, its ancestors and itself."""
    head = NativeDraft(draft, embedding, CAPACITY, drafted=len(PATHS))
    standing = states(6)
    head.extend(*standing)
    seen_SS = torch.tensor([[above == path[: len(above)] for above in PATHS] for path in PATHS], device=DEVICE)
    y_SH = head.begin()
    for depth in (1, 2, 3):
        level = [row for row, path in enumerate(PATHS) if len(path) == depth]
        parents = [PATHS.index(PATHS[row][:-1]) if depth > 1 else 0 for row in level]
        y_kH = head.step(ids(*(PATHS[row][-1] for row in level)), y_SH[parents], seen_SS[level, : level[-1] + 1])
        y_SH = y_kH if depth == 1 else torch.cat((y_SH, y_kH))
    for row, path in enumerate(PATHS):
        assert_close(head.logits(y_SH[row : row + 1])[0], plain(draft, embedding, standing, path))


@torch.inference_mode()
def test_numerics_are_the_embeddings(draft: Eagle3Draft, embedding: Tensor) -> None:
    head = NativeDraft(draft, embedding.bfloat16(), CAPACITY, drafted=1)
    tokens, features = states(9)
    head.extend(tokens, features.bfloat16())
    logits = head.logits(head.step(ids(5), head.begin()))
    assert logits.dtype == torch.bfloat16
    assert_close(logits[0].float(), plain(draft, embedding, (tokens, features), (5,)), 5e-2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "one key"])
def test_memory_is_known_before(form: str, size: int, embedding: Tensor) -> None:
    """Of a share too; rotations and row numbers are left out."""
    draft, group = head_of(FORMS[form]), SimpleNamespace(share=Share(size - 1, size)) if size > 1 else None
    given: Any = (CAPACITY, 5, torch.bfloat16, group)
    head = NativeDraft(draft, embedding.bfloat16(), CAPACITY, 5, given[-1])
    weights = [part for part in head._weights if isinstance(part, Tensor)]
    norms = (*head._weights.input_norm, *head._weights.fc_norms)
    held = [*weights, *norms, *head._weights.mlp, head._own_DQ, head._cache.stored]
    assert draft_bytes(draft.config, *given) == sum(tensor.nbytes for tensor in held)


def test_more_than_there_is_room_for(draft: Eagle3Draft, embedding: Tensor) -> None:
    head = NativeDraft(draft, embedding, 4, drafted=1)
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5"):
        head.extend(*states(6))


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (4, "does not divide the draft's 2 key/value heads; give a divisor of 2"),
        (
            3,
            "does not divide the draft's 2 key/value heads and 4 query heads and 32 columns of fc; give a divisor of 2",
        ),
    ],
)
def test_a_head_that_cannot_be_dealt(size: int, problem: str, embedding: Tensor) -> None:
    group: Any = SimpleNamespace(share=Share(0, size))
    with pytest.raises(UserError, match=f"^eval.tensor_parallel = {size}: it {problem}$"):
        NativeDraft(head_of({}), embedding, CAPACITY, 1, group)
