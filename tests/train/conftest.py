"""A recipe that trains in a second."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eagle3.configs.settings import Settings, TrainSettings


@pytest.fixture(scope="session")
def short(recipe: Settings) -> Settings:
    """Three epochs of a few steps over the complete run's store."""
    chosen = TrainSettings(ttt_steps=3, epochs=3, batch_tokens=200, validate_every=4, learning_rate=1e-2)
    draft = replace(recipe.draft, intermediate_size=48)
    return replace(recipe, draft=draft, train=chosen, eval=replace(recipe.eval, chain=2))
