"""A run's head for a serving engine: the files in its format, a model card, and the check that it will be understood.

export(Path("runs/demo"), "vllm", Path("heads/demo"))
check(Path("runs/demo"), "vllm", Path("heads/demo"), against="http://127.0.0.1:8000")
"""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save

from ..configs.errors import Incomplete, UserError
from ..configs.loader import load
from ..configs.settings import Settings
from ..data.chat import prompt_ids
from ..data.conversations import read_conversations
from ..data.files import encode_json, file_sha256, write_atomic
from ..data.progress import Progress
from ..models.checkpoint import CONFIG, WEIGHTS, load_draft, read_config
from ..models.draft import Eagle3Draft
from ..models.formats import FORMATS, PROVENANCE, Origin, engines_of, read_files, write
from ..models.formats import check as check_files
from ..models.target import DTYPES, load_target, location
from . import tables
from .serving import LiveEngine, ask, decode_all, differences

CARD = "README.md"
SHOWN = 5  # differences that are told; one fault shows in hundreds of tokens
LAUNCH = {
    "hf": "vllm serve {target} --speculative-config "
    '\'{{"method": "eagle3", "model": "{folder}", "num_speculative_tokens": {chain}}}\'',
    "sglang": "python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 "
    "--speculative-draft-model-path {folder} --speculative-num-steps {chain} --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens {nodes}",
    "trtllm": "trtllm-serve {target} --backend pytorch --extra_llm_api_options {folder}/trtllm.yaml",
    "speculators": "vllm serve {folder}",
    "eagle": 'python -c "from eagle.model.ea_model import EaModel; EaModel.from_pretrained('
    "base_model_path='{target}', ea_model_path='{folder}', use_eagle3=True)\"",
}
LAUNCH["vllm"] = LAUNCH["hf"]


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
    origin = Origin(config[PROVENANCE], config["eagle3_training"], settings.eval.chain)
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
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError("--out", out, "something stands there", "choose a new folder")
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_atomic(part / WEIGHTS, save(files.tensors, metadata={"format": "pt"}))
        write_atomic(part / CONFIG, encode_json(files.config))
        for file, text in {**files.texts, CARD: card(run, name, out, head)}.items():
            write_atomic(part / file, text.encode())
        if out.exists():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise UserError("--out", out, problem, "choose a folder with free space that you may write to") from error
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
        _compare(run, head, LiveEngine(against), prompts)


def _compare(run: Path, head: Head, engine: LiveEngine, count: int) -> None:
    engine.model()  # asked first: our own decoder takes minutes
    target = load_target(head.settings.target)
    found = [c for c in read_conversations(run / "conversations" / "prompts.jsonl") if c.split == "test"][:count]
    if not found:
        raise UserError("prepare.test", head.settings.prepare.test, "there are no test prompts", "give 1 or more")
    prompts = [prompt_ids(target.tokenizer, conversation) for conversation in found]
    most = head.settings.eval.max_new_tokens
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
    print("  the same tokens, and accepted counts within 1% at every position")


def card(run: Path, name: str, out: Path, head: Head) -> str:
    """The model card: how to serve the head, what it gains, and where it comes from."""
    target, training, config = head.origin.target, head.origin.training, head.draft.config
    launch = LAUNCH[name].format(
        target=location(target["name"]), folder=out, chain=head.origin.chain, nodes=head.origin.chain + 1
    )
    front = {"base_model": target["name"], "tags": ["eagle3", "speculative-decoding"]}
    facts = [
        ["target", f"{target['name']}, revision {target['revision'] or 'none'}, {target['dtype']}"],
        ["target's weights, SHA-256", target["weights_sha256"]],
        ["head's weights, SHA-256", file_sha256(run / "draft" / WEIGHTS)],
        ["captured layers, by output, 0-based", ", ".join(map(str, config.target_layers))],
        ["vocabulary", f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens"],
        ["training", f"{training['objective']}, {training['ttt_steps']} TTT steps, step {training['step']:,} kept"],
        ["training data", _training_data(run)],
        ["EAGLE-3.1", f"fc_norm {config.fc_norm}, norm_output {config.norm_output}"],
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# EAGLE-3 draft head for {target['name']}",
            "",
            f"Format: {FORMATS[name].text}. To serve:",
            "",
            f"```\n{launch}\n```",
            "",
            "## What it gains",
            "",
            _gains(run),
            "",
            "## Where it comes from",
            "",
            tables.markdown_table(["fact", "value"], facts),
            "",
        ]
    )


def _training_data(run: Path) -> str:
    path = run / "conversations" / "answers.summary.json"
    if not path.exists():
        return "not recorded"
    summary = json.loads(path.read_text())
    shares = ", ".join(f"T={key}: {count:,}" for key, count in summary["by_temperature"].items())
    tokens, answers, train = summary["answer_tokens"], summary["answers"], summary["by_split"]["train"]
    whole = f"{answers:,} with validation and test, {tokens:,} tokens, {shares}"
    return f"{train:,} answers of the target's own ({whole})"


def _gains(run: Path) -> str:
    path = run / "eval" / "report.json"
    if not path.exists():
        return "Not measured."
    report: dict[str, Any] = json.loads(path.read_text())
    rows = [
        [
            f"{entry['temperature']:g}",
            tables.length_of(entry),
            tables.length_of(entry["without_repeats"]),
            " ".join(tables.percent(share) for share in entry["acceptance_by_position"]),
            tables.speedup_of(entry),
        ]
        for entry in tables.overall(report)
    ]
    header = ["T", "acceptance length", "without repeats", "by position", "speed-up"]
    return f"Measured with {tables.conditions(report)}.\n\n{tables.markdown_table(header, rows)}"
