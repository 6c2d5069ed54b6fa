"""Stage 3: run the target over prompts and answers, and keep its hidden states.

    eagle3 record configs/tiny.yaml
    torchrun --nnodes 4 --no-python eagle3 record configs/maverick.yaml    # one process a node

Which samples make up which batch and shard is planned from the answers alone, before anything is recorded. So any rank
may record any shard, a recorder that is killed records the missing ones when it is started again, and the store is the
same to the byte. Ranks do not talk to each other: a shard that exists is done, and the first rank waits for all.

Shapes: B batch, T tokens, F captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..configs.errors import Incomplete, UserError
from ..configs.settings import RecordSettings, Settings
from ..configs.signals import StopRequest
from ..models.target import DTYPES, Target, TargetHead
from . import store
from .answers import ANSWERS, Answer, read_finished
from .chat import Sequence, sequence, tokenizer_hash
from .files import FileEntry, exclusive, file_sha256, remove_temporaries, write_listed
from .progress import Progress
from .regenerate import answered_by
from .stage import Json, Stage, at_least
from .store import Manifest, StoreSample
from .vocabulary import count_tokens

#: How far a recorded greedy token's logit may lie below the top one: batches of another shape round differently.
TIE = {"float32": 1e-3, "bfloat16": 0.5}
#: Of the greedy tokens of a shard, how many may lie further below: rounding can send a token to another expert.
DISAGREEING_SHARE, DISAGREEING_TOKENS = 0.02, 2
POLL = 0.2  # seconds between looks for the shards of other ranks


class Recorded(NamedTuple):
    """One sample, and how many of its greedy tokens are not what its states predict."""

    sample: StoreSample
    disagreeing: int


def record(settings: Settings, run_dir: Path, target: Target) -> None:
    """Write ``store/``; shards that are there are kept.

    Raises:
        UserError: there are no answers, they are another target's, or the store was begun with other settings.
        Incomplete: recorded states are not what the target's own answers say they are.
        Interrupted: a signal came; the finished shards are kept.
    """
    at_least("record.batch_tokens", settings.record.batch_tokens, 1)
    at_least("record.shard_tokens", settings.record.shard_tokens, 1)
    if settings.record.dtype not in DTYPES:
        raise UserError("record.dtype", settings.record.dtype, "not supported", f"choose one of {', '.join(DTYPES)}")
    stage = _stage(settings, run_dir, target)
    with StopRequest(stage.resume) as stop:
        if _whole(stage):
            return
        answered_by(target, run_dir)
        answers = read_finished(run_dir / "conversations", target.info.vocab_size)
        stage.begin()
        ranks = PartialState(cpu=not torch.cuda.is_available())
        with exclusive(stage.folder / f".record-{ranks.process_index}.lock"):
            shards = plan(answers, settings.record)
            _record_shards(settings, stage, target, answers, shards, stop)
            if ranks.is_main_process:
                manifest = _manifest(settings, stage, target, answers, len(shards))
                store.write_manifest(stage.folder, manifest)


def recorded(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    return _whole(_stage(settings, run_dir, None))


def plan(answers: list[Answer], settings: RecordSettings) -> list[list[list[int]]]:
    """Shards of batches of answers' indices: consecutive answers a shard, of similar length a batch."""
    lengths = [len(answer.ids) for answer in answers]
    return [
        _groups(sorted(shard, key=lambda i: (lengths[i], i)), lengths, settings.batch_tokens, padded=True)
        for shard in _groups(list(range(len(answers))), lengths, settings.shard_tokens, padded=False)
    ]


def _record_shards(
    settings: Settings,
    stage: Stage,
    target: Target,
    answers: list[Answer],
    shards: list[list[list[int]]],
    stop: StopRequest,
) -> None:
    """Record this rank's missing shards; the first rank then waits until those of the others are there."""
    ranks, folder = PartialState(), stage.folder
    missing = _missing(folder, len(shards))
    # By the shard's number and not by its place among the missing: ranks may look at different moments.
    mine = [index for index in missing if index % ranks.num_processes == ranks.process_index]
    there = len(shards) - len(missing)
    progress = Progress("record", "shards", there + len(mine), there)
    for index in mine:
        recorded = [found for batch in shards[index] for found in _batch(batch, answers, target, settings.record)]
        in_order = [found for _, found in sorted(recorded, key=lambda numbered: numbered[0])]
        disagreeing = _check_agreement([found for found in in_order if found.sample.temperature == 0.0], index)
        remove_temporaries(folder, f"{store.shard_path(folder, index).stem}.*")
        entry = store.write_shard(folder, index, [found.sample for found in in_order], disagreeing)
        progress.advance(1, entry.tokens)
        stop.check(f"{progress.done} of {progress.total} shards are recorded")
    for index in missing if ranks.is_main_process else []:
        while not store.shard_path(folder, index).exists():
            stop.check("the shards of this rank are recorded, those of others are not")
            time.sleep(POLL)


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


def _batch(
    batch: list[int], answers: list[Answer], target: Target, settings: RecordSettings
) -> Iterable[tuple[int, Recorded]]:
    """Yield the samples of one batch with their indices, checked."""
    sequences = [sequence(answers[index]) for index in batch]
    input_BT = torch.zeros(len(batch), max(len(s.input_ids) for s in sequences), dtype=torch.long)
    for row, found in enumerate(sequences):
        input_BT[row, : len(found.input_ids)] = torch.from_numpy(found.input_ids)
    output = target.forward(input_BT)
    features_BTFH = output.features
    expected = (*input_BT.shape, len(target.info.layers), target.info.hidden_size)
    if features_BTFH.shape != expected or output.last_hidden.shape != expected[:2] + expected[3:]:
        raise Incomplete(
            f"the target gave states {tuple(features_BTFH.shape)} and not {expected}; its capture is at fault"
        )
    dtype = DTYPES[settings.dtype]
    for row, (index, found) in enumerate(zip(batch, sequences, strict=True)):
        answer, length = answers[index], len(found.input_ids)
        features, last_hidden = features_BTFH[row, :length], output.last_hidden[row, :length]
        disagreeing = _check(answer, found, features, last_hidden, target)
        sample = StoreSample(
            answer.id,
            answer.source,
            answer.split,
            answer.temperature,
            torch.from_numpy(found.input_ids),
            torch.from_numpy(found.loss_mask),
            features.to("cpu", dtype, copy=True),
            last_hidden.to("cpu", dtype, copy=True),
        )
        yield index, Recorded(sample, disagreeing)


def _check(answer: Answer, recorded: Sequence, features: Tensor, last_hidden: Tensor, target: Target) -> int:
    """Stale, empty or misplaced states would train a head that is quietly bad.

    Returns:
        How many tokens of a greedy answer have a logit clearly below the top one.

    Raises:
        Incomplete: states are not finite, or zero.
    """
    for name, states in (("features", features), ("last_hidden", last_hidden)):
        if not states.isfinite().all():
            raise Incomplete(f"{name} of conversation {answer.id} are not finite; the target or its dtype is at fault")
        if (states.abs().amax(-1) == 0).any():
            raise Incomplete(f"{name} of conversation {answer.id} are zero; the capture is at fault")
    if answer.temperature > 0.0:
        return 0
    said = torch.from_numpy(recorded.loss_mask.nonzero()[0]).to(last_hidden.device)
    logits_TV = target.logits(last_hidden[said - 1])
    ids = torch.from_numpy(recorded.input_ids).to(logits_TV.device, torch.long)[said]
    gaps = logits_TV.amax(1) - logits_TV.gather(1, ids[:, None])[:, 0]
    return int((gaps > TIE[target.info.dtype]).sum())


def _check_agreement(greedy: list[Recorded], shard: int) -> int:
    """How many greedy tokens are not what the states predict; refuse states for which that is more than rounding."""
    tokens = sum(int(found.sample.loss_mask.sum()) for found in greedy)
    disagreeing = sum(found.disagreeing for found in greedy)
    if disagreeing > DISAGREEING_TOKENS + DISAGREEING_SHARE * tokens:
        worst = max(greedy, key=lambda found: found.disagreeing)
        raise Incomplete(
            f"shard {shard}: the states predict other tokens for {disagreeing:,} of {tokens:,} greedy ones, most in "
            f"conversation {worst.sample.id}; the capture is at fault, or the answers are another target's: delete "
            "conversations/answers.jsonl"
        )
    return disagreeing


def _missing(folder: Path, count: int) -> list[int]:
    return [index for index in range(count) if not store.shard_path(folder, index).exists()]


def _whole(stage: Stage) -> bool:
    """Whether the store is finished and nothing of it is gone; a missing shard is recorded again."""
    if not stage.begun() or not (stage.folder / store.MANIFEST).exists():
        return False
    manifest = store.read_manifest(stage.folder)
    return not _missing(stage.folder, len(manifest.shards)) and all((stage.folder / n).exists() for n in manifest.files)


def _manifest(settings: Settings, stage: Stage, target: Target, answers: list[Answer], count: int) -> Manifest:
    """Write what stands beside the shards, and describe all of it."""
    folder = stage.folder
    remove_temporaries(folder)
    remove_temporaries(folder / store.TOKENIZER)
    said = count_tokens(((a.source, a.said) for a in answers if a.split == "train"), target.info.vocab_size)
    beside = {
        store.HEAD: write_listed(folder / store.HEAD, _head(target.head)),
        store.VOCABULARY: write_listed(folder / store.VOCABULARY, said.content()),
        **_write_tokenizer(folder, target.tokenizer),
    }
    hashes = tokenizer_hash(target.tokenizer)
    entries = tuple(store.read_entry(folder, index) for index in range(count))
    return Manifest(
        schema=store.SCHEMA,
        recipe=_recipe(settings),
        target=asdict(target.info) | {"layers": list(target.info.layers), "eos_ids": list(target.info.eos_ids)},
        tokenizer_sha256=hashes.tokenizer,
        chat_template_sha256=hashes.chat_template,
        last_hidden="after the final norm",
        dtypes={
            "input_ids": "int32",
            "loss_mask": "bool",
            "features": settings.record.dtype,
            "last_hidden": settings.record.dtype,
        },
        samples=sum(entry.samples for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        supervised_tokens=sum(entry.supervised_tokens for entry in entries),
        greedy_tokens=sum(entry.greedy_tokens for entry in entries),
        disagreeing=sum(entry.disagreeing for entry in entries),
        files=beside,
        shards=entries,
    )


def _head(head: TargetHead) -> bytes:
    """The target's head as a file; a tied LM head is written once."""
    tensors = {"embedding": head.embedding, "norm.weight": head.norm_weight}
    if head.lm_head.data_ptr() != head.embedding.data_ptr():
        tensors["lm_head"] = head.lm_head
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(stored, metadata={"norm_eps": repr(head.norm_eps)})


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, FileEntry]:
    """Save the tokenizer so that each of its files is whole; returns what they are."""
    (folder / store.TOKENIZER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        files = {f"{store.TOKENIZER}/{path.name}": path.read_bytes() for path in sorted(Path(saved).iterdir())}
    return {name: write_listed(folder / name, content) for name, content in files.items()}


def _stage(settings: Settings, run_dir: Path, target: Target | None) -> Stage:
    """The stage with its inputs; without a target, with those that can be told without it."""
    answers = run_dir / "conversations" / ANSWERS
    if not answers.exists():
        raise UserError("conversations", answers.parent, "it holds no answers", "run eagle3 regenerate first")
    inputs = {**_recipe(settings), "conversations/answers.jsonl": file_sha256(answers)}
    if target is not None:
        inputs |= {"weights of the target": target.info.weights_sha256, "captured layers": list(target.info.layers)}
    return Stage("record", run_dir, run_dir / "store", inputs)


def _recipe(settings: Settings) -> dict[str, Json]:
    target, layers = settings.target, settings.target.layers
    return {
        "target.path": target.path,
        "target.revision": target.revision,
        "target.dtype": target.dtype,
        "target.layers": None if layers is None else list(layers),
        "record.batch_tokens": settings.record.batch_tokens,
        "record.shard_tokens": settings.record.shard_tokens,
        "record.dtype": settings.record.dtype,
    }
