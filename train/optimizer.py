"""AdamW for a draft head: the rate of every parameter at every step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..configs.settings import TrainSettings
from ..models.draft import Eagle3Draft


def parameter_groups(draft: Eagle3Draft, scale: Tensor) -> list[dict[str, Any]]:
    """The optimiser's groups, each with the ``scale`` of its learning rate.

    Adam moves every weight by about the learning rate, whatever its gradient. What that does to the output of ``fc``
    grows with the features, which differ a hundredfold between targets: its rate is divided by their ``scale [F]``.
    """
    rest = [parameter for name, parameter in draft.named_parameters() if name != "fc.weight"]
    return [{"params": rest, "scale": 1.0}, {"params": [draft.fc.weight], "scale": 1.0 / float(scale.mean())}]


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero; a pure function of the steps done, so there is no scheduler to save."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
