"""How training meets the machine: the one place of ``train/`` that knows of devices, ranks and DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from ..configs.errors import UserError
from ..configs.settings import Settings


def make_accelerator(settings: Settings, run_dir: Path) -> Accelerator:
    """The accelerator that the launcher's environment asks for; without CUDA it is gloo and the CPU.

    Raises:
        UserError: Muon is asked for under DeepSpeed.
    """
    if settings.train.optimizer == "muon" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        problem = "it needs whole matrices, and DeepSpeed gives the optimizer flat shards of them"
        remedy = "set train.optimizer=adamw, or launch without DeepSpeed (plain DDP)"
        raise UserError("train.optimizer", settings.train.optimizer, problem, remedy)
    cuda, launched = torch.cuda.is_available(), "LOCAL_RANK" in os.environ
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of what it would find out by itself
    tracked = settings.train.tracker != "disabled"
    accelerator = Accelerator(
        cpu=not cuda,
        gradient_accumulation_steps=settings.train.accumulation,
        # Said without CUDA only, and only to a launched process: a lone one has no process group to give a backend to.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if launched and not cuda else [],
        log_with="wandb" if tracked else None,
    )
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    if plugin is not None:
        # DeepSpeed wants to know these before it sees a batch; the micro-batch is only its bookkeeping here.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        plugin.deepspeed_config["gradient_accumulation_steps"] = settings.train.accumulation
        plugin.deepspeed_config["gradient_clipping"] = settings.train.clip
    if tracked:
        options = {"wandb": {"name": settings.run.name, "mode": settings.train.tracker, "dir": str(run_dir)}}
        accelerator.init_trackers("eagle3", init_kwargs=options)
    return accelerator


def gather_parameters(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """The draft's parameters, whole, float32 on the CPU; every rank must call it, the main process gets them.

    Parameters only: what DeepSpeed shards need not keep the buffers.
    """
    state = accelerator.get_state_dict(module) or {}
    return {
        name.removeprefix("draft."): tensor.detach().float().cpu()
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }


def any_rank(accelerator: Accelerator, requested: bool) -> bool:
    """Whether any rank was asked to stop: they must leave the loop together."""
    if accelerator.num_processes == 1:
        return requested
    flag = torch.tensor(float(requested), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())
