"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from .plan import OPTIONS, Plan
from .units import counted, in_bytes, measured

DISK = {"there": "already there", "free": "free on that disk"}


def render(plan: Plan) -> str:
    """The plan as tables, with its warnings at the end."""
    blocks = [
        _facts(plan),
        _tokens(plan),
        _stores(plan),
        _disk(plan),
        _target_memory(plan),
        _head_memory(plan),
        _hours(plan),
    ]
    lines = [line for block in blocks for line in (*block, "")]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)]).rstrip()


def _facts(plan: Plan) -> list[str]:
    target, head = plan.target, plan.head
    shape = f"{target.num_layers} layers, {target.hidden_size:,} wide, vocabulary {target.vocab_size:,}"
    flop, teacher = (measured(head[key], "FLOP") for key in ("flop_per_token", "teacher_flop_per_token"))
    return [
        f"run      {plan.run}",
        f"target   {target.name}: {shape}; captured layers {list(target.layers)}",
        f"         {counted(target.parameters)} parameters, counted in {target.counted}",
        f"head     {counted(head['parameters'])} parameters, {counted(head['parameters_per_step'])} of them in every step",
        f"         {flop} to train on a supervised token, and {teacher} for its teacher",
    ]


def _tokens(plan: Plan) -> list[str]:
    tokens = plan.tokens
    origin = f"measured in {tokens['origin']}"
    if not tokens["measured"]:
        origin = f"at most, by {tokens['origin']}: every prompt and answer as long as the recipe allows"
    rows = [
        ("conversations", f"{tokens['conversations']:,}"),
        ("prompts", f"{tokens['prompt']:,}"),
        ("answers", f"{tokens['answer']:,}"),
        *([("of them given", f"{tokens['given']:,}")] if tokens["given"] else []),
        ("recorded", f"{tokens['all']:,}"),
        ("trained on, in all epochs", f"{tokens['trained']:,}"),
        ("longest conversation", f"{tokens['longest']:,}"),
    ]
    return [f"tokens   {origin}", *_table(rows)]


def _stores(plan: Plan) -> list[str]:
    rows = [
        (f"{name}{' (this recipe)' if name == plan.stored_as else ''}", f"{states:,}", in_bytes(plan.store_bytes[name]))
        for name, states in plan.store_bytes_per_token.items()
    ]
    return ["store    by the dtype of its states", *_table([("", "bytes a token", "size"), *rows])]


def _disk(plan: Plan) -> list[str]:
    rows = [(DISK.get(name, name), in_bytes(taken)) for name, taken in plan.disk.items()]
    return ["disk", *_table(rows)]


def _target_memory(plan: Plan) -> list[str]:
    title = f"memory   on each of {plan.gpus} GPUs for the target; what its own layers work with comes on top"
    return [title, *_table([(name, in_bytes(taken)) for name, taken in plan.memory.items()])]


def _head_memory(plan: Plan) -> list[str]:
    title = f"memory   on each of {plan.gpus} GPUs for training the head; parts at their largest, all at its own"
    parts = next(iter(plan.training_memory.values()))
    rows = [(name, *(in_bytes(taken) for taken in held.values())) for name, held in plan.training_memory.items()]
    return [title, *_table([("", *parts), *rows])]


def _hours(plan: Plan) -> list[str]:
    rows = [
        (stage, f"give {OPTIONS[stage]}" if hours is None else f"{hours:,.1f}") for stage, hours in plan.hours.items()
    ]
    return ["hours", *_table(rows)]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
