"""A random head that fits the tiny target, and a run with a trained one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.loader import save
from eagle3.configs.settings import Settings
from eagle3.models.draft import DraftConfig, Eagle3Draft
from eagle3.models.target import Target
from eagle3.train.stage import train

DRAFT_VOCABULARY = 64


@pytest.fixture(scope="session")
def new_draft(tiny_target: Target) -> Callable[..., Eagle3Draft]:
    """``new_draft(hidden_size=16)`` is a random head of that width, which otherwise fits the tiny target."""

    def build(seed: int = 0, **changes: Any) -> Eagle3Draft:
        info = tiny_target.info
        fields: dict[str, Any] = {
            "hidden_size": info.hidden_size, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
            "vocab_size": info.vocab_size, "draft_vocab_size": DRAFT_VOCABULARY, "target_layers": info.layers,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_positions": info.max_positions,
        }  # fmt: skip
        config = DraftConfig(**fields | changes)
        torch.manual_seed(seed)
        mapped = config.draft_vocab_size < config.vocab_size
        draft = Eagle3Draft(config, torch.arange(config.draft_vocab_size) * 4 if mapped else None).eval()
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        return draft.requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def trained(recipe: Settings, finished: Path, changed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a head; not to be written to."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("trained") / "run"))
    settings = changed("train", epochs=1, ttt_steps=2, batch_tokens=320)
    train(settings, run)
    save(settings, run / "config.yaml")
    return run
