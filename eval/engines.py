"""What decodes: the target by the engine that a recipe names, and whatever verifies and drafts with it.

    target = load_engine(settings.target, settings.eval.engine, capacity=700)
    verifier, drafters = make_verifier(target, 700), make_drafters([chain(5)], target, draft, 700)
    decode(prompt, verifier, drafters["chain 5"], limits, Sampling())

The native engine is the product's; transformers' knows every family, and is what the native one is tested against.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..configs.drafting import Drafting
from ..configs.settings import TargetSettings
from ..models.draft import DraftConfig, Eagle3Draft
from ..models.native.draft import NativeDraft, draft_bytes
from ..models.native.loading import load_native
from ..models.native.parallel import Group
from ..models.native.target import NativeTarget
from ..models.target import DTYPES, Target, load_target
from .drafters import ChainDrafter, TreeDrafter
from .environment import ENGINE
from .sampling import Proposal
from .speculate import Drafter, NativeVerifier, Sampling, TargetVerifier, Verifier
from .trees import TreeShape

AnyTarget = Target | NativeTarget
Loader = Callable[[TargetSettings], Target]


def load_engine(
    settings: TargetSettings,
    engine: str,
    capacity: int,
    load: Loader = load_target,
    group: Group | None = None,
    beside: int = 0,
) -> AnyTarget:
    """The target in ``engine``.

    Args:
        settings: which, in the numerics that it shall run in.
        engine: "native" or "transformers".
        capacity: positions of the verifier that will be made.
        load: where transformers' model comes from.
        group: the processes that hold a native one together, all of which call this.
        beside: bytes of the head that drafts, for which the native one leaves room.

    Raises:
        UserError: as :func:`load_native` and :func:`load_target`; the native engine knows before it loads what fits.
    """
    if engine == "transformers":
        return load(settings)
    # A model of an earlier stage is held by cycles, and its memory by torch: neither is in use.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return load_native(settings, capacity, group=group, beside=beside)


def engine_name(target: AnyTarget) -> str:
    """The engine, its arithmetic and its version, as reports say it."""
    if not isinstance(target, NativeTarget):
        return ENGINE
    return f"eagle3 native ({target.decoder.operations.described}), torch {torch.__version__}"


def make_verifier(target: AnyTarget, capacity: int) -> Verifier:
    """What judges proposals, for requests of at most ``capacity`` positions: prompt, answer, one proposal, and one."""
    if isinstance(target, NativeTarget):
        return NativeVerifier(target, capacity)
    return TargetVerifier(target, capacity)


def verify_once(verifier: Verifier, device: torch.device, rows: int) -> None:
    """What decoding does again and again: the target over one token, and over ``rows``, the last one and drafted ones."""
    verifier.start([0], Sampling())
    verifier.verify(Proposal(torch.zeros(rows - 1, dtype=torch.long, device=device)))


def head_bytes(
    draftings: Sequence[Drafting], draft: DraftConfig, capacity: int, dtype: str, group: Group | None = None
) -> int:
    """What the head takes that :func:`make_drafters` makes, in this process.

    Raises:
        UserError: it cannot be dealt evenly to the processes of ``group``.
    """
    return draft_bytes(draft, capacity, _rows(draftings), DTYPES[dtype], group)


def make_drafters(
    draftings: Sequence[Drafting], target: AnyTarget, draft: Eagle3Draft, capacity: int
) -> dict[str, Drafter]:
    """What proposes as each of ``draftings`` says, by its name, for requests of at most ``capacity`` positions.

    They share one head: a request is one drafter's at a time.
    """
    group = target.group if isinstance(target, NativeTarget) else None
    head = NativeDraft(draft, target.head.embedding, capacity, _rows(draftings), group)
    return {drafting.name: _make_drafter(drafting, head) for drafting in draftings}


def _rows(draftings: Sequence[Drafting]) -> int:
    """Most rows of a proposal."""
    return max(drafting.length * drafting.top_k for drafting in draftings)


def _make_drafter(drafting: Drafting, head: NativeDraft) -> Drafter:
    if drafting.total is None:
        return ChainDrafter(head, drafting.length)
    return TreeDrafter(head, TreeShape(drafting.total, drafting.length, drafting.top_k))


def next_logits(target: AnyTarget, ids: Sequence[int]) -> Tensor:
    """The logits ``[V]`` of the token behind ``ids``, computed anew, without any cache."""
    if isinstance(target, NativeTarget):
        last_hidden = target.prefill(torch.tensor(ids), [len(ids)]).last_hidden
    else:
        last_hidden = target.forward(torch.tensor([list(ids)])).last_hidden[0]
    return target.logits(last_hidden[-1])
