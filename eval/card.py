"""The model card of a head: how to serve it, what it gains, where it comes from, and its figures for other programs.

Figures stand in the card's front matter as a ``model-index``, which the Hugging Face hub shows: one metric of type
``acceptance_length`` a temperature, with its drafting as ``args``. Whoever imports the head can compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..data.answers import GIVEN
from ..data.files import file_sha256
from ..models.checkpoint import WEIGHTS
from ..models.draft import DraftConfig
from ..models.engines import FLAGS
from ..models.formats import FORMATS, Origin
from ..models.target import location
from . import tables
from .headlines import compared, drafting_of, is_plain, overall

CARD = "README.md"
ACCEPTANCE = "acceptance_length"
#: Without these a figure cannot be compared.
ARGUMENTS = {"temperature", "drafting", "prompts", "output_tokens_mean", "dtype"}
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


def card(run: Path, name: str, out: Path, origin: Origin, config: DraftConfig) -> str:
    """The card of the head of ``run``, exported to ``out`` in format ``name``."""
    target, training, weights = origin.target, origin.training, file_sha256(run / "draft" / WEIGHTS)
    report = _report(run, weights)
    launch = LAUNCH[name].format(
        target=location(target["name"]), folder=out, chain=origin.chain, nodes=origin.chain + 1
    )
    facts = [
        ["target", f"{target['name']}, revision {target['revision'] or 'none'}, {target['dtype']}"],
        ["target's weights, SHA-256", target["weights_sha256"]],
        ["head's weights, SHA-256", weights],
        ["captured layers, by output, 0-based", ", ".join(map(str, config.target_layers))],
        ["vocabulary", f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens"],
        ["training", f"{training['objective']}, {training['ttt_steps']} TTT steps, step {training['step']:,} kept"],
        ["began as", training["warm_start"] or "the target's LM head and an induction head"],
        ["training data", _training_data(run)],
        ["EAGLE-3.1", ", ".join(f"{flag} {getattr(config, flag)}" for flag in FLAGS)],
    ]
    title = f"EAGLE-3 draft head for {target['name']}"
    front = {"base_model": target["name"], "tags": ["eagle3", "speculative-decoding"]} | _index(title, report)
    gains = _gains(report) if report else "Not measured."
    parts = [
        f"# {title}",
        f"Format: {FORMATS[name].text}. To serve:",
        f"```\n{launch}\n```",
        "## What it gains",
        gains,
        "## Where it comes from",
        tables.markdown_table(["fact", "value"], facts),
    ]
    return front_matter(front) + "\n\n".join(parts) + "\n"


def front_matter(front: dict[str, Any]) -> str:
    """What stands above a card, for programs."""
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---\n\n"


def figures(folder: Path) -> list[dict[str, Any]]:
    """What the card in ``folder`` says was measured: the metrics of its ``model-index``, each with its benchmark.

    Returns:
        ``{"benchmark", "value", "args"}`` of every acceptance length; [] where there is no such card.
    """
    path = folder / CARD
    parts = path.read_text(errors="replace").split("---\n", 2) if path.exists() else []
    if len(parts) < 3 or parts[0]:
        return []
    try:
        front = yaml.safe_load(parts[1])
        return [
            {"benchmark": result["dataset"]["name"], "value": metric["value"], "args": metric["args"]}
            for model in front.get("model-index", [])
            for result in model["results"]
            for metric in result["metrics"]
            if metric["type"] == ACCEPTANCE and metric["args"].keys() >= ARGUMENTS
        ]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):  # a card of another making
        return []


def _index(title: str, report: dict[str, Any] | None) -> dict[str, Any]:
    """The ``model-index`` of a front matter, as the hub reads it."""
    if report is None:
        return {}
    entries = _measured(report)
    metrics = [
        {
            "type": ACCEPTANCE,
            "name": f"acceptance length, {tables.drafting(entry)}, {tables.temperature_name(entry['temperature'])}",
            "value": round(entry["acceptance_length"], 4),
            "args": {
                "temperature": entry["temperature"],
                "drafting": entry["drafting"],
                "acceptance_by_position": [round(share, 4) for share in entry["acceptance_by_position"]],
                "prompts": entry["n_prompts"],
                "output_tokens_mean": round(entry["output_tokens_mean"], 4),
                "dtype": entry["dtype"],
            },
        }
        for entry in entries
    ]
    name = entries[0]["benchmark"]
    result = {"task": {"type": "text-generation"}, "dataset": {"name": name, "type": name}, "metrics": metrics}
    return {"model-index": [{"name": title, "results": [result]}]}


def _training_data(run: Path) -> str:
    path = run / "conversations" / "answers.summary.json"
    if not path.exists():
        return "not recorded"
    summary = json.loads(path.read_text())
    shares = ", ".join(f"T={key}: {count:,}" for key, count in summary["by_temperature"].items())
    tokens, answers, train = summary["answer_tokens"], summary["answers"], summary["by_split"]["train"]
    whole = f"{answers:,} with validation and test, {tokens:,} tokens, {shares}"
    given = summary["by_finish"].get(GIVEN, 0)
    kept = f" and {given:,} that came with their conversations" if given else ""
    return f"{train - given:,} answers of the target's own{kept} ({whole})"


def _report(run: Path, weights: str) -> dict[str, Any] | None:
    """The run's report, if it is about the head with these weights."""
    path = run / "eval" / "report.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found and found["draft"]["weights_sha256"] == weights else None


def _measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the main draftings gained over all prompts, and the fixed chain where others were chosen."""
    found = [entry for pair in zip(overall(report), compared(report), strict=True) for entry in pair]
    once = {(entry["temperature"], drafting_of(entry)): entry for entry in reversed(found) if not is_plain(entry)}
    return list(reversed(once.values()))


def _gains(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{entry['temperature']:g}",
            tables.drafting_name(entry),
            tables.length_of(entry),
            tables.length_of(entry["without_repeats"]),
            " ".join(tables.percent(share) for share in entry["acceptance_by_position"]),
            tables.speedup_of(entry),
        ]
        for entry in _measured(report)
    ]
    header = ["T", "drafting", "acceptance length", "without repeats", "by position", "speed-up"]
    return f"Measured with {tables.conditions(report)}.\n\n{tables.markdown_table(header, rows)}"
