"""A run's head for a serving engine: the files in its format, a model card, and the check that it will be understood.

export(Path("runs/demo"), "vllm", Path("heads/demo"))
check(Path("runs/demo"), "vllm", Path("heads/demo"), against="http://127.0.0.1:8000")
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from ..configs.errors import Incomplete, UserError
from ..configs.loader import load
from ..configs.settings import Settings
from ..data.chat import prompt_ids
from ..data.conversations import read_conversations
from ..data.files import encode_json, write_folder
from ..data.progress import Progress
from ..models.checkpoint import CONFIG, WEIGHTS, load_draft, read_config
from ..models.draft import Eagle3Draft
from ..models.engines import read_files
from ..models.formats import FORMATS, PROVENANCE, Origin, engines_of, write
from ..models.formats import check as check_files
from ..models.target import DTYPES, load_text
from .card import CARD, card
from .engines import load_engine
from .live import LiveEngine, connect
from .serving import ask, decode_all, differences, room

SHOWN = 5  # differences that are told; one fault shows in hundreds of tokens


class Head(NamedTuple):
    """A run's head, and what its run says of it."""

    settings: Settings
    draft: Eagle3Draft
    dtype: torch.dtype
    origin: Origin


def read_head(run: Path) -> Head:
    """The head of ``run``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise UserError("RUN", run, "it is no run", "give the folder of a run, such as runs/tiny")
    if not (run / "draft" / CONFIG).is_file():
        raise UserError("RUN", run, "it has no head yet", "run `eagle3 train` first, to its end")
    settings, config = load(run / "config.yaml"), read_config(run / "draft" / CONFIG)
    draft = load_draft(run / "draft")
    origin = Origin(config[PROVENANCE], config["eagle3_training"], settings.eval.fixed_chain)
    return Head(settings, draft, DTYPES[config["dtype"]], origin)


def form_of(name: str) -> str:
    """``name`` if it is a format.

    Raises:
        UserError: it is none.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(FORMATS)}"
        raise UserError("--format", name, "there is no such format", remedy)
    return name


def export(run: Path, name: str, out: Path) -> None:
    """Write the head of ``run`` to ``out`` in format ``name``, with its card, and check it.

    Raises:
        UserError: no such format, no head, a head that the format's engine cannot serve, or an ``out`` that is not
            empty or cannot be written.
    """
    head = read_head(run)
    files = write(form_of(name), head.draft, head.dtype, head.origin, str(out))
    config = {WEIGHTS: save(files.tensors, metadata={"format": "pt"}), CONFIG: encode_json(files.config)}
    texts = {**files.texts, CARD: card(run, name, out, head.origin, head.draft.config)}
    write_folder(out, config | {file: text.encode() for file, text in texts.items()}, "--out")
    check(run, name, out)


def check(run: Path, name: str, out: Path, against: str | None = None, prompts: int = 100) -> None:
    """Read ``out`` as the engines of format ``name`` do, and ask a live one, if ``against`` is its address.

    Raises:
        UserError: a file is missing or damaged, or the engine does not answer.
        Incomplete: an engine would not run, or does not run, the head of ``run``.
    """
    if prompts < 1:
        raise UserError("--prompts", prompts, "nothing to compare", "give 1 or more")
    head = read_head(run)
    faults = check_files(form_of(name), read_files(out), head.draft, head.origin)
    if faults:
        raise Incomplete("\n".join([f"{out} is not the head of {run}", *(f"  {fault}" for fault in faults)]))
    readers = " and ".join(engine.title for engine in engines_of(name, head.draft.config))
    print(f"{out} is the head of {run}, as {readers} will read it")
    if against is not None:
        _compare(run, head, connect(against), prompts)


def _compare(run: Path, head: Head, engine: LiveEngine, count: int) -> None:
    text = load_text(head.settings.target)
    found = [c for c in read_conversations(run / "conversations" / "prompts.jsonl") if c.split == "test"][:count]
    if not found:
        raise UserError("prepare.test", head.settings.prepare.test, "there are no test prompts", "give 1 or more")
    prompts = [prompt_ids(text.tokenizer, conversation) for conversation in found]
    most = head.settings.eval.max_new_tokens
    chosen = head.settings.eval
    # This is one process: what several hold together in the native engine, transformers spreads over the GPUs that it sees.
    engine_here = chosen.engine if chosen.tensor_parallel == 1 else "transformers"
    target = load_engine(head.settings.target, engine_here, room(prompts, head.origin.chain, most))
    draft = head.draft.to(device=target.device, dtype=DTYPES[target.info.dtype]).eval()
    progress = Progress("decode", "answers", len(prompts))
    ours = decode_all(target, draft, prompts, head.origin.chain, most, lambda tokens: progress.advance(1, tokens))
    theirs = ask(engine, prompts, most)
    print(f"{len(prompts)} test prompts, greedy, chain of {head.origin.chain}, {target.info.dtype} here")
    print(f"  our decoder       {ours.counters}")
    print(f"  {engine.url:<17} {theirs.counters}")
    faults = differences(target, prompts, ours, theirs)
    if faults:
        shown = [f"  {fault}" for fault in faults[:SHOWN]]
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise Incomplete("\n".join([f"{engine.url} does not run the head of {run} as we do", *shown, *more]))
    where = "at every position" if theirs.counters.by_position else "in all; it does not count by position"
    print(f"  the same tokens, and accepted counts within 1% {where}")
