"""AdamW or Muon for a draft head: what updates which parameter, and its learning rate at every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..configs.settings import TrainSettings
from ..models.draft import Eagle3Draft
from .muon import Muon

#: What an update keeps of every parameter between steps, by the ``kind`` of the parameter's group.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


def make_optimizer(draft: Eagle3Draft, scale: Tensor, settings: TrainSettings) -> torch.optim.Optimizer:
    """That of the recipe, over all of ``draft``, whose features have ``scale [F]``; the trainer sets the rate."""
    groups, rate, decay = (
        parameter_groups(draft, scale, settings.optimizer),
        settings.learning_rate,
        settings.weight_decay,
    )
    if settings.optimizer == "muon":
        return Muon(groups, rate, weight_decay=decay, betas=settings.betas)
    return torch.optim.AdamW(groups, lr=rate, betas=settings.betas, weight_decay=decay)


def kinds(draft: Eagle3Draft, optimizer: str) -> dict[str, str]:
    """Which update each parameter has, by its name: Muon's is for matrices, and AdamW's for norms and ``lm_head``.

    A row of ``lm_head`` learns of one token, some thousand times as often as of another. To orthogonalise its update
    would let the rare ones, whose gradients are noise, move as far as the others; it is also the dearest to do.
    """
    by_muon = {name for name, p in draft.named_parameters() if p.ndim > 1 and name != "lm_head.weight"}
    return {
        name: "muon" if optimizer == "muon" and name in by_muon else "adamw" for name, _ in draft.named_parameters()
    }


def parameter_groups(draft: Eagle3Draft, scale: Tensor, optimizer: str) -> list[dict[str, Any]]:
    """The optimizer's groups, each with the ``kind`` of its update and the ``scale`` of its learning rate.

    Adam moves every weight by about the learning rate, whatever its gradient. What that does to the output of ``fc``
    grows with the features, which differ a hundredfold between targets: its rate is divided by their ``scale [F]``.
    Muon's updates are as large, but of ``fc`` it would turn what the loudest captured layer says first: there, every
    layer's columns are taken as if its features were divided by their scale.
    """
    kind = kinds(draft, optimizer)
    groups: list[dict[str, Any]] = []
    for each in MOMENTS:
        rest = [p for name, p in draft.named_parameters() if name != "fc.weight" and kind[name] == each]
        if rest:
            groups.append({"params": rest, "kind": each, "scale": 1.0})
    fc: dict[str, Any] = {"params": [draft.fc.weight], "kind": kind["fc.weight"], "scale": 1.0 / float(scale.mean())}
    if fc["kind"] == "muon":
        hidden = draft.config.hidden_size
        fc |= {"scale": 1.0, "input_scale": scale.to(draft.fc.weight.device).repeat_interleave(hidden)}
    return [*groups, fc]


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Linear warm-up, then the schedule to zero; a pure function of the steps done, so there is no scheduler to save."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return settings.learning_rate * (
        1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    )
