"""How training meets the machine: the one place of ``train/`` that knows of devices, ranks and DeepSpeed.

What a launcher asks for is what runs, or training is refused in one line: accelerate itself ignores what it cannot do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from ..configs.errors import UserError
from ..configs.settings import Settings

#: What a launcher may ask for beside DeepSpeed, and training cannot do.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism of tensors or sequences",
}
PRECISIONS = ("no", "bf16")


def make_accelerator(settings: Settings, run_dir: Path) -> Accelerator:
    """The accelerator that the launcher's environment asks for; without CUDA it is gloo and the CPU.

    Raises:
        UserError: the launcher asks for what training cannot do, or for something else than the recipe.
    """
    _check_environment(settings)
    cuda, launched, deepspeed = (
        torch.cuda.is_available(),
        "LOCAL_RANK" in os.environ,
        _asked("ACCELERATE_USE_DEEPSPEED"),
    )
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of what it would find out by itself
    tracked = settings.train.tracker != "disabled"
    accelerator = Accelerator(
        # Where the CPU is asked for, accelerate ignores DeepSpeed; under DeepSpeed it finds the CPU by itself.
        cpu=not cuda and not deepspeed,
        # A plugin, since a launcher's variable outranks the plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.train.accumulation),
        # Said without CUDA only, and only to a launched process: a lone one has no process group to give a backend to.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if launched and not cuda else [],
        log_with="wandb" if tracked else None,
    )
    plugin = deepspeed_plugin(accelerator)
    if deepspeed and plugin is None:
        problem, remedy = "accelerate runs without it", "unset ACCELERATE_USE_CPU, or launch without DeepSpeed"
        raise UserError("ACCELERATE_USE_DEEPSPEED", "true", problem, remedy)
    if plugin is not None:
        configure(plugin, settings)
    if tracked:
        options = {"wandb": {"name": settings.run.name, "mode": settings.train.tracker, "dir": str(run_dir)}}
        accelerator.init_trackers("eagle3", init_kwargs=options)
    return accelerator


def deepspeed_plugin(accelerator: Accelerator) -> DeepSpeedPlugin | None:
    """DeepSpeed's configuration, where it runs."""
    used = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.state.deepspeed_plugin if used else None


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """``module`` and ``optimizer`` as they train, and no step taken.

    Raises:
        UserError: DeepSpeed does not run what the launcher asked for.
    """
    with unstepped(optimizer):
        prepared, wrapped = accelerator.prepare(module, optimizer)
    if (plugin := deepspeed_plugin(accelerator)) is not None:
        check_engine(plugin, prepared)
    return prepared, wrapped


@contextmanager
def unstepped(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what is stepped inside.

    In bfloat16 at stage 0 DeepSpeed steps once as it starts, with gradients of zero: weights would decay, and Adam would be
    a step ahead.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    optimizer.state.clear()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def description(accelerator: Accelerator, module: nn.Module) -> str:
    """What really trains: the engine, its numerics, the ranks and their device."""
    precision = {"no": "float32", "bf16": "bfloat16 autocast"}[accelerator.mixed_precision]
    engine = "DDP" if accelerator.num_processes > 1 else "plain torch"
    if deepspeed_plugin(accelerator) is not None:
        precision = str(next(module.parameters()).dtype).removeprefix("torch.")
        engine = f"DeepSpeed ZeRO-{_stage_of(module)}"
    ranks = "1 rank" if accelerator.num_processes == 1 else f"{accelerator.num_processes} ranks"
    return f"{engine}, {ranks}, {precision}, {accelerator.device.type}"


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_environment(settings: Settings) -> None:
    """Refuse what a launcher asks for and accelerate would not, or training cannot, do."""
    for variable, name in UNSUPPORTED.items():
        if _asked(variable):
            raise UserError(variable, "true", f"training does not support {name}", "launch with DeepSpeed or plain DDP")
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) not in PRECISIONS:
        remedy = f"launch with --mixed_precision {' or '.join(PRECISIONS)}"
        raise UserError("mixed_precision", precision, "training does not support it", remedy)
    if not _asked("ACCELERATE_USE_DEEPSPEED"):
        return
    if settings.train.optimizer == "muon":
        problem = "it needs whole matrices, and DeepSpeed gives the optimizer flat shards of them"
        remedy = "set train.optimizer=adamw, or launch without DeepSpeed (plain DDP)"
        raise UserError("train.optimizer", settings.train.optimizer, problem, remedy)
    if "LOCAL_RANK" not in os.environ:
        problem, remedy = "DeepSpeed needs a launcher", "use accelerate launch --use_deepspeed, or unset it"
        raise UserError("ACCELERATE_USE_DEEPSPEED", "true", problem, remedy)


def configure(plugin: DeepSpeedPlugin, settings: Settings) -> None:
    """Give DeepSpeed what the recipe says; it wants to know this before it sees a batch.

    Raises:
        UserError: its file or the launcher says something else.
    """
    config, zero, chosen = plugin.deepspeed_config, plugin.deepspeed_config["zero_optimization"], settings.train
    # accelerate writes 1 for an accumulation that a file does not name.
    wanted = {"gradient_accumulation_steps": (chosen.accumulation, 1), "gradient_clipping": (chosen.clip,)}
    for key, (value, *default) in wanted.items():
        if (asked := config.get(key, "auto")) not in ("auto", value, *default):
            setting = {"gradient_clipping": "train.clip", "gradient_accumulation_steps": "train.accumulation"}[key]
            raise UserError(key, asked, f"the recipe has {setting}={value}", f"set {setting}={asked}, or {key} to auto")
        config[key] = value
    for key in ("offload_optimizer", "offload_param"):
        if (asked := zero.get(key, {}).get("device", "none")) != "none":
            problem = "training cannot resume what DeepSpeed offloads"
            raise UserError(f"zero_optimization.{key}.device", asked, problem, "set it to none")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(
                f"DeepSpeed's {key}", config[key].get("type"), "the recipe sets it", "remove it from the file"
            )
    config["train_micro_batch_size_per_gpu"] = 1  # only bookkeeping: train.batch_tokens says how large a batch is
    if plugin.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # the best head is saved whole


def check_engine(plugin: DeepSpeedPlugin, engine: nn.Module) -> None:
    """Compare what trains with what the launcher asked for.

    Raises:
        UserError: it is not DeepSpeed's engine, or of another stage or precision.
    """
    asked = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", plugin.zero_stage))
    if (found := _stage_of(engine)) != asked:
        remedy = f"take DeepSpeed's file of stage {asked}, or do not set the stage"
        problem = "DeepSpeed does not run" if found < 0 else f"DeepSpeed runs stage {found}"
        raise UserError("zero_stage", asked, problem, remedy)
    dtype = next(engine.parameters()).dtype
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and dtype != torch.bfloat16:
        remedy = 'set "bf16" in DeepSpeed\'s file to enabled or auto'
        raise UserError("mixed_precision", "bf16", f"DeepSpeed trains in {dtype}", remedy)
    if dtype == torch.float16:
        raise UserError("fp16", "true", "training does not support it", "take bf16 instead in DeepSpeed's file")


def _stage_of(engine: Any) -> int:
    """The stage of ZeRO that DeepSpeed's engine runs; -1 if it is none of DeepSpeed's."""
    if not hasattr(engine, "zero_optimization_stage"):
        return -1
    stage: int = engine.zero_optimization_stage()
    return stage


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
