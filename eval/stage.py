"""Stage 5: answer the test prompts with the draft and without it, and write down everything that happened.

    eagle3 eval configs/tiny.yaml
    torchrun --nproc-per-node 8 --no-python eagle3 eval configs/maverick.yaml eval.tensor_parallel=8    # one process a GPU

Every prompt is answered at every temperature plainly and once with each drafting, one right after the other, and in an
order that rotates among the prompts of a source, so that whatever else the machine does falls on all. Each such group is
appended to ``eval/traces.jsonl`` (the format is explained in :mod:`.traces`) and synced; a run that was interrupted goes
on with the next group. Which chain is the main one is measured before, if the recipe says so (:mod:`.calibration`). ``eval/eval.json`` says how the answers were made, and is written last: where it stands, the
stage is complete. Metrics are made from these two files (:mod:`.metrics`), so that they can be made again without decoding.

Processes that hold the target together (``eval.tensor_parallel``) all decode the same; the first looks at files and writes
them, and tells the others what it found (:mod:`.agreement`). A signal to one ends all after the same group.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..configs.drafting import AUTO, PLAIN, Drafting, candidates, named
from ..configs.entry import started
from ..configs.errors import UserError
from ..configs.settings import EvalSettings, Settings, TargetSettings
from ..configs.signals import StopRequest
from ..data.files import encode_json, file_sha256, write_atomic
from ..data.progress import Progress
from ..data.stage import Json, Stage
from ..data.threads import Work, computing, shapes
from ..models.checkpoint import CONFIG, WEIGHTS, load_draft, read_config
from ..models.draft import Eagle3Draft
from ..models.native.parallel import Group, join, launched
from ..models.repeats import repeated
from ..models.target import load_target, load_text, opened
from ..models.weights import weights_sha256
from . import calibration as calibrating
from .agreement import led, stopping
from .calibration import Request
from .engines import (
    AnyTarget,
    Loader,
    engine_name,
    head_bytes,
    load_engine,
    make_drafters,
    make_verifier,
    next_logits,
    verify_once,
)
from .environment import environment
from .jobs import Job, make_jobs, positions, validation_requests
from .metrics import draftings as draftings_at
from .speculate import Decoded, Drafter, Limits, Verifier, decode
from .traces import BASELINE, SPECULATIVE, Lossless, Trace, pieces, resume

WARM_UP_TOKENS = 16


class Plan(NamedTuple):
    """What is to be done: ``jobs``, for requests of at most ``capacity`` positions.

    ``requests``: by temperature, on which a chain is still to be chosen; None where nothing is. ``calibration``: what was
    chosen before.
    """

    stage: Stage
    jobs: list[Job]
    capacity: int
    requests: dict[float, list[Request]] | None
    calibration: dict[str, Any] | None


class Bench(NamedTuple):
    """What decodes: built once, used for every job.

    ``drafters``: by the name of their drafting. ``sides``: by temperature, the names of those that answer, the main one first.
    """

    target: AnyTarget
    verifier: Verifier
    drafters: dict[str, Drafter]
    sides: dict[float, list[str]]
    limits: Limits


def evaluate(settings: Settings, run_dir: Path, load: Loader = load_target) -> None:
    """Write ``eval/traces.jsonl`` and ``eval/eval.json``; nothing where they stand, the rest where some is missing.

    Of processes that hold the target together (``eval.tensor_parallel``) all call this, and come to the same end.

    Args:
        settings: the recipe.
        run_dir: the run's folder, with ``conversations/prompts.jsonl`` and ``draft/``.
        load: where transformers' model comes from, if the recipe wants it.

    Raises:
        UserError: answers longer than the target's context, no test prompts, a target that the engine does not compute or
            for which there is no memory, a draft that does not fit it, an evaluation that was begun with other settings,
            draft or prompts, or another number of processes than the recipe says.
        Interrupted: a signal came; the groups so far are kept.
        Told: the first process raises one of these, and this is another.
    """
    chosen = settings.eval
    draftings = named(chosen.chain, chosen.beside) if isinstance(chosen.chain, int) else candidates(chosen.beside)
    group = _processes(settings, run_dir)
    plan = led(group, lambda: _plan(settings, run_dir, draftings))
    if plan is None:
        return
    draft = load_draft(draft_folder(settings, run_dir)).eval()
    beside = head_bytes(draftings, draft.config, plan.capacity, chosen.dtype, group)
    target = load_engine(_target(settings), chosen.engine, plan.capacity, load, group, beside)
    _check_fits(draft_folder(settings, run_dir), draft, target)
    bench = Bench(
        target,
        make_verifier(target, plan.capacity),
        make_drafters(draftings, target, draft, plan.capacity),
        {},
        Limits(chosen.max_new_tokens, target.info.eos_ids),
    )
    work = Work.of(shapes(target), 1 + max(drafting.length for drafting in draftings))
    unit = partial(verify_once, bench.verifier, target.device)
    with computing("eval", work, target.device, unit, plan.stage.folder):
        calibration = plan.calibration if plan.requests is None else _calibrate(plan, plan.requests, bench, group)
        known: dict[str, Any] = {"settings": _chosen(chosen), "calibration": calibration}
        sides = {t: [found.name for found in draftings_at(known, t) if found != PLAIN] for t in chosen.temperatures}
        _answer(plan, bench._replace(sides=sides), group)
        if group is None or group.rank == 0:
            described = _description(settings, run_dir, target, draft, 1 if group is None else group.size)
            described["calibration"] = calibration
            write_atomic(plan.stage.folder / "eval.json", encode_json(described))


def _processes(settings: Settings, run_dir: Path) -> Group | None:
    """Those that hold the target together; what is complete needs none."""
    if started() == 1 and (run_dir / "eval" / "eval.json").exists():
        return None
    return join(settings.eval.tensor_parallel)


def _target(settings: Settings) -> TargetSettings:
    return dataclasses.replace(settings.target, dtype=settings.eval.dtype)


def _plan(settings: Settings, run_dir: Path, draftings: Sequence[Drafting]) -> Plan | None:
    """None where nothing is to be done."""
    stage = Stage("eval", run_dir, run_dir / "eval", _inputs(settings, run_dir))
    stage.resume = launched(stage.resume, settings.eval.tensor_parallel)
    if stage.begun() and (stage.folder / "eval.json").exists():
        return None
    text = load_text(_target(settings))
    jobs, requests, calibration = make_jobs(settings, run_dir, text), None, None
    prompts = [job.prompt for job in jobs]
    if settings.eval.chain == AUTO and (calibration := calibrating.read(stage.folder)) is None:
        requests = validation_requests(settings, run_dir, text)
        prompts += [request.prompt for found in requests.values() for request in found]
    capacity = positions(settings.eval, draftings, max(map(len, prompts)), text)
    return Plan(stage, jobs, capacity, requests, calibration)


def _calibrate(
    plan: Plan, requests: Mapping[float, Sequence[Request]], bench: Bench, group: Group | None
) -> dict[str, Any]:
    """Choose a chain for each temperature; of a group all decode, and the first chooses and writes."""
    chains = [bench.drafters[drafting.name] for drafting in candidates(())]
    clock = calibrating.clock_of(bench.target.device, alone=group is None)
    found = calibrating.calibrate(requests, bench.verifier, chains, bench.limits, clock)

    def write() -> dict[str, Any]:
        plan.stage.begin()
        write_atomic(plan.stage.folder / calibrating.FILE, encode_json(found))
        print(calibrating.words(found), file=sys.stderr, flush=True)
        return found

    return led(group, write)


def _answer(plan: Plan, bench: Bench, group: Group | None) -> None:
    """Answer what has no answers yet; of a group all answer, and the first writes."""
    jobs, traces = plan.jobs, plan.stage.folder / "traces.jsonl"
    sizes = [1 + len(bench.sides[job.sampling.temperature]) for job in jobs]
    done = led(group, lambda: _begin(plan.stage, traces, sizes))
    progress = Progress("eval", "answers", sum(sizes), sum(sizes[:done]))
    writing = traces.open("ab") if group is None or group.rank == 0 else nullcontext()
    with StopRequest(plan.stage.resume) as stop, writing as file:
        if done < len(jobs):
            most, end_ids = bench.limits
            _group(bench._replace(limits=Limits(min(WARM_UP_TOKENS, most), end_ids)), jobs[0])
        for number, job in enumerate(jobs[done:], done):
            answers = _group(bench, job)
            if file is not None:
                file.write(b"".join(trace.to_line() for trace in answers))
                file.flush()
                os.fsync(file.fileno())
                progress.advance(len(answers), sum(len(trace.ids) for trace in answers))
            if stopping(group, stop):
                raise stop.end(f"{number + 1} of {len(jobs)} prompts are answered")


def _begin(stage: Stage, traces: Path, sizes: Sequence[int]) -> int:
    """How many groups of so many answers there are."""
    stage.begin()
    return resume(traces, sizes)


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


def _check_fits(folder: Path, draft: Eagle3Draft, target: AnyTarget) -> None:
    for name, ours, theirs in (
        ("hidden size", draft.config.hidden_size, target.info.hidden_size),
        ("vocabulary", draft.config.vocab_size, target.info.vocab_size),
        ("captured layers", tuple(draft.config.target_layers), target.info.layers),
    ):
        if ours != theirs:
            problem = f"its {name} is {ours}, the target's is {theirs}"
            raise UserError("draft", folder, problem, "set target.path and target.layers to what it was trained on")


def _group(bench: Bench, job: Job) -> list[Trace]:
    """The plain answer to one prompt, and the one of each drafting."""
    sides: list[str | None] = [None, *bench.sides[job.sampling.temperature]]
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


def _description(
    settings: Settings, run_dir: Path, target: AnyTarget, draft: Eagle3Draft, processes: int
) -> dict[str, Json]:
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
        "environment": environment(target.device, processes),
    }
