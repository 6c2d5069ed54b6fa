"""How fast the head trains: its share of the GPU's peak, memory, and where the time goes.

    python -m eagle3.train.bench.head --preset maverick --out train/bench/results/<hardware>/head.json

Weights, states and tokens are random: neither time nor memory depends on them. First the kernels are compared with the
plain path on the same device, then their launches are tuned, then whole optimiser steps are timed.

MFU counts the products with weights that a step needs: 6 FLOP a parameter for every supervised row of every step, 4 for
``fc`` (features need no gradient) and 6 for step-0 keys and values of every token, 2 for the teacher's logits of a
supervised row. Attention is left out of it, and so is whatever is computed twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...configs.entry import finish
from ...configs.errors import Incomplete, UserError
from ...data.files import encode_json, write_atomic
from ...models import kernels
from ...models.costs import step_flop
from ...models.draft import DraftConfig, Eagle3Draft
from ...models.rollout import RolloutBatch, layout, rollout, supervised
from ..objective import objective, weighted
from ..speed import peak_of
from .measure import Marks, agreement, by_kernel, products, tune

STEPS, DECAY, CLIP = 7, 0.8, 0.5
LIMIT = 0.55  # performance.md's
KIND = "lk"


class Preset(NamedTuple):
    """A head and a micro-batch of ``documents`` of ``length`` tokens."""

    config: DraftConfig
    documents: int
    length: int


PRESETS = {
    "maverick": Preset(
        DraftConfig(5120, 16384, 40, 8, 128, 202048, 32000, (1, 23, 44), 1e-5, 500000.0, 1048576), 8, 2048
    ),
    "tiny": Preset(DraftConfig(64, 96, 4, 2, 16, 300, 120, (1, 2, 3), 1e-5, 10000.0, 4096), 2, 24),
}


class Bench:
    """A head with its optimiser, and the target's ends.

    Args:
        preset: shapes.
        device: where.
        master: whether the head is in bfloat16 and the optimiser keeps float32 weights, as DeepSpeed does; else the head
            is in float32 and autocast takes products in bfloat16.
    """

    def __init__(self, preset: Preset, device: str, master: bool) -> None:
        torch.manual_seed(0)
        config, self.device, self.master = preset.config, device, master
        with torch.device(device):
            self.draft = Eagle3Draft(config, torch.arange(config.draft_vocab_size) * 2)
            if master:
                self.draft = self.draft.bfloat16()
            ends = torch.randn(2, config.vocab_size, config.hidden_size, dtype=torch.bfloat16) * 0.02
        self.embedding, self.lm_head = ends.unbind()
        self.parameters = list(self.draft.parameters())
        self.masters: list[Tensor] = [each.detach().float() if master else each for each in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, batch: RolloutBatch, marks: Marks) -> Tensor:
        """One micro-batch that is a batch: forward, backward, optimiser."""
        with torch.autocast(self.device, torch.bfloat16, enabled=not self.master):
            marks.mark("rollout")
            outputs = rollout(self.draft, self.embedding, batch, STEPS)
            marks.mark("objective")
            results = objective(self.draft, outputs, batch, self.lm_head, KIND)
            loss = weighted(results, DECAY) / len(outputs[0].rows)
        marks.mark("backward")
        del outputs, results
        loss.backward()
        marks.mark("optimiser")
        if self.master:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.master:
            torch._foreach_copy_([parameter.data for parameter in self.parameters], self.masters)
        marks.mark("end")
        return loss.detach()


def random_batch(preset: Preset, prompt: int, device: str) -> RolloutBatch:
    """Documents whose first ``prompt`` tokens are a prompt, and the rest one answer."""
    documents, length, config = preset.documents, preset.length, preset.config
    tokens = documents * length
    with torch.device(device):
        return RolloutBatch(
            torch.randint(config.vocab_size, (tokens,)),
            (torch.arange(length) >= prompt).repeat(documents),
            torch.randn(tokens, len(config.target_layers), config.hidden_size, dtype=torch.bfloat16),
            torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16),
            torch.full((documents,), length),
        )


def needed_flop(config: DraftConfig, batch: RolloutBatch) -> int:
    """What the module's docstring counts."""
    keys = len(batch.input_ids) - len(batch.lengths)  # that of a document's last token is of no use
    return step_flop(config, keys, supervised(batch.loss_mask, batch.lengths, STEPS).sum(1).tolist())


def attention_flop(config: DraftConfig, batch: RolloutBatch) -> float:
    """Scores and weighted values of step-0 keys, forwards and backwards: what is beside ``needed_flop``."""
    position = layout(batch.lengths, len(batch.input_ids)).position
    seen = (supervised(batch.loss_mask, batch.lengths, STEPS) * (position + 1)).sum().item()
    return 12.0 * seen * config.num_heads * config.head_dim


def timed(bench: Bench, batch: RolloutBatch, repeats: int, warmup: int) -> dict[str, Any]:
    """Median time of a step and of its parts, and the most memory."""
    marks = Marks(bench.device)
    for _ in range(warmup):
        bench.step(batch, marks)
    marks.clear()
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss = torch.zeros(())
    for _ in range(repeats):
        loss = bench.step(batch, marks)
    rounds = marks.rounds()
    seconds = statistics.median(sum(each.values()) for each in rounds)
    tokens = batch.input_ids.numel()
    peak = peak_of(torch.device(bench.device))
    needed = needed_flop(bench.draft.config, batch)
    memory = torch.cuda.memory_stats() if bench.device == "cuda" else {}
    return {
        "seconds": seconds,
        "all_seconds": [sum(each.values()) for each in rounds],
        "parts": {name: statistics.median(each[name] for each in rounds) for name in rounds[0]},
        "tokens_per_s": tokens / seconds,
        "mfu": peak and needed / seconds / peak,
        "mfu_with_attention": peak and (needed + attention_flop(bench.draft.config, batch)) / seconds / peak,
        "needed_tflop": needed / 1e12,
        "peak_gib": memory.get("allocated_bytes.all.peak", 0) / 2**30,
        "reserved_gib": memory.get("reserved_bytes.all.peak", 0) / 2**30,
        "loss": float(loss),
    }


def device_name(device: str) -> str:
    """What the hardware calls itself."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def measure(preset: Preset, device: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Everything, in the order of what must be known first; prints as it goes, so that a run cut short tells something."""
    found: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}

    def say(name: str, value: Any) -> None:
        found[name] = value
        print(f"{name}: {json.dumps(value, default=str)}", flush=True)

    say("agreement", agreement(PRESETS["tiny"], preset, device, random_batch))
    batches = {
        "no prompt": random_batch(preset, 0, device),
        "half prompt": random_batch(preset, preset.length // 2, device),
    }

    def variant(
        name: str, master: bool, fused: bool, batch: str, repeats: int, warmup: int, profile: bool = False
    ) -> None:
        bench = Bench(preset, device, master)
        with kernels.using(fused):
            say(name, timed(bench, batches[batch], repeats, warmup))
            if profile:
                say(f"{name}, by kernel", by_kernel(lambda: bench.step(batches[batch], Marks(device)), device))

    runs: list[Callable[[], None]] = [
        lambda: variant("bf16, no prompt, launches as they are", True, True, "no prompt", 3, 2),
        lambda: say("products", products(preset, device)),
        lambda: say("launches", tune(preset, device)),
        lambda: variant("bf16, no prompt", True, True, "no prompt", asked.repeats, 3, True),
        lambda: variant("bf16, half prompt", True, True, "half prompt", asked.repeats, 2),
        lambda: variant("autocast, no prompt", False, True, "no prompt", 3, 2),
        lambda: variant("plain bf16, half prompt", True, False, "half prompt", 1, 1),
    ]
    for run in runs:
        try:
            run()
        except torch.OutOfMemoryError as error:
            say(f"out of memory {len(found)}", str(error).partition(".")[0])
        if device == "cuda":
            torch.cuda.empty_cache()
    if failed := [name for name, check in found["agreement"].items() if not check["passed"]]:
        raise Incomplete(f"the kernels do not compute what the plain path does: {', '.join(failed)}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write where it is asked for."""
    parser = argparse.ArgumentParser(prog="head", description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="maverick")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=5, help="optimiser steps timed; default %(default)s")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the results file")
    parser.add_argument("--out", type=Path, help="where to write the results")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device", "cuda", "there is no GPU", "say --device cpu --preset tiny")
    found = measure(PRESETS[asked.preset], asked.device, asked)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(asked.out, encode_json(results(found, asked)))


def results(found: dict[str, Any], asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What was measured, as the house's results files have it."""
    preset = PRESETS[asked.preset]
    agreed = "; ".join(
        f"{name} {check['error']:.1e} of {check['limit']:.1e}" for name, check in found["agreement"].items()
    )
    return [
        {
            "benchmark": "training the head",
            "hardware": found["device"],
            "commit": asked.commit,
            "versions": {"torch": found["torch"]},
            "shape": f"{asked.preset}: {preset.documents} documents of {preset.length} tokens, TTT {STEPS}, {name}",
            "unit": "MFU",
            "value": round(timing["mfu"], 4),
            "reference": {"name": "peak of the GPU, bfloat16", "value": 1.0},
            "ratio": round(timing["mfu"], 4),
            "limit": LIMIT,
            "notes": f"{timing['tokens_per_s']:,.0f} tokens/s, peak {timing['peak_gib']:.1f} GiB, every micro-batch with its "
            f"optimiser step; median of {len(timing['all_seconds'])}; agreement with the plain path: {agreed}",
        }
        for name, timing in found.items()
        if isinstance(timing, dict) and timing.get("mfu")
    ]


if __name__ == "__main__":
    sys.exit(finish(main))
