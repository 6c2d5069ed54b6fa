"""Stage 5: answer the test prompts with the draft and without it, and write down everything that happened.

    eagle3 eval configs/tiny.yaml

Every prompt is answered at every temperature twice, plainly and speculatively, one right after the other and in turns
first among the prompts of a source, so that whatever else the machine does falls on both. Each pair is appended to ``eval/traces.jsonl`` (the format
is explained in :mod:`.traces`) and synced; a run that was interrupted goes on with the next pair. ``eval/eval.json``
says how the answers were made, and is written last: where it stands, the stage is complete. Metrics are made from these
two files (:mod:`.metrics`), so that they can be made again without decoding.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from ..configs.errors import UserError
from ..configs.settings import EvalSettings, Settings
from ..configs.signals import StopRequest
from ..data.chat import prompt_ids
from ..data.choice import deal
from ..data.conversations import Conversation, read_conversations
from ..data.corpus import digest
from ..data.files import encode_json, file_sha256, write_atomic
from ..data.progress import Progress
from ..data.stage import Json, Stage
from ..models.checkpoint import CONFIG, WEIGHTS, load_draft, read_config
from ..models.draft import Eagle3Draft
from ..models.native.draft import NativeDraft
from ..models.repeats import repeated
from ..models.target import DTYPES, Target, load_target
from .drafters import ChainDrafter
from .environment import ENGINE, environment
from .speculate import Decoded, Limits, Sampling, TargetVerifier, decode
from .traces import BASELINE, SPECULATIVE, Lossless, Trace, pieces, resume

WARM_UP_TOKENS = 16


class Job(NamedTuple):
    """One prompt at one temperature, and which of its two answers is the first."""

    conversation: Conversation
    prompt: list[int]
    sampling: Sampling
    speculative_first: bool


class Bench(NamedTuple):
    """What decodes: built once, used for every job."""

    target: Target
    verifier: TargetVerifier
    drafter: ChainDrafter
    limits: Limits


def evaluate(settings: Settings, run_dir: Path, target: Target) -> None:
    """Write ``eval/traces.jsonl`` and ``eval/eval.json``; nothing where they stand, the rest where some is missing.

    Args:
        settings: the recipe.
        run_dir: the run's folder, with ``conversations/prompts.jsonl`` and ``draft/``.
        target: the recipe's; loaded again where ``eval.dtype`` is not its own.

    Raises:
        UserError: answers longer than the target's context, no test prompts, a draft that does not fit the target, or
            an evaluation that was begun with other settings, draft or prompts.
        Interrupted: a signal came; the pairs so far are kept.
    """
    folder = run_dir / "eval"
    stage = Stage("eval", run_dir, folder, _inputs(settings, run_dir, target))
    if stage.begun() and (folder / "eval.json").exists():
        return
    if settings.eval.dtype != target.info.dtype:
        target = load_target(dataclasses.replace(settings.target, dtype=settings.eval.dtype))
    draft = _fitting_draft(draft_folder(settings, run_dir), target)
    jobs = _jobs(settings, run_dir, target)
    bench = _bench(settings.eval, target, draft, jobs)
    stage.begin()
    traces = folder / "traces.jsonl"
    done = resume(traces)
    progress = Progress("eval", "answers", 2 * len(jobs), 2 * done)
    with StopRequest(stage.resume) as stop, traces.open("ab") as file:
        if done < len(jobs):
            most, end_ids = bench.limits
            _pair(bench._replace(limits=Limits(min(WARM_UP_TOKENS, most), end_ids)), jobs[0])
        for number, job in enumerate(jobs[done:], done):
            pair = _pair(bench, job)
            file.write(b"".join(trace.to_line() for trace in pair))
            file.flush()
            os.fsync(file.fileno())
            progress.advance(2, sum(len(trace.ids) for trace in pair))
            stop.check(f"{number + 1} of {len(jobs)} prompts are answered")
    write_atomic(folder / "eval.json", encode_json(_description(settings, run_dir, target, draft)))


def draft_folder(settings: Settings, run_dir: Path) -> Path:
    """Where the head lies that is evaluated."""
    return run_dir / "draft" if settings.eval.draft is None else Path(settings.eval.draft)


def _inputs(settings: Settings, run_dir: Path, target: Target) -> dict[str, Json]:
    draft, prompts = draft_folder(settings, run_dir), run_dir / "conversations" / "prompts.jsonl"
    weights, configuration = draft / WEIGHTS, draft / CONFIG
    for path, command in ((prompts, "prepare"), (weights, "train"), (configuration, "train")):
        if path.exists():
            continue
        if path.parent == draft and settings.eval.draft is not None:
            raise UserError("eval.draft", draft, f"there is no {path.name} in it", "give the folder of a head")
        raise UserError("run.name", settings.run.name, f"there is no {path}", f"run `eagle3 {command}` first")
    chosen = dataclasses.asdict(settings.eval)
    return {
        **{f"eval.{name}": list(value) if isinstance(value, tuple) else value for name, value in chosen.items()},
        "run.seed": settings.run.seed,
        "weights of the target": target.info.weights_sha256,
        "weights of the draft": file_sha256(weights),
        "configuration of the draft": file_sha256(configuration),
        "prompts": file_sha256(prompts),
    }


def _fitting_draft(folder: Path, target: Target) -> Eagle3Draft:
    draft = load_draft(folder)
    for name, ours, theirs in (
        ("hidden size", draft.config.hidden_size, target.info.hidden_size),
        ("vocabulary", draft.config.vocab_size, target.info.vocab_size),
        ("captured layers", tuple(draft.config.target_layers), target.info.layers),
    ):
        if ours != theirs:
            problem = f"its {name} is {ours}, the target's is {theirs}"
            raise UserError("draft", folder, problem, "set target.path and target.layers to what it was trained on")
    return draft.to(device=target.device, dtype=DTYPES[target.info.dtype]).eval()


def _jobs(settings: Settings, run_dir: Path, target: Target) -> list[Job]:
    """The test prompts, dealt evenly over their sources, at each temperature in turn."""
    found = [c for c in read_conversations(run_dir / "conversations" / "prompts.jsonl") if c.split == "test"]
    if not found:
        raise UserError("prepare.test", settings.prepare.test, "there are no test prompts", "give 1 or more")
    chosen = list(itertools.islice(deal(found), settings.eval.prompts))
    prompts = [prompt_ids(target.tokenizer, conversation) for conversation in chosen]
    jobs, turns = [], Counter[str]()
    for temperature in settings.eval.temperatures:
        for conversation, prompt in zip(chosen, prompts, strict=True):
            sampling = Sampling(temperature, settings.eval.sampling, _seed(settings, conversation.id))
            # Dealt prompts go round the sources: turns counted over all of them would give each source one order only.
            jobs.append(Job(conversation, prompt, sampling, turns[conversation.source] % 2 == 1))
            turns[conversation.source] += 1
    return jobs


def _seed(settings: Settings, prompt_id: str) -> int:
    """A seed of the prompt's own, so that a report over fewer prompts has the same answers."""
    return digest(f"eval:{settings.run.seed}:{prompt_id}") % (1 << 31)


def _bench(settings: EvalSettings, target: Target, draft: Eagle3Draft, jobs: list[Job]) -> Bench:
    capacity = max(len(job.prompt) for job in jobs) + settings.max_new_tokens + settings.chain + 1
    if capacity > target.info.max_positions:
        problem = f"prompt, answer and chain take {capacity} positions, the target has {target.info.max_positions}"
        raise UserError("eval.max_new_tokens", settings.max_new_tokens, problem, "lower it or leave out long prompts")
    return Bench(
        target,
        TargetVerifier(target, capacity),
        ChainDrafter(NativeDraft(draft, target.head.embedding, capacity, settings.chain), settings.chain),
        Limits(settings.max_new_tokens, target.info.eos_ids),
    )


def _pair(bench: Bench, job: Job) -> tuple[Trace, Trace]:
    """The plain and the speculative answer to one prompt."""
    answers: dict[str, Decoded] = {}
    for mode in (SPECULATIVE, BASELINE) if job.speculative_first else (BASELINE, SPECULATIVE):
        drafter = bench.drafter if mode == SPECULATIVE else None
        answers[mode] = decode(job.prompt, bench.verifier, drafter, bench.limits, job.sampling)
    plain, fast = answers[BASELINE], answers[SPECULATIVE]
    lossless = compare(bench.target, job.prompt, plain.ids, fast.ids) if job.sampling.temperature == 0 else None
    return _trace(bench, job, BASELINE, plain, None), _trace(bench, job, SPECULATIVE, fast, lossless)


def _trace(bench: Bench, job: Job, mode: str, answer: Decoded, lossless: Lossless | None) -> Trace:
    return Trace(
        prompt_id=job.conversation.id,
        source=job.conversation.source,
        prompt=job.conversation.messages[-1]["content"],
        temperature=job.sampling.temperature,
        mode=mode,
        seed=job.sampling.seed,
        input_tokens=len(job.prompt),
        ids=tuple(answer.ids),
        pieces=tuple(pieces(bench.target.tokenizer, answer.ids)),
        authors=tuple(answer.authors),
        repeated=tuple(repeated(answer.ids)),
        finish="stop" if answer.finished else "length",
        rounds=tuple(answer.rounds),
        ttft_s=answer.ttft_s,
        total_s=answer.total_s,
        lossless=lossless,
    )


def compare(target: Target, prompt: list[int], plain: list[int], fast: list[int]) -> Lossless:
    """Whether greedy answers are equal; else where they part, and how far apart the target's two best logits are there."""
    if plain == fast:
        return Lossless(True)
    pairs = itertools.zip_longest(plain, fast)
    position = next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)
    states = target.forward(torch.tensor([prompt + plain[:position]])).last_hidden
    best, second = target.logits(states[0, -1]).float().topk(2).values.tolist()
    return Lossless(False, position, best - second)


def _description(settings: Settings, run_dir: Path, target: Target, draft: Eagle3Draft) -> dict[str, Json]:
    chosen = settings.prepare.prompts
    shape, folder = dataclasses.asdict(draft.config), draft_folder(settings, run_dir)
    noted = read_config(folder / CONFIG)
    return {
        "schema": 1,
        "benchmark": chosen if chosen == "stdlib" else Path(chosen).stem,
        "settings": {**dataclasses.asdict(settings.eval), "temperatures": list(settings.eval.temperatures)},
        "seed": settings.run.seed,
        "batch": 1,
        "engine": ENGINE,
        "target": {
            **dataclasses.asdict(target.info),
            "eos_ids": list(target.info.eos_ids),
            "layers": list(target.info.layers),
        },
        "draft": {
            **shape,
            "target_layers": list(draft.config.target_layers),
            "parameters": sum(parameter.numel() for parameter in draft.parameters()),
            "weights_sha256": file_sha256(folder / WEIGHTS),
            "training": noted.get("eagle3_training"),
            "imported": noted.get("eagle3_import"),
        },
        "environment": environment(target.device),
    }
