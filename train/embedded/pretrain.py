"""Trains the embedded target from scratch: Muon for the matrices, AdamW for the rest, warm-up, stable, linear decay.

A decayed model is a finished one; as long as there is time it can be trained on from there in another such cycle
(WSD-S, Wen et al., arXiv 2410.05192).
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from ..muon import Muon
from . import forward


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. A step is ``batch * length`` tokens, in micro-batches of ``micro`` rows.

    ``cycles`` are the stable and the decay steps of each cycle of the learning rate.
    """

    cycles: tuple[tuple[int, int], ...]
    batch: int = 10
    micro: int = 5
    length: int = 768
    warmup_steps: int = 100
    rewarm_steps: int = 20
    muon_lr: float = 6e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    balance: float = 3e-3
    seed: int = 0

    def scale(self, step: int) -> float:
        """The learning rate of ``step`` as a share of its peak."""
        warmup = self.warmup_steps
        for stable, decay in self.cycles:
            if step < stable + decay:
                return min(1.0, (step + 1) / warmup, (stable + decay - step) / max(1, decay))
            step, warmup = step - stable - decay, self.rewarm_steps
        return 0.0

    @property
    def steps(self) -> int:
        """Steps of all cycles."""
        return sum(map(sum, self.cycles))


def configuration(vocabulary: int, bos: int, eos: int, pad: int) -> Llama4TextConfig:
    """Llama-4 at 3.8 M parameters: Maverick's shape (interleaved MoE, every fourth layer without RoPE), deep and narrow."""
    return Llama4TextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size_mlp=256,
        intermediate_size=128,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        attention_chunk_size=256,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="bfloat16",
    )


def initialise(config: Llama4TextConfig, seed: int) -> Llama4ForCausalLM:
    """A model with normal(0, 0.02) embeddings and fan-in scaled matrices, residual outputs scaled down by depth."""
    torch.manual_seed(seed)
    model = Llama4ForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name:
            continue
        fan_in = parameter.shape[-2] if "experts." in name else parameter.shape[-1]
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        torch.nn.init.normal_(
            parameter, std=fan_in**-0.5 / ((2 * config.num_hidden_layers) ** 0.5 if residual else 1.0)
        )
    return model


def optimisers(model: Llama4ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, experts included; AdamW for embedding, norms and routers."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = [p for name, p in named if p.ndim > 1 and "embed" not in name and "router" not in name]
    matrices = {id(p) for p in by_muon}
    rest = [p for _, p in named if id(p) not in matrices]
    decay = recipe.weight_decay
    muon = Muon(by_muon, lr=recipe.muon_lr, weight_decay=decay)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.adam_lr,
        betas=(0.9, 0.95),
    )
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def batch_of(ids: np.ndarray, recipe: Recipe, step: int) -> Tensor:
    """The ``[batch, length + 1]`` windows of ``step``: the stream in order, wrapping around."""
    size = recipe.batch * recipe.length
    at = (np.arange(size + 1) + step * size) % len(ids)
    window = torch.from_numpy(ids[at].astype(np.int64))
    return torch.stack([window[i * recipe.length : (i + 1) * recipe.length + 1] for i in range(recipe.batch)])


def precision() -> AbstractContextManager[Any]:
    """Multiply in bfloat16 where the processor has units for it: emulated, it is fifty times as slow as float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def loss_of(model: Llama4ForCausalLM, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token cross-entropy in nats, and the mean load-balancing loss of the MoE layers."""
    with precision():
        states, balance = forward.hidden_states(model, ids_BT[:, :-1])
        logits = F.linear(states, model.model.embed_tokens.weight)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
    moe_layers = sum(layer.is_moe_layer for layer in model.model.layers)
    return loss, balance / moe_layers


def pretrain(model: Llama4ForCausalLM, ids: np.ndarray, recipe: Recipe, folder: Path, held_out: Tensor) -> None:
    """Train ``model`` in place; a checkpoint every 100 steps in ``folder``, resumed from when it is there.

    Args:
        model: fp32; see :func:`precision` for what it is multiplied in.
        ids: the training stream.
        recipe: the schedule; an interrupted run may go on under one that differs only from there on.
        folder: where ``state.pt`` and ``metrics.jsonl`` go.
        held_out: ``[N, T + 1]`` ids on which the loss is reported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, log = folder / "state.pt", folder / "metrics.jsonl"
    both, done = optimisers(model, recipe), 0
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        for optimiser, was in zip(both, saved["optimisers"], strict=True):
            optimiser.load_state_dict(was)
        done = saved["step"]
    else:
        log.write_text(json.dumps({"recipe": asdict(recipe)}) + "\n")
    forward.compile_blocks()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    started, total = time.time(), recipe.steps
    micros, seen = recipe.batch // recipe.micro // world, 0
    for step in range(done, total):
        for optimiser in both:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * recipe.scale(step)
        mean = balance = 0.0
        for rows in batch_of(ids, recipe, step)[rank::world].split(recipe.micro):
            loss, share = loss_of(model, rows)
            ((loss + recipe.balance * share) / micros).backward()
            mean, balance = mean + loss.item() / micros, balance + share.item() / micros
        average_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in both:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen += recipe.batch * recipe.length
        if rank:
            continue
        if (step + 1) % 20 == 0 or step + 1 == total:
            line = {"step": step + 1, "loss": round(mean, 4), "balance": round(balance, 3)}
            line["tokens_per_s"] = round(seen / (time.time() - started))
            if (step + 1) % 200 == 0 or step + 1 == total:
                line["held_out"] = round(_held_out_loss(model, held_out, recipe.micro), 4)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        if (step + 1) % 100 == 0 or step + 1 == total:
            saved = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in both], "step": step + 1}
            torch.save(saved, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)


def average_gradients(model: Llama4ForCausalLM, world: int) -> None:
    """Replace every gradient by its mean over the ``world`` processes, one all-reduce for all."""
    if world == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, (flat / world).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def _held_out_loss(model: Llama4ForCausalLM, ids: Tensor, micro: int) -> float:
    rows = ids[: len(ids) // micro * micro].split(micro)
    return sum(loss_of(model, part)[0].item() for part in rows) / len(rows)
