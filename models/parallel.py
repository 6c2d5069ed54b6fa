"""One target held by several processes together, each with its part of every matrix, by transformers' own plan.

:mod:`.native.parallel` is the native engine's; its recorders stand in the same groups, and follow in the same way.

    torchrun --nproc-per-node 8 --no-python eagle3 record maverick record.tensor_parallel=8

Ranks next to each other make a group. Its members compute the same batches at the same time: the first decides which,
tells the others, and is the only one that does anything with what comes out. Groups know nothing of each other, as ranks do
not that hold a target alone. So torch's default process group is made of one group's members, and to transformers these are
all there are.

    ours = here(members)
    target = load_target(settings, members)
    if ours.writes:
        with leading(ours):
            announce(ours, input_ids)
            target.forward(input_ids)
    else:
        for input_ids in announced():
            target.forward(input_ids)

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig

from ..configs.errors import Eagle3Error, UserError

SETTING = "record.tensor_parallel"
PATIENCE = timedelta(days=30)  # the first may wait for a disk or a trainer; a launcher ends all when one of them dies

Value = TypeVar("Value")


class Place(NamedTuple):
    """Where a process stands: in one of ``groups``, as one of its ``members``, both counted from 0."""

    group: int
    groups: int
    member: int
    members: int

    @property
    def writes(self) -> bool:
        """Whether what the group computed is this process's to write."""
        return self.member == 0

    def does(self, number: int) -> bool:
        """Whether this process's group does the piece of work of this number."""
        return number % self.groups == self.group


ALONE = Place(0, 1, 0, 1)


def placed(rank: int, ranks: int, members: int) -> Place:
    """The place of ``rank`` among ``ranks``, of which each ``members`` that stand together are a group.

    Raises:
        UserError: the ranks are no whole number of groups.
    """
    if ranks % members:
        remedy = f"start a multiple of {members}, as with torchrun --nproc-per-node {members}"
        raise UserError(SETTING, members, f"there are {ranks} processes", remedy)
    return Place(rank // members, ranks // members, rank % members, members)


def here(members: int) -> Place:
    """The place of this process, by what its launcher says; raises as :func:`placed` does."""
    return placed(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), members)


def join(members: int, config: PretrainedConfig) -> dict[str, Any]:
    """Meet the other members of the group; returns how transformers is told to load this member's part.

    Raises:
        UserError: the ranks are no whole number of groups, or the heads of the target cannot be dealt to the members.
    """
    heads = config.get_text_config().num_key_value_heads
    if heads % members:
        raise UserError(SETTING, members, f"the target has {heads} key/value heads", "give a divisor of that number")
    meet(here(members))
    return {"distributed_config": DistributedConfig(tp_size=members)}


def meet(ours: Place) -> None:
    """Make torch's default process group of the members of this process's group, if none stands."""
    if not distributed.is_initialized():
        store, _, _ = next(rendezvous("env://"))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"target {ours.group}", store),
            rank=ours.member,
            world_size=ours.members,
            timeout=PATIENCE,
        )


def from_first(value: Value) -> Value:
    """What the first member of the group has for ``value``; the others' is ignored."""
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


@contextmanager
def leading(ours: Place) -> Iterator[None]:
    """What the first member does while the others follow it; an end that is not a bug is theirs too.

    After a bug, such as memory that does not suffice, a member may be in the middle of a batch and cannot be told: it is
    ended by the launcher.
    """
    try:
        yield
    except Eagle3Error:
        announce(ours, None)
        raise
    announce(ours, None)


def announced() -> Iterator[Tensor]:
    """What the first member announces, until it is done; each is to be run before the next is asked for."""
    while True:
        shape = torch.zeros(2, dtype=torch.long)
        distributed.broadcast(shape, src=0)
        if not shape.any():
            return
        input_ids = torch.zeros(*shape.tolist(), dtype=torch.long)
        distributed.broadcast(input_ids, src=0)
        yield input_ids


def announce(ours: Place, input_ids: Tensor | None) -> None:
    """Tell the other members over which token ids ``[B, T]``, on the CPU, the first runs the target next; None: no more."""
    if ours.members == 1:
        return
    distributed.broadcast(torch.tensor([0, 0] if input_ids is None else input_ids.shape), src=0)
    if input_ids is not None:
        distributed.broadcast(input_ids, src=0)


def whole(weight: Tensor) -> Tensor:
    """All of a weight of which every member has a part; all have to ask."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
