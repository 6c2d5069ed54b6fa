"""The head that a recipe asks for, whatever the target."""

from __future__ import annotations

from typing import Any

import pytest
from eagle3.configs.errors import UserError
from eagle3.configs.settings import DraftSettings
from eagle3.models.shapes import draft_config

TARGET: dict[str, Any] = {
    "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 500, "layers": (1, 3, 4),
    "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_positions": 4096,
}  # fmt: skip


def test_the_head_follows_the_target_where_the_recipe_is_silent() -> None:
    config = draft_config(DraftSettings(vocab_size=100, num_heads=8), TARGET)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rope_theta) == (8, 2, 8, 500_000.0)
    assert (config.vocab_size, config.draft_vocab_size, config.target_layers) == (500, 100, (1, 3, 4))
    with pytest.raises(UserError, match="draft.num_kv_heads = 2: it does not divide the 3 heads"):
        draft_config(DraftSettings(num_heads=3), TARGET)
