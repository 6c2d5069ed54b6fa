"""Which values of the settings make sense, whatever the target: said once, before anything is loaded or written."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from .drafting import AUTO, chain, parse
from .errors import UserError
from .settings import EvalSettings, Settings

DTYPES = ("float32", "bfloat16")
STORED_DTYPES = (*DTYPES, "float8_e4m3fn")
CHOICES = {
    "target.dtype": DTYPES,
    "record.features_dtype": STORED_DTYPES,
    "record.last_hidden_dtype": STORED_DTYPES,
    "record.engine": ("transformers", "native"),
    "train.objective": ("kl", "lk"),
    "train.optimizer": ("adamw", "muon"),
    "train.schedule": ("cosine", "linear"),
    "train.tracker": ("online", "offline", "disabled"),
    "eval.engine": ("native", "transformers"),
    "eval.sampling": ("sampled", "greedy"),
    "eval.dtype": DTYPES,
}

#: Of a server: http or https, a name or a number, a port maybe, a path maybe.
ADDRESS = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^\s/:?#@\[\]]+)(:\d{1,5})?(/[^\s?#]*)?")


class Limit(NamedTuple):
    """``holds(value, bound)`` must be true; ``words`` say so."""

    holds: Callable[[Any, Any], bool]
    bound: float
    words: str


def _least(bound: int) -> Limit:
    return Limit(operator.ge, bound, f"{bound} or more")


POSITIVE = Limit(operator.gt, 0, "more than 0")
NOT_NEGATIVE = Limit(operator.ge, 0, "0 or more")
SHARE = Limit(lambda value, most: 0 <= value <= most, 1, "from 0 to 1")
DECAY = Limit(lambda value, most: 0 <= value < most, 1, "from 0 to below 1")
SEED = Limit(lambda value, most: 0 <= value < most, 2**63, "from 0 to below 2**63")

#: For a list, the limit of each of its values. A setting that is None follows the target, which checks it.
LIMITS = {
    "run.seed": SEED,
    "target.layers": NOT_NEGATIVE,
    "prepare.train": _least(1),
    "prepare.validation": _least(1),
    "prepare.test": _least(0),
    "prepare.max_prompt_tokens": _least(1),
    "regenerate.temperatures": NOT_NEGATIVE,
    "regenerate.max_new_tokens": _least(1),
    "regenerate.batch_size": _least(1),
    "regenerate.concurrency": _least(1),
    "regenerate.timeout_s": POSITIVE,
    "regenerate.retries": _least(0),
    "regenerate.allowed_failures": SHARE,
    "record.batch_tokens": _least(1),
    "record.shard_tokens": _least(1),
    "record.spool_shards": _least(1),
    "record.tensor_parallel": _least(1),
    "record.server_gpus": _least(1),
    "record.in_flight": _least(1),
    "record.patience_s": POSITIVE,
    "draft.vocab_size": _least(1),
    "draft.intermediate_size": _least(1),
    "draft.num_heads": _least(1),
    "draft.num_kv_heads": _least(1),
    "draft.head_dim": _least(2),
    "draft.rope_theta": POSITIVE,
    "train.ttt_steps": _least(1),
    "train.step_decay": Limit(lambda value, most: 0 < value <= most, 1, "more than 0 and at most 1"),
    "train.epochs": _least(1),
    "train.batch_tokens": _least(1),
    "train.accumulation": _least(1),
    "train.learning_rate": POSITIVE,
    "train.betas": DECAY,
    "train.weight_decay": NOT_NEGATIVE,
    "train.warmup": SHARE,
    "train.clip": POSITIVE,
    "train.validate_every": _least(1),
    "train.patience": _least(1),
    "train.keep_checkpoints": _least(1),
    "eval.tensor_parallel": _least(1),
    "eval.chain": Limit(lambda value, bound: value == AUTO or value >= bound, 1, f"1 or more, or {AUTO}"),
    "eval.temperatures": NOT_NEGATIVE,
    "eval.prompts": _least(1),
    "eval.max_new_tokens": _least(1),
}


def check(settings: Settings) -> None:
    """Refuse a value that makes no sense, by itself or beside another.

    Raises:
        UserError: the first that is found.
    """
    values = {f"{section}.{key}": value for section, given in asdict(settings).items() for key, value in given.items()}
    for name, value in values.items():
        if isinstance(value, str) and not value.strip():
            raise UserError(name, '""', "it is empty", "give a text")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(name, value, "not supported", f"choose one of {', '.join(CHOICES[name])}")
        if name in LIMITS and value is not None:
            _check_limit(name, value, LIMITS[name])
    _check_name(settings.run.name)
    _check_layers(settings.target.layers)
    for section in ("regenerate", "record"):
        _check_endpoints(f"{section}.endpoints", values[f"{section}.endpoints"])
    if len(set(settings.eval.temperatures)) < len(settings.eval.temperatures):
        raise UserError("eval.temperatures", _listed(settings.eval.temperatures), "one stands twice", "give each once")
    _check_draftings(settings.eval)
    if settings.eval.tensor_parallel > 1 and settings.eval.engine == "transformers":
        problem = "transformers (eval.engine) holds the target in one process"
        raise UserError("eval.tensor_parallel", settings.eval.tensor_parallel, problem, "set eval.engine=native, or 1")
    if settings.record.endpoints and settings.record.tensor_parallel > 1:
        problem = "servers record (record.endpoints), and hold the target as they were told (record.server_gpus)"
        raise UserError("record.tensor_parallel", settings.record.tensor_parallel, problem, "leave one of the two out")
    if settings.record.engine != "transformers" and settings.record.endpoints:
        problem = "servers record (record.endpoints), each in its own engine"
        raise UserError("record.engine", settings.record.engine, problem, "leave one of the two out")
    if settings.record.spool_shards is not None and settings.train.epochs != 1:
        problem = f"states in a spool (record.spool_shards = {settings.record.spool_shards}) are read once"
        raise UserError("train.epochs", settings.train.epochs, problem, "set train.epochs=1, or set no spool_shards")
    _check_heads(settings.draft.num_heads, settings.draft.num_kv_heads, settings.draft.head_dim)


def _check_limit(name: str, value: Any, limit: Limit) -> None:
    shown = _listed(value) if isinstance(value, tuple) else value
    if value == ():
        raise UserError(name, shown, "it is empty", "give one value or more")
    for item in value if isinstance(value, tuple) else (value,):
        if not limit.holds(item, limit.bound):
            raise UserError(name, shown, f"{item} makes no sense here", f"give {limit.words}")


def _check_name(name: str) -> None:
    if "/" in name or "\\" in name or name in (".", ".."):
        raise UserError("run.name", name, "it is no name of a folder", "give a name, and its folder as run.root")


def _check_layers(layers: tuple[int, ...] | None) -> None:
    if layers is not None and list(layers) != sorted(set(layers)):
        remedy = f"give {_listed(tuple(sorted(set(layers))))}"
        raise UserError("target.layers", _listed(layers), "layers are named once each, ascending", remedy)


def _check_endpoints(name: str, endpoints: tuple[str, ...]) -> None:
    for url in endpoints:
        if not ADDRESS.fullmatch(url):
            remedy = "give addresses, such as http://127.0.0.1:8000"
            raise UserError(name, _listed(endpoints), f'"{url}" is no address of a server', remedy)
        if endpoints.count(url) > 1:
            raise UserError(name, _listed(endpoints), f"{url} stands twice", "give each once")


def _check_draftings(chosen: EvalSettings) -> None:
    # A chain that is chosen may be one of those beside it, and is then measured once.
    fixed = {chain(chosen.chain)} if isinstance(chosen.chain, int) else set()
    shown, seen = _listed(chosen.beside), set(fixed)
    for name in chosen.beside:
        try:
            drafting = parse(name)
        except ValueError as error:
            remedy = "write chain K, or tree TOTAL/DEPTH/TOP_K, such as tree 60/7/10"
            raise UserError("eval.beside", shown, str(error), remedy) from None
        if drafting.method == "tree" and chosen.engine == "transformers":
            problem = f"transformers (eval.engine) cannot verify a {drafting.name}"
            raise UserError("eval.beside", shown, problem, "leave trees out, or set eval.engine=native")
        if drafting in seen:
            problem = f"{drafting.name} stands twice" + (f", eval.chain = {chosen.chain} counted" if fixed else "")
            raise UserError("eval.beside", shown, problem, "give each once")
        seen.add(drafting)


def _check_heads(heads: int | None, kv_heads: int | None, width: int | None) -> None:
    if heads is not None and kv_heads is not None and heads % kv_heads:
        problem = f"it does not divide draft.num_heads = {heads}"
        raise UserError("draft.num_kv_heads", kv_heads, problem, "give a divisor")
    if width is not None and width % 2:
        raise UserError("draft.head_dim", width, "rotary embeddings turn pairs", "give an even number")


def _listed(values: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(value) for value in values)}]"
