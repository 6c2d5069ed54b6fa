"""Stage 5: answer the test prompts with the draft and without it, and write down everything that happened.

    eagle3 eval configs/tiny.yaml

Every prompt is answered at every temperature plainly and once with each drafting, one right after the other, and in an
order that rotates among the prompts of a source, so that whatever else the machine does falls on all. Each such group is
appended to ``eval/traces.jsonl`` (the format is explained in :mod:`.traces`) and synced; a run that was interrupted goes
on with the next group. ``eval/eval.json`` says how the answers were made, and is written last: where it stands, the
stage is complete. Metrics are made from these two files (:mod:`.metrics`), so that they can be made again without decoding.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..configs.drafting import Drafting, named
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
from ..models.repeats import repeated
from ..models.target import DTYPES, TargetText, load_target, load_text, opened
from ..models.weights import weights_sha256
from .engines import AnyTarget, Loader, engine_name, load_engine, make_drafters, make_verifier, next_logits
from .environment import environment
from .speculate import Decoded, Drafter, Limits, Sampling, Verifier, decode
from .traces import BASELINE, SPECULATIVE, Lossless, Trace, pieces, resume

WARM_UP_TOKENS = 16


class Job(NamedTuple):
    """One prompt at one temperature; ``turn`` counts those of its source, and says which of its answers is the first."""

    conversation: Conversation
    prompt: list[int]
    sampling: Sampling
    turn: int


class Bench(NamedTuple):
    """What decodes: built once, used for every job. ``drafters``: by the name of their drafting, the main one first."""

    target: AnyTarget
    verifier: Verifier
    drafters: dict[str, Drafter]
    limits: Limits


def evaluate(settings: Settings, run_dir: Path, load: Loader = load_target) -> None:
    """Write ``eval/traces.jsonl`` and ``eval/eval.json``; nothing where they stand, the rest where some is missing.

    Args:
        settings: the recipe.
        run_dir: the run's folder, with ``conversations/prompts.jsonl`` and ``draft/``.
        load: where transformers' model comes from, if the recipe wants it.

    Raises:
        UserError: answers longer than the target's context, no test prompts, a target that the engine does not compute or
            for which there is no memory, a draft that does not fit it, or an evaluation that was begun with other
            settings, draft or prompts.
        Interrupted: a signal came; the groups so far are kept.
    """
    folder = run_dir / "eval"
    stage = Stage("eval", run_dir, folder, _inputs(settings, run_dir))
    if stage.begun() and (folder / "eval.json").exists():
        return
    chosen = dataclasses.replace(settings.target, dtype=settings.eval.dtype)
    draftings = named(settings.eval.chain, settings.eval.beside)
    text = load_text(chosen)
    jobs = _jobs(settings, run_dir, text)
    capacity = _capacity(settings.eval, draftings, jobs, text)
    target = load_engine(chosen, settings.eval.engine, capacity, load)
    draft = _fitting_draft(draft_folder(settings, run_dir), target)
    bench = Bench(
        target,
        make_verifier(target, capacity),
        make_drafters(draftings, target, draft, capacity),
        Limits(settings.eval.max_new_tokens, target.info.eos_ids),
    )
    stage.begin()
    traces, size = folder / "traces.jsonl", 1 + len(draftings)
    done = resume(traces, size)
    progress = Progress("eval", "answers", size * len(jobs), size * done)
    with StopRequest(stage.resume) as stop, traces.open("ab") as file:
        if done < len(jobs):
            most, end_ids = bench.limits
            _group(bench._replace(limits=Limits(min(WARM_UP_TOKENS, most), end_ids)), jobs[0])
        for number, job in enumerate(jobs[done:], done):
            group = _group(bench, job)
            file.write(b"".join(trace.to_line() for trace in group))
            file.flush()
            os.fsync(file.fileno())
            progress.advance(size, sum(len(trace.ids) for trace in group))
            stop.check(f"{number + 1} of {len(jobs)} prompts are answered")
    write_atomic(folder / "eval.json", encode_json(_description(settings, run_dir, target, draft)))


def draft_folder(settings: Settings, run_dir: Path) -> Path:
    """Where the head lies that is evaluated."""
    return run_dir / "draft" if settings.eval.draft is None else Path(settings.eval.draft)


def _inputs(settings: Settings, run_dir: Path) -> dict[str, Json]:
    draft, prompts = draft_folder(settings, run_dir), run_dir / "conversations" / "prompts.jsonl"
    weights, configuration = draft / WEIGHTS, draft / CONFIG
    for path, command in ((prompts, "prepare"), (weights, "train"), (configuration, "train")):
        if path.exists():
            continue
        if path.parent == draft and settings.eval.draft is not None:
            raise UserError("eval.draft", draft, f"there is no {path.name} in it", "give the folder of a head")
        raise UserError("run.name", settings.run.name, f"there is no {path}", f"run `eagle3 {command}` first")
    with opened(settings.target) as (located, where):
        checksum = weights_sha256(located, where)
    return {
        **{f"eval.{name}": value for name, value in _chosen(settings.eval).items()},
        "run.seed": settings.run.seed,
        "weights of the target": checksum,
        "weights of the draft": file_sha256(weights),
        "configuration of the draft": file_sha256(configuration),
        "prompts": file_sha256(prompts),
    }


def _chosen(settings: EvalSettings) -> dict[str, Json]:
    fields = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _fitting_draft(folder: Path, target: AnyTarget) -> Eagle3Draft:
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


def _jobs(settings: Settings, run_dir: Path, text: TargetText) -> list[Job]:
    """The test prompts, dealt evenly over their sources, at each temperature in turn."""
    found = [c for c in read_conversations(run_dir / "conversations" / "prompts.jsonl") if c.split == "test"]
    if not found:
        raise UserError("prepare.test", settings.prepare.test, "there are no test prompts", "give 1 or more")
    chosen = list(itertools.islice(deal(found), settings.eval.prompts))
    prompts = [prompt_ids(text.tokenizer, conversation) for conversation in chosen]
    jobs, turns = [], Counter[str]()
    for temperature in settings.eval.temperatures:
        for conversation, prompt in zip(chosen, prompts, strict=True):
            sampling = Sampling(temperature, settings.eval.sampling, _seed(settings, conversation.id))
            # Dealt prompts go round the sources: turns counted over all of them would give each source one order only.
            jobs.append(Job(conversation, prompt, sampling, turns[conversation.source]))
            turns[conversation.source] += 1
    return jobs


def _seed(settings: Settings, prompt_id: str) -> int:
    """A seed of the prompt's own, so that a report over fewer prompts has the same answers."""
    return digest(f"eval:{settings.run.seed}:{prompt_id}") % (1 << 31)


def _capacity(settings: EvalSettings, draftings: Sequence[Drafting], jobs: Sequence[Job], text: TargetText) -> int:
    """Positions of the longest request; of a tree, whose nodes stand side by side, each takes room and a level a position.

    Raises:
        UserError: the target has not as many.
    """
    answered = max(len(job.prompt) for job in jobs) + settings.max_new_tokens + 1
    needed = answered + max(drafting.length for drafting in draftings)
    if needed > text.max_positions:
        problem = f"prompt, answer and drafted tokens take {needed} positions, the target has {text.max_positions}"
        raise UserError("eval.max_new_tokens", settings.max_new_tokens, problem, "lower it or leave out long prompts")
    return answered + max(drafting.most for drafting in draftings)


def _group(bench: Bench, job: Job) -> list[Trace]:
    """The plain answer to one prompt, and the one of each drafting."""
    sides: list[str | None] = [None, *bench.drafters]
    first = job.turn % len(sides)
    answers: dict[str | None, Decoded] = {}
    for name in sides[first:] + sides[:first]:
        drafter = None if name is None else bench.drafters[name]
        answers[name] = decode(job.prompt, bench.verifier, drafter, bench.limits, job.sampling)
    return [_trace(bench, job, name, answers) for name in sides]


def _trace(bench: Bench, job: Job, name: str | None, answers: Mapping[str | None, Decoded]) -> Trace:
    answer, lossless = answers[name], None
    if name is not None and job.sampling.temperature == 0:
        lossless = compare(bench.target, job.prompt, answers[None].ids, answer.ids)
    return Trace(
        prompt_id=job.conversation.id,
        source=job.conversation.source,
        prompt=job.conversation.messages[-1]["content"],
        temperature=job.sampling.temperature,
        mode=BASELINE if name is None else SPECULATIVE,
        drafting=name,
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


def compare(target: AnyTarget, prompt: list[int], plain: list[int], fast: list[int]) -> Lossless:
    """Whether greedy answers are equal; else where they part, and how far apart the target's two best logits are there."""
    if plain == fast:
        return Lossless(True)
    pairs = itertools.zip_longest(plain, fast)
    position = next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)
    best, second = next_logits(target, prompt + plain[:position]).float().topk(2).values.tolist()
    return Lossless(False, position, best - second)


def _description(settings: Settings, run_dir: Path, target: AnyTarget, draft: Eagle3Draft) -> dict[str, Json]:
    chosen = settings.prepare.prompts
    shape, folder = dataclasses.asdict(draft.config), draft_folder(settings, run_dir)
    noted = read_config(folder / CONFIG)
    return {
        "schema": 1,
        "benchmark": chosen if chosen == "stdlib" else Path(chosen).stem,
        "settings": _chosen(settings.eval),
        "seed": settings.run.seed,
        "batch": 1,
        "engine": engine_name(target),
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
