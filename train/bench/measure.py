"""What the head's benchmark measures with: marks in time, agreement with the plain path, products, launches, kernels."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import kernels
from ...models.draft import Eagle3Draft
from ...models.rollout import RolloutBatch, rollout
from ..objective import objective, weighted

#: Relative to the float32 plain path: how far losses and gradients may be off. In bfloat16 the plain path itself is off
#: by a few thousandths, and the kernels are held to twice its error.
TOLERANCE = 2e-4


class Marks:
    """Named points in time, on the device's own clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.points: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """What follows is ``name``; a round ends with "end"."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append((name, event))
        else:
            self.points.append((name, time.perf_counter()))

    def clear(self) -> None:
        """Forget all."""
        self.points.clear()

    def rounds(self) -> list[dict[str, float]]:
        """Seconds by name, a round each."""
        if self.cuda:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = [{}]
        for (name, start), (_, end) in zip(self.points, self.points[1:], strict=False):
            if name == "end":
                found.append({})
            else:
                found[-1][name] = start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return found


def seconds(run: Callable[[], Any], device: str, repeats: int = 5, warmup: int = 2) -> float:
    """Median time of ``run``."""
    marks = Marks(device)
    if not marks.cuda:
        repeats, warmup = 1, 0
    for turn in range(warmup + repeats):
        if turn == warmup:
            marks.clear()
        marks.mark("run")
        run()
        marks.mark("end")
    return statistics.median(each["run"] for each in marks.rounds() if each)


def agreement(small: Any, large: Any, device: str, batch_of: Callable[..., RolloutBatch]) -> dict[str, dict[str, Any]]:
    """Losses and gradients of the kernels beside the plain path's, on a small head and on a short batch of a large one.

    Args:
        small: a preset.
        large: another; one document of 300 tokens is computed.
        device: where.
        batch_of: makes a batch of a preset, a prompt's length and a device.
    """
    found = {}
    odd = small._replace(config=replace(small.config, fc_norm=True, norm_output=True))
    few = large._replace(documents=1, length=min(300, large.length))
    for name, preset, prompt in (("small", small, 5), ("3.1", odd, 0), ("large", few, few.length // 2)):
        config = preset.config
        torch.manual_seed(3)
        with torch.device(device):
            draft = Eagle3Draft(config, torch.arange(config.draft_vocab_size) * 2)
            embedding, lm_head = (torch.randn(2, config.vocab_size, config.hidden_size) * 0.05).bfloat16().unbind()
        batch = batch_of(preset, prompt, device)
        exact, reference = _loss_and_gradient(draft, batch, embedding, lm_head.float(), False)
        loss, gradient = _loss_and_gradient(draft, batch, embedding, lm_head.float(), True)
        error = _distance(gradient | {"loss": loss}, reference | {"loss": exact})
        found[f"{name}, float32"] = {"error": error, "limit": TOLERANCE, "passed": error < TOLERANCE}
        if device == "cpu":
            continue  # Triton's interpreter cannot multiply bfloat16
        half = draft.bfloat16()
        errors = {}
        for fused in (False, True):
            _, gradient = _loss_and_gradient(half, batch, embedding, lm_head, fused)
            errors[fused] = _distance(gradient, reference)
        limit = 2 * errors[False]
        found[f"{name}, bfloat16"] = {"error": errors[True], "limit": limit, "passed": errors[True] < limit}
    return found


def _loss_and_gradient(
    draft: Eagle3Draft, batch: RolloutBatch, embedding: Tensor, lm_head: Tensor, fused: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    draft.zero_grad()
    with kernels.using(fused):
        loss = weighted(objective(draft, rollout(draft, embedding, batch, 7), batch, lm_head, "lk"), 0.8)
    loss.backward()
    return loss.detach(), {name: p.grad.float().clone() for name, p in draft.named_parameters() if p.grad is not None}


def _distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor; what is not finite is far away."""
    errors = [((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted]
    return max(errors) if all(map(math.isfinite, errors)) else 1e9


def products(preset: Any, device: str) -> dict[str, Any]:
    """TFLOP/s of the head's products: forward, gradient of the input, gradient of the weight."""
    config, found = preset.config, {}
    hidden, heads, width = config.hidden_size, config.num_heads + 2 * config.num_kv_heads, config.head_dim
    shapes = {
        "square": (8192, 8192) if hidden > 1000 else (64, 64),
        "qkv": (2 * hidden, heads * width),
        "out": (config.num_heads * width, hidden),
        "gate_up": (hidden, 2 * config.intermediate_size),
        "down": (config.intermediate_size, hidden),
        "lm_head": (hidden, config.draft_vocab_size),
        "teacher": (hidden, config.vocab_size),
    }
    whole = preset.documents * preset.length
    for name, (inner, outer) in shapes.items():
        for rows in {"square": (inner,), "teacher": (2304, 2656)}.get(name, (whole, whole - 7 * preset.documents - 1)):
            x, y, weight = (
                torch.randn(*shape, dtype=torch.bfloat16, device=device)
                for shape in ((rows, inner), (rows, outer), (outer, inner))
            )
            runs = {"forward": partial(F.linear, x, weight), "input": partial(torch.mm, y, weight)}
            runs["weight"] = partial(torch.mm, y.t(), x)
            if name in {"square", "teacher"}:
                runs = {"forward": runs["forward"]}
            flop = 2 * rows * inner * outer
            found[f"{name} {rows}"] = {key: round(flop / seconds(run, device) / 1e12, 1) for key, run in runs.items()}
    return found


#: Blocks, warps and stages to try.
TRIED = {
    "forward": [(64, 8, 3), (64, 8, 2), (128, 8, 2), (64, 4, 2), (32, 4, 3)],
    "queries": [(64, 8, 2), (64, 8, 3), (32, 8, 2), (32, 8, 3), (64, 4, 2)],
    "keys": [(64, 8, 2), (64, 8, 3), (32, 8, 2), (32, 8, 3), (128, 8, 1)],
}


def tune(preset: Any, device: str) -> dict[str, Any]:
    """Milliseconds of attention, forwards and both ways, by launch; the fastest stay chosen."""
    attention, place = (import_module(f"..{name}", kernels.load().__name__) for name in ("attention", "places"))
    place = place.place
    config = preset.config
    found: dict[str, Any] = {}
    samples, keys = preset.documents, preset.length - 1
    with torch.device(device):
        rows = torch.arange(samples * keys)
        places = place(rows // keys, rows % keys, keys, samples)
        q = torch.randn(len(rows), config.num_heads, config.head_dim, dtype=torch.bfloat16).requires_grad_()
        pairs = [
            torch.randn(len(rows), 2, config.num_kv_heads, config.head_dim, dtype=torch.bfloat16).requires_grad_()
            for _ in range(4)
        ]
        d_out = torch.randn_like(q)

    def both() -> None:
        attention.attend(q, pairs[0], pairs[1:], places).backward(d_out)

    def forward() -> None:
        with torch.no_grad():
            attention.attend(q, pairs[0], pairs[1:], places)

    for kernel, launches in TRIED.items():
        times = {}
        for launch in launches if device == "cuda" else launches[:1]:
            attention.LAUNCHES[kernel] = attention.Launch(*launch)
            try:
                times[launch] = 1e3 * seconds(forward if kernel == "forward" else both, device)
            except attention.TritonError as error:
                found[f"{kernel} {launch}"] = type(error).__name__
        best = min(times, key=lambda launch: times[launch])
        attention.LAUNCHES[kernel] = attention.Launch(*best)
        found[kernel] = {str(launch): round(value, 3) for launch, value in times.items()}
    return found


def by_kernel(run: Callable[[], Any], device: str, most: int = 45) -> dict[str, list[float]]:
    """Milliseconds and launches of the kernels that take longest in one ``run``."""
    if device != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {event.key[:110]: [round(event.self_device_time_total / 1e3, 3), event.count] for event in events[:most]}
