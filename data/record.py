"""Stage 3: run the target over prompts and answers, and keep its hidden states.

    eagle3 record configs/tiny.yaml
    torchrun --nnodes 4 --no-python eagle3 record configs/maverick.yaml    # one process a node
    torchrun --nproc-per-node 8 --no-python eagle3 record configs/maverick.yaml record.tensor_parallel=8    # one a GPU

Which samples make up which batch and shard is planned from the answers alone, before anything is recorded. So any rank
may record any shard, a recorder that is killed records the missing ones when it is started again, and the store is the
same to the byte. Ranks do not talk to each other: a shard that exists is done, and the first rank waits for all. Those
that hold a target together (``record.tensor_parallel``) are one: the first of them records, the others compute with it.

States that no disk holds at once go to a spool (``record.spool_shards``), from which a trainer reads them meanwhile; those
of held-out conversations come first, and are kept as a store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..configs.signals import StopRequest
from ..models.native.target import NativeTarget
from ..models.parallel import Place, announced, here, leading, placed
from ..models.target import Target, TargetHead
from ..models.target_files import TargetEnds
from .answers import ANSWERS, Answer, Answers, read_finished
from .chat import tokenizer_hash
from .files import (
    FileEntry,
    damaged,
    exclusive,
    file_sha256,
    lines_sha256,
    remove_temporaries,
    tensor_file,
    write_listed,
)
from .manifest import (
    HEAD,
    INDEX,
    MANIFEST,
    SCHEMA,
    TOKENIZER,
    VOCABULARY,
    Manifest,
    check_recording,
    read_manifest,
    write_manifest,
)
from .planning import Batch, plan
from .quantise import dtype_name
from .recorders import NativeRecorder, RecordedTarget, Recorder, TransformersRecorder
from .recording import Recording, index_of
from .regenerate import answered_by
from .shards import Shard, read_entry, shard_path
from .spool import PLAN, SPOOL, SpoolWriter, StoreWriter, spooled, wait_for
from .stage import Json, Stage
from .threads import Work, computing, shapes
from .vllm_recorder import VllmRecorder
from .vocabulary import count_tokens

SEQUENCE = 256  # tokens of one, in a batch that is only measured


def record(settings: Settings, run_dir: Path, target: RecordedTarget, recorder: Recorder | None = None) -> None:
    """Write ``store/``; shards that are there are kept.

    Args:
        settings: the recipe.
        run_dir: the run's folder.
        target: whose states they are; of it only ``info``, ``head`` and ``tokenizer`` are used here.
        recorder: what computes them; by default the target itself, or servers where only its ends are here.

    States in a spool are recorded as room is made, so this ends when a trainer has read most of them.

    Raises:
        UserError: there are no answers, they are another target's, the store was begun with other settings, or it
            cannot be written.
        Incomplete: recorded states are not what the target's own answers say they are.
        Interrupted: a signal came; the finished shards are kept.
    """
    stage, ours = _stage(settings, run_dir, target), _place(settings)
    with StopRequest(stage.resume) as stop:
        if not ours.writes:
            with _threads(settings, stage.folder, target, ours):
                _follow(target, stop)
            return
        with leading(ours):
            if _whole(stage, settings, run_dir):
                return
            answered_by(target, run_dir)
            answers = read_finished(run_dir / "conversations", target.info.vocab_size)
            stage.begin()
            lock = exclusive(stage.folder / f".record-{ours.group}.lock")
            with lock, _threads(settings, stage.folder, target, ours):
                recorder = recorder or _recorder(settings, target, ours)
                limit, name = settings.record.spool_shards, file_sha256(stage.path)
                stored = answers if limit is None else answers.of_split(lambda split: split != "train")
                shards = plan(stored.lengths.tolist(), settings.record)
                place: StoreWriter | SpoolWriter = StoreWriter(stage.folder, len(shards))
                Recording(place, name, settings.record, target, stored, recorder).run(shards, ours, stop)
                if ours.group == 0:
                    write_manifest(stage.folder, _manifest(settings, stage, target, answers, stored, shards))
                if limit is not None:
                    streamed = answers.of_split(lambda split: split == "train")
                    shards = plan(streamed.lengths.tolist(), settings.record)
                    lengths = [streamed.lengths[[*chain.from_iterable(shard)]].tolist() for shard in shards]
                    if ours.group > 0:
                        wait_for(run_dir / SPOOL / PLAN, "the first rank has not begun the spool yet", stop.check)
                    place = SpoolWriter(run_dir / SPOOL, name, lengths, limit)
                    Recording(place, name, settings.record, target, streamed, recorder).run(shards, ours, stop)


def _follow(target: RecordedTarget, stop: StopRequest) -> None:
    """Compute what the first member of the group records; a signal ends it when it ends that one."""
    told = announced()
    if isinstance(target, NativeTarget):
        for lengths, packed in zip(told, told, strict=True):
            target.prefill(packed[0], lengths[0].tolist())
    else:
        assert isinstance(target, Target)
        for input_ids in told:
            target.forward(input_ids)
    stop.check("the process that records what this one computes has ended")


def _place(settings: Settings) -> Place:
    """This process among all that record."""
    if settings.record.tensor_parallel > 1:
        return here(settings.record.tensor_parallel)
    ranks = PartialState(cpu=not torch.cuda.is_available())
    return placed(ranks.process_index, ranks.num_processes, 1)


def _threads(settings: Settings, folder: Path, target: RecordedTarget, ours: Place) -> AbstractContextManager[None]:
    """Those with which the target runs in this process; a unit of its work is a batch."""
    if isinstance(target, TargetEnds):
        return nullcontext()

    def batch(rows: int) -> None:
        packed = np.arange(rows, dtype=np.int32) % target.info.vocab_size
        sequences = np.split(packed, range(SEQUENCE, rows, SEQUENCE))
        for _ in _recorder(settings, target, ours).record([sequences]):
            pass

    work = Work.of(shapes(target), settings.record.batch_tokens)
    return computing("record", work, target.device, batch, folder)


def _recorder(settings: Settings, target: RecordedTarget, ours: Place) -> Recorder:
    """The target itself where it, or a part of it, is here, else the servers that have it."""
    if isinstance(target, NativeTarget):
        return NativeRecorder(target, ours)
    return TransformersRecorder(target, ours) if isinstance(target, Target) else VllmRecorder(settings, target)


def recorded(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    return _whole(_stage(settings, run_dir, None), settings, run_dir)


def _whole(stage: Stage, settings: Settings, run_dir: Path) -> bool:
    """Whether the store is finished and nothing of it is gone, and all of a spool was recorded; what is missing is
    recorded again.
    """
    if not stage.begun() or not (stage.folder / MANIFEST).exists():
        return False
    manifest = read_manifest(stage.folder)
    check_recording(stage.folder, manifest)
    if StoreWriter(stage.folder, len(manifest.shards)).missing():
        return False
    if settings.record.spool_shards is not None and not spooled(run_dir / SPOOL):
        return False
    return all((stage.folder / name).exists() for name in manifest.files)


def _manifest(
    settings: Settings,
    stage: Stage,
    target: RecordedTarget,
    answers: Answers,
    stored: Answers,
    shards: list[list[Batch]],
) -> Manifest:
    """Write what stands beside the shards, and describe all of it; ``stored`` are those of the answers that they hold."""
    folder, name = stage.folder, file_sha256(stage.path)
    remove_temporaries(folder)
    remove_temporaries(folder / TOKENIZER)
    entries = tuple(read_entry(shard_path(folder, number)) for number in range(len(shards)))
    if foreign := [entry.name for entry in entries if entry.recording != name]:
        raise damaged(folder / foreign[0], "it is another recording's")
    tensors = Shard.open(folder, entries[0]).tensors
    in_order = stored.chosen([sample for shard in shards for batch in shard for sample in batch])
    beside = {
        stage.path.name: FileEntry(name, stage.path.stat().st_size),
        INDEX: _write_index(folder, name, in_order),
        HEAD: _write_head(folder, target.head),
        VOCABULARY: _write_vocabulary(folder, answers, target.info.vocab_size),
        **_write_tokenizer(folder, target.tokenizer),
    }
    hashes = tokenizer_hash(target.tokenizer)
    return Manifest(
        schema=SCHEMA,
        recording=name,
        recipe=_recipe(settings),
        target=asdict(target.info) | {"layers": list(target.info.layers), "eos_ids": list(target.info.eos_ids)},
        tokenizer_sha256=hashes.tokenizer,
        chat_template_sha256=hashes.chat_template,
        last_hidden="after the final norm",
        dtypes={key: dtype_name(tensor) for key, tensor in sorted(tensors.items())},
        samples=sum(entry.samples for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        supervised_tokens=sum(entry.supervised_tokens for entry in entries),
        greedy_tokens=sum(entry.greedy_tokens for entry in entries),
        disagreeing=sum(entry.disagreeing for entry in entries),
        files=beside,
        shards=entries,
    )


def _write_index(folder: Path, recording: str, answers: Iterable[Answer]) -> FileEntry:
    """The index of all samples, in the order in which the shards hold them."""
    index = index_of(answers)
    content = tensor_file(index.tensors(), {**index.metadata(), "recording": recording})
    return write_listed(folder / INDEX, *content)


def _write_head(folder: Path, head: TargetHead) -> FileEntry:
    """A tied LM head is written once."""
    tensors = {"embedding": head.embedding, "norm.weight": head.norm_weight}
    if head.lm_head.data_ptr() != head.embedding.data_ptr():
        tensors["lm_head"] = head.lm_head
    stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return write_listed(folder / HEAD, *tensor_file(stored, {"norm_eps": repr(head.norm_eps)}))


def _write_vocabulary(folder: Path, answers: Iterable[Answer], vocab_size: int) -> FileEntry:
    said = count_tokens(((a.source, a.said) for a in answers if a.split == "train"), vocab_size)
    return write_listed(folder / VOCABULARY, said.content())


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, FileEntry]:
    """Save the tokenizer so that each of its files is whole; returns what they are."""
    (folder / TOKENIZER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        files = {f"{TOKENIZER}/{path.name}": path.read_bytes() for path in sorted(Path(saved).iterdir())}
    return {name: write_listed(folder / name, content) for name, content in files.items()}


def _stage(settings: Settings, run_dir: Path, target: RecordedTarget | None) -> Stage:
    """The stage with its inputs; without a target, with those that can be told without it."""
    answers = run_dir / "conversations" / ANSWERS
    if not answers.exists():
        raise UserError("conversations", answers.parent, "it holds no answers", "run eagle3 regenerate first")
    inputs = {**_recipe(settings), "conversations/answers.jsonl": lines_sha256(answers)}  # servers answer in any order
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
        "record.features_dtype": settings.record.features_dtype,
        "record.last_hidden_dtype": settings.record.last_hidden_dtype,
        "record.spool_shards": settings.record.spool_shards,
    }
