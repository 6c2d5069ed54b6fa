"""The head that these tests are about: small, with random weights, for a target of 17 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from eagle3.models.draft import DraftConfig, Eagle3Draft

CONFIG = DraftConfig(
    hidden_size=24,
    intermediate_size=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=17,
    draft_vocab_size=5,
    target_layers=(1, 23, 44),
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_positions=4096,
)
#: Half as wide as its heads together: nobody finds their width who divides the one by the number of the others.
NARROW = replace(CONFIG, hidden_size=12)
DRAFT_IDS = torch.tensor([0, 3, 4, 11, 16])


def random_draft(config: DraftConfig = CONFIG, scale: float = 1.0, **changes: Any) -> Eagle3Draft:
    """A head of ``config`` but for ``changes``; all its weights, the norms' too, are normal and of this scale."""
    torch.manual_seed(0)
    config = replace(config, **changes)
    draft = Eagle3Draft(config, DRAFT_IDS if config.draft_vocab_size < config.vocab_size else None)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(0.0, scale)
    return draft
