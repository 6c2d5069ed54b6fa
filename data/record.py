"""Stage 3: run the target over prompts and answers, and keep its hidden states.

    eagle3 record configs/tiny.yaml

Which samples make up which batch and shard is planned from the answers alone, before anything is recorded. So a recorder
that is killed records the missing shards when it is started again, and the store is the same to the byte.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..configs.errors import Incomplete, UserError
from ..configs.settings import RecordSettings, Settings
from ..configs.signals import StopRequest
from ..models.target import DTYPES, Target
from . import store
from .chat import sequence, tokenizer_hash
from .conversations import Answer, read_answers, read_conversations
from .files import file_sha256, remove_temporaries, write_atomic
from .progress import Progress
from .stage import Json, Stage
from .store import Manifest, StoreSample
from .vocabulary import count_tokens

#: How far a recorded greedy token's logit may lie below the top one: batches of another shape round differently.
TIE = {"float32": 1e-3, "bfloat16": 0.5}


def record(settings: Settings, run_dir: Path, target: Target) -> None:
    """Write ``store/``; shards that are there are kept.

    Raises:
        UserError: there are no answers, or the store was begun with other settings.
        Incomplete: recorded states are not what the target's own answers say they are.
        Interrupted: a signal came; the finished shards are kept.
    """
    conversations, folder = run_dir / "conversations", run_dir / "store"
    stage = Stage("record", run_dir, folder, _inputs(settings, conversations, target))
    if stage.begun() and (folder / store.MANIFEST).exists():
        return
    answers = _ordered(conversations)
    stage.begin()
    remove_temporaries(folder)
    shards = plan(answers, settings.record)
    done = store.recorded_shards(folder, len(shards))
    progress = Progress("record", "shards", len(shards), len(done))
    with StopRequest(stage.resume) as stop:
        for index, batches in enumerate(shards):
            if index in done:
                continue
            samples = [sample for batch in batches for sample in _recorded(batch, answers, target, settings.record)]
            in_order = [sample for _, sample in sorted(samples, key=lambda numbered: numbered[0])]
            entry = store.write_shard(folder, index, in_order)
            done.add(index)
            progress.advance(1, entry.tokens)
            stop.check(f"{len(done)} of {len(shards)} shards are recorded")
        _finish(settings, folder, target, answers, len(shards))


def plan(answers: list[Answer], settings: RecordSettings) -> list[list[list[int]]]:
    """Shards of batches of answers' indices: consecutive answers a shard, of similar length a batch."""
    lengths = [len(answer.prompt_ids) + len(answer.answer_ids) for answer in answers]
    return [
        _groups(sorted(shard, key=lambda i: (lengths[i], i)), lengths, settings.batch_tokens, padded=True)
        for shard in _groups(list(range(len(answers))), lengths, settings.shard_tokens, padded=False)
    ]


def _groups(indices: list[int], lengths: list[int], limit: int, padded: bool) -> list[list[int]]:
    """Cut ``indices`` into runs of at most ``limit`` tokens, each sample counted as its run's longest if ``padded``."""
    groups: list[list[int]] = []
    tokens = 0
    for index in indices:
        longer = (len(groups[-1]) + 1) * lengths[index] if groups and padded else tokens + lengths[index]
        if not groups or longer > limit:
            groups.append([])
            longer = lengths[index]
        groups[-1].append(index)
        tokens = longer
    return groups


def _recorded(
    batch: list[int], answers: list[Answer], target: Target, settings: RecordSettings
) -> list[tuple[int, StoreSample]]:
    """The samples of one batch with their indices, checked."""
    sequences = [sequence(answers[index].prompt_ids, answers[index].answer_ids) for index in batch]
    input_BT = torch.zeros(len(batch), max(len(s.input_ids) for s in sequences), dtype=torch.long)
    for row, found in enumerate(sequences):
        input_BT[row, : len(found.input_ids)] = torch.from_numpy(found.input_ids)
    output = target.forward(input_BT)
    samples = []
    for row, (index, found) in enumerate(zip(batch, sequences, strict=True)):
        answer, length = answers[index], len(found.input_ids)
        features, last_hidden = output.features[row, :length], output.last_hidden[row, :length]
        _check(answer, features, last_hidden, target)
        sample = StoreSample(
            answer.id,
            answer.source,
            answer.split,
            answer.temperature,
            torch.from_numpy(found.input_ids),
            torch.from_numpy(found.loss_mask),
            features.to(DTYPES[settings.dtype]).clone(),
            last_hidden.to(DTYPES[settings.dtype]).clone(),
        )
        samples.append((index, sample))
    return samples


def _check(answer: Answer, features: Tensor, last_hidden: Tensor, target: Target) -> None:
    """Stale, empty or misplaced states would train a head that is quietly bad, so they end the stage.

    Raises:
        Incomplete: states are not finite or all zero, or a greedy answer is not what they predict.
    """
    for name, states in (("features", features), ("last_hidden", last_hidden)):
        if not states.isfinite().all():
            raise Incomplete(f"{name} of conversation {answer.id} are not finite; the target or its dtype is at fault")
        if (states.abs().amax(-1) == 0).any():
            raise Incomplete(f"{name} of conversation {answer.id} are zero; the capture is at fault")
    if answer.temperature == 0.0:
        start = len(answer.prompt_ids) - 1
        logits = target.logits(last_hidden[start:-1])
        said = logits.gather(1, torch.tensor(answer.answer_ids)[:, None])[:, 0]
        gap = (logits.amax(1) - said).max().item()
        if gap > TIE[target.info.dtype]:
            raise Incomplete(
                f"the states of conversation {answer.id} predict other tokens than its greedy answer (by {gap:.3g} "
                "in logits); the answers are another target's: delete conversations/answers.jsonl"
            )


def _ordered(folder: Path) -> list[Answer]:
    """The answers in the order of the prompts.

    Raises:
        UserError: some are missing.
    """
    if not (folder / "answers.jsonl").exists():
        raise UserError("conversations", folder, "it holds no answers", "run eagle3 regenerate first")
    answers = {answer.id: answer for answer in read_answers(folder / "answers.jsonl")}
    prompts = read_conversations(folder / "prompts.jsonl")
    missing = sum(prompt.id not in answers for prompt in prompts)
    if missing:
        raise UserError("conversations", folder, f"{missing} of {len(prompts)} answers are missing", "run eagle3 regenerate")
    return [answers[prompt.id] for prompt in prompts]


def _finish(settings: Settings, folder: Path, target: Target, answers: list[Answer], count: int) -> None:
    """Write what stands beside the shards, then the manifest."""
    training = (answer.answer_ids for answer in answers if answer.split == "train")
    store.write_head(folder, target.head)
    write_atomic(folder / store.VOCABULARY, save({"counts": count_tokens(training, target.info.vocab_size)}))
    target.tokenizer.save_pretrained(folder / store.TOKENIZER)
    hashes = tokenizer_hash(target.tokenizer)
    entries = tuple(store.read_entry(folder, index) for index in range(count))
    beside = [folder / store.HEAD, folder / store.VOCABULARY, *sorted((folder / store.TOKENIZER).iterdir())]
    manifest = Manifest(
        schema=store.SCHEMA,
        target=asdict(target.info) | {"layers": list(target.info.layers), "eos_ids": list(target.info.eos_ids)},
        tokenizer_sha256=hashes.tokenizer,
        chat_template_sha256=hashes.chat_template,
        last_hidden="after the final norm",
        dtypes={"input_ids": "int32", "features": settings.record.dtype, "last_hidden": settings.record.dtype},
        samples=sum(entry.samples for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        supervised_tokens=sum(entry.supervised_tokens for entry in entries),
        files={str(path.relative_to(folder)): file_sha256(path) for path in beside},
        shards=entries,
    )
    store.write_manifest(folder, manifest)


def _inputs(settings: Settings, conversations: Path, target: Target) -> dict[str, Json]:
    answers = conversations / "answers.jsonl"
    if not answers.exists():
        raise UserError("conversations", conversations, "it holds no answers", "run eagle3 regenerate first")
    return {
        "target.path": target.info.name,
        "target.dtype": target.info.dtype,
        "target.layers": list(target.info.layers),
        "weights of the target": target.info.weights_sha256,
        "conversations/answers.jsonl": file_sha256(answers),
        "record.batch_tokens": settings.record.batch_tokens,
        "record.shard_tokens": settings.record.shard_tokens,
        "record.dtype": settings.record.dtype,
    }
