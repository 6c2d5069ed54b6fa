"""One target held by several processes, each with its share of every layer: all that is known here of torch.distributed.

    torchrun --nproc-per-node 8 ...                              # every process runs the same lines
    group = join(8)                                              # 1: None, and nothing of this is used
    target = load_native(TargetSettings(), capacity=700, group=group)
    verifier = NativeVerifier(target, capacity=700)              # of eval.speculate
    head = NativeDraft(draft, target.head.embedding, capacity=700, drafted=5, group=group)

Queries, keys and values are dealt by heads, gate and up by columns, and what follows them by the rows that take these in,
so that each process goes from whole states to a summand of whole states (Megatron-LM, arXiv 1909.08053). Each has a part of
every expert: whichever a token is routed to, all work alike. So a layer has two sums over processes, behind attention and
behind the MLP or the experts. The LM head is dealt by tokens, and logits are put together. Embedding, norms and routers are
whole everywhere. The draft's one layer and its LM head are dealt alike, and its fc by columns, which are put together.

A sum gives all processes the same bits, since each part of it is added up in one place; so all route a token alike.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from math import gcd
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ...configs.entry import started
from ...configs.errors import UserError
from ..parallel import PATIENCE, here, meet
from ..parallel import SETTING as RECORDING
from .config import DecoderConfig, Share

SETTING = "eval.tensor_parallel"
#: torch 2.13 gave it another name.
_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)

Value = TypeVar("Value")


class Group:
    """The processes that hold a target together, as each of them sees it. All of them call the same methods in turn.

    Args:
        device: of the tensors that they exchange.
        processes: an initialised process group that can exchange them; None: the default one.
        setting: that says how many they are, for errors.
    """

    def __init__(
        self, device: torch.device, processes: distributed.ProcessGroup | None = None, setting: str = SETTING
    ) -> None:
        self.device, self._processes, self.setting = device, processes, setting
        self.rank, self.size = distributed.get_rank(processes), distributed.get_world_size(processes)

    @property
    def share(self) -> Share:
        """The share of a target that this process computes."""
        return Share(self.rank, self.size)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of everyone's ``x``, in its place."""
        distributed.all_reduce(x, group=self._processes)
        return x

    def least(self, value: int) -> int:
        """The least of everyone's ``value``."""
        held = torch.tensor(value, device=self.device)
        distributed.all_reduce(held, distributed.ReduceOp.MIN, group=self._processes)
        return int(held)

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's ``x`` ``[..., X]`` along the last dimension, by rank: ``[..., size * X]``."""
        rows = x.reshape(-1, x.shape[-1])
        parts = rows.new_empty(self.size * len(rows), x.shape[-1])
        _all_gather(parts, rows, group=self._processes)
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)

    def first_(self, x: Tensor) -> Tensor:
        """What rank 0 has in ``x``, in its place."""
        distributed.broadcast(x, group=self._processes, group_src=0)
        return x

    def from_first(self, value: Value) -> Value:
        """What rank 0 has for ``value``, of any kind; the others' is ignored."""
        held = [value]
        distributed.broadcast_object_list(held, group=self._processes, device=self.device, group_src=0)
        return held[0]


def join(size: int) -> Group | None:
    """Meet the other processes that a launcher such as torchrun has started; the group of ``size`` 1 is None.

    Where there are GPUs, each process has that of its ``LOCAL_RANK``. A default process group that stands is used.

    Raises:
        UserError: the launcher did not start so many, or more than there are GPUs for.
    """
    if (found := started()) != size:
        remedy = f"start {size}, as with torchrun --nproc-per-node {size}, or set it to {found}"
        raise UserError(SETTING, size, f"there are {found} processes", remedy)
    if size == 1:
        return None
    device = own_device(SETTING, size)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Group(device)


def join_members(members: int) -> Group | None:
    """Meet the other members of this process's group, of which there may be several (``record.tensor_parallel``).

    Raises:
        UserError: the processes are no whole number of groups, or more than there are GPUs for.
    """
    if members == 1:
        return None
    meet(here(members))
    return Group(own_device(RECORDING, members), setting=RECORDING)


def own_device(setting: str, size: int) -> torch.device:
    """The GPU of this process among those of its machine, which it then uses; the CPU where there is none.

    Raises:
        UserError: there are fewer than processes, which all of them find.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if (count := torch.cuda.device_count()) < neighbours():
        raise UserError(setting, size, f"there are {count} GPUs here", "start as many processes on each node")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def launched(command: str, processes: int) -> str:
    """``command`` as so many processes are started with it."""
    return command if processes == 1 else f"torchrun --nproc-per-node {processes} --no-python {command}"


def neighbours() -> int:
    """How many processes the launcher has started on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shard(
    config: DecoderConfig,
    share: Share,
    whose: str = "target",
    more: Collection[tuple[int, str]] = (),
    setting: str = SETTING,
) -> DecoderConfig:
    """What one process computes of the decoder ``config``, which is whole.

    Args:
        config: the target's, or the draft's.
        share: which.
        whose: of the two, for the error.
        more: that is dealt too: how many, and of what.
        setting: that says how many they are, for the error.

    Raises:
        UserError: the decoder cannot be dealt evenly to so many.
    """
    dealt = {
        *more,
        (config.num_heads, "query heads"),
        (config.num_kv_heads, "key/value heads"),
    }
    if not config.whole_head:
        dealt.add((config.vocab_size, "tokens"))
    dealt |= {(layer.width, f"columns of an {'expert' if layer.experts else 'MLP'}") for layer in config.layers}
    if uneven := sorted(pair for pair in dealt if pair[0] % share.size):
        problem = f"it does not divide the {whose}'s {' and '.join(f'{count:,} {kind}' for count, kind in uneven)}"
        common = gcd(*(count for count, _ in dealt))
        remedy = f"give a divisor of {common}" if common > 1 else "leave it at 1"
        raise UserError(setting, share.size, problem, remedy)
    return replace(
        config,
        num_heads=config.num_heads // share.size,
        num_kv_heads=config.num_kv_heads // share.size,
        layers=tuple(replace(layer, width=layer.width // share.size) for layer in config.layers),
        share=share,
    )
