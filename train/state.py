"""The optimiser's whole state, gathered from whatever shards it and put back under whatever does: DDP or any ZeRO stage.

    for name, tensor in gathered(module, optimizer, kinds):   # "lm_head.weight/exp_avg", float32 on the CPU
        ...
    restore(module, optimizer, kinds, tensors, step)

Weights are kept as the optimiser has them, float32 also where the head runs in bfloat16. With AdamW's two moments or Muon's
one, and the count of steps, nothing else decides what the next step does, so training goes on exactly, and under another
number of ranks or another stage to rounding. DeepSpeed's own checkpoints are tied to both.

``kinds`` are those of :func:`.optimizer.kinds`: what updates each parameter. What DeepSpeed shards is AdamW's.

Every rank must call either function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer import MOMENTS

WEIGHT = "weight"


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The draft's parameters by the names of its checkpoint, whatever wraps it."""
    return {name.split("draft.", 1)[1]: parameter for name, parameter in module.named_parameters()}


def parts_of(kinds: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each parameter's name with ``weight`` and with the names of its moments."""
    return [(name, part) for name, kind in kinds.items() for part in (WEIGHT, *MOMENTS[kind])]


def gathered(module: nn.Module, optimizer: Any, kinds: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield ``<parameter>/weight`` and its moments, whole, one at a time; after the first step."""
    base, parameters, copies = _base(optimizer), parameters_of(module), _copies(optimizer)
    _link(optimizer)
    for name, part in parts_of(kinds):
        parameter = copies.get(id(parameters[name]), parameters[name])
        yield f"{name}/{part}", _whole(parameter, base, part).detach().float().cpu()


def restore(
    module: nn.Module, optimizer: Any, kinds: Mapping[str, str], tensors: Mapping[str, Tensor], step: int
) -> None:
    """Put back what :func:`gathered` yielded after ``step`` steps; the module's own weights were loaded from it before."""
    base, parameters, copies = _base(optimizer), parameters_of(module), _copies(optimizer)
    for held, kind in _held(base, next(iter(parameters.values()))):
        moments = {key: torch.zeros_like(held, dtype=torch.float32) for key in MOMENTS[kind]}
        base.state[held] = {"step": torch.tensor(float(step)), **moments}
    _link(optimizer)
    for name, part in parts_of(kinds):
        _put(copies.get(id(parameters[name]), parameters[name]), base, part, tensors[f"{name}/{part}"])


def _held(base: torch.optim.Optimizer, parameter: Any) -> list[tuple[Tensor, str]]:
    """What the torch optimiser steps, with the kind of update: parameters, or flat shards of them, which ZeRO-3 lends it only while it does."""
    if hasattr(parameter, "ds_id"):
        return [(flat, "adamw") for flat in parameter._z3_optimizer.fp32_partitioned_groups_flat]
    return [(held, group["kind"]) for group in base.param_groups for held in group["params"]]


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside accelerate's and DeepSpeed's."""
    *_, innermost = _wrappers(optimizer)
    base: torch.optim.Optimizer = innermost.optimizer
    return base


def _wrappers(optimizer: Any) -> Iterator[Any]:
    """Accelerate's and DeepSpeed's optimisers around the torch optimiser."""
    while hasattr(optimizer, "optimizer"):
        yield optimizer
        optimizer = optimizer.optimizer


def _link(optimizer: Any) -> None:
    """Let the parameters' shards find their moments under ZeRO 1 and 2.

    DeepSpeed does so once, after the step of the first group of parameters, when the others have no moments yet.
    """
    for wrapper in _wrappers(optimizer):
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()


def _copies(optimizer: Any) -> dict[int, nn.Parameter]:
    """The float32 copies, whole, that DeepSpeed steps in bfloat16 at stage 0, by the ``id`` of the head's parameters."""
    for wrapper in _wrappers(optimizer):
        if hasattr(wrapper, "fp32_groups"):
            pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            return {id(own): copy for group in pairs for own, copy in zip(*group, strict=True)}
    return {}


def _whole(parameter: Any, base: torch.optim.Optimizer, part: str) -> Tensor:
    found: Tensor
    key = None if part == WEIGHT else part
    if hasattr(parameter, "ds_id"):
        found = parameter._z3_optimizer.get_full_hp_param(parameter, key)
    elif hasattr(parameter, "_hp_mapping"):
        found = parameter.get_full_hp_param(key)
    else:
        found = parameter if key is None else base.state[parameter][key]
    return found


@torch.no_grad()
def _put(parameter: Any, base: torch.optim.Optimizer, part: str, value: Tensor) -> None:
    key = None if part == WEIGHT else part
    if hasattr(parameter, "ds_id"):
        optimizer = parameter._z3_optimizer
        size = optimizer.get_local_fp32_param(parameter, key).numel()
        rank = optimizer._get_param_partition_rank(parameter)
        padded = torch.nn.functional.pad(value.flatten(), (0, max(0, size * (rank + 1) - value.numel())))
        optimizer.set_local_hp_param(padded[size * rank : size * (rank + 1)], parameter, key)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value, key)
    else:
        held = parameter if key is None else base.state[parameter][key]
        held.copy_(value)
