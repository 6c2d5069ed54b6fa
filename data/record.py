"""Stage 3: run the target over prompts and answers, and keep its hidden states.

    eagle3 record configs/tiny.yaml
    torchrun --nnodes 4 --no-python eagle3 record configs/maverick.yaml    # one process a node

Which samples make up which batch and shard is planned from the answers alone, before anything is recorded. So any rank
may record any shard, a recorder that is killed records the missing ones when it is started again, and the store is the
same to the byte. Ranks do not talk to each other: a shard that exists is done, and the first rank waits for all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..configs.errors import Incomplete, UserError
from ..configs.settings import RecordSettings, Settings
from ..configs.signals import StopRequest
from ..models.target import Target, TargetHead
from ..models.target_files import TargetEnds
from . import store
from .answers import ANSWERS, Answer, read_finished
from .chat import sequence, tokenizer_hash
from .checks import check_agreement, check_states
from .files import FileEntry, exclusive, file_sha256, lines_sha256, remove_temporaries, tensor_file, write_listed
from .index import Identity, Index
from .planning import Batch, plan
from .progress import Progress
from .quantise import dtype_name, encode
from .recorders import Recorder, States, TransformersRecorder
from .regenerate import answered_by
from .shards import Kept, Shard, ShardEntry, read_entry, shard_path, write_shard
from .stage import Json, Stage
from .store import Manifest
from .vllm_recorder import VllmRecorder
from .vocabulary import count_tokens

POLL = 0.2  # seconds between looks for the shards of other ranks


def record(settings: Settings, run_dir: Path, target: Target | TargetEnds, recorder: Recorder | None = None) -> None:
    """Write ``store/``; shards that are there are kept.

    Args:
        settings: the recipe.
        run_dir: the run's folder.
        target: whose states they are; of it only ``info``, ``head`` and ``tokenizer`` are used here.
        recorder: what computes them; by default the target itself, or servers where only its ends are here.

    Raises:
        UserError: there are no answers, they are another target's, the store was begun with other settings, or it
            cannot be written.
        Incomplete: recorded states are not what the target's own answers say they are.
        Interrupted: a signal came; the finished shards are kept.
    """
    stage = _stage(settings, run_dir, target)
    with StopRequest(stage.resume) as stop:
        if _whole(stage):
            return
        answered_by(target, run_dir)
        answers = read_finished(run_dir / "conversations", target.info.vocab_size)
        stage.begin()
        ranks = PartialState(cpu=not torch.cuda.is_available())
        with exclusive(stage.folder / f".record-{ranks.process_index}.lock"):
            shards = plan([len(answer.ids) for answer in answers], settings.record)
            recording = Recording(stage, settings.record, target, answers, recorder or _recorder(settings, target))
            recording.run(shards, stop)
            if ranks.is_main_process:
                store.write_manifest(stage.folder, _manifest(settings, stage, target, answers, shards))


def _recorder(settings: Settings, target: Target | TargetEnds) -> Recorder:
    """The target itself where all of it is here, else the servers that have it."""
    return TransformersRecorder(target) if isinstance(target, Target) else VllmRecorder(settings, target)


def recorded(settings: Settings, run_dir: Path) -> bool:
    """Whether the stage is complete, as far as can be told without the target; raises if its settings changed."""
    return _whole(_stage(settings, run_dir, None))


class Recording:
    """Recording what is missing of a store.

    A shard is hashed and written in a thread while the next is recorded; errors of the thread come out of :meth:`run`.
    """

    def __init__(
        self,
        stage: Stage,
        settings: RecordSettings,
        target: Target | TargetEnds,
        answers: Sequence[Answer],
        recorder: Recorder,
    ) -> None:
        self.folder, self.name = stage.folder, file_sha256(stage.path)
        self.settings, self.target, self.answers, self.recorder = settings, target, answers, recorder

    def run(self, shards: list[list[Batch]], stop: StopRequest) -> None:
        """Record this rank's missing shards; the first rank then waits until those of the others are there."""
        ranks = PartialState()
        missing = _missing(self.folder, len(shards))
        # By the shard's number and not by its place among the missing: ranks may look at different moments.
        mine = [number for number in missing if number % ranks.num_processes == ranks.process_index]
        there = len(shards) - len(missing)
        progress = Progress("record", "shards", there + len(mine), there)
        for entry in self._record({number: shards[number] for number in mine}, stop):
            progress.advance(1, entry.tokens)
        stop.check(f"{progress.done} of {progress.total} shards are recorded")
        for number in missing if ranks.is_main_process else []:
            while not shard_path(self.folder, number).exists():
                stop.check("the shards of this rank are recorded, those of others are not")
                time.sleep(POLL)

    def _record(self, shards: dict[int, list[Batch]], stop: StopRequest) -> Iterator[ShardEntry]:
        """Yield shards as they are published; after a signal no other is begun."""
        written: Future[ShardEntry] | None = None
        with ThreadPoolExecutor(1) as writer:
            for number, batches in shards.items():
                kept = [sample for batch in batches for sample in self._keep(batch, self._states(batch))]
                check_agreement(kept, number)
                if written is not None:
                    yield written.result()
                written = writer.submit(self._publish, number, kept)
                if stop.requested:
                    break
            if written is not None:
                yield written.result()

    def _states(self, batch: Batch) -> list[States]:
        return list(self.recorder.record([sequence(self.answers[sample]).input_ids for sample in batch]))

    def _keep(self, batch: Batch, found: list[States]) -> list[Kept]:
        """The samples of one batch as they are stored, checked."""
        if len(found) != len(batch):
            raise Incomplete(f"the recorder gave the states of {len(found)} sequences for {len(batch)}; it is at fault")
        kept = []
        for sample, states in zip(batch, found, strict=True):
            answer = self.answers[sample]
            ids = sequence(answer)
            missed = check_states(answer, ids, states, self.target)
            encoded = {
                **encode("features", states.features, self.settings.features_dtype),
                **encode("last_hidden", states.last_hidden, self.settings.last_hidden_dtype),
            }
            tensors = {
                "input_ids": torch.from_numpy(ids.input_ids),
                "loss_mask": torch.from_numpy(ids.loss_mask),
                **{name: tensor.cpu() for name, tensor in encoded.items()},
            }
            identity = Identity(answer.id, answer.source, answer.split, answer.temperature)
            kept.append(Kept(identity, tensors, missed))
        return kept

    def _publish(self, number: int, kept: list[Kept]) -> ShardEntry:
        remove_temporaries(self.folder, f"{shard_path(self.folder, number).stem}.*")
        return write_shard(self.folder, number, self.name, kept)


def _missing(folder: Path, count: int) -> list[int]:
    return [number for number in range(count) if not shard_path(folder, number).exists()]


def _whole(stage: Stage) -> bool:
    """Whether the store is finished and nothing of it is gone; a missing shard is recorded again."""
    if not stage.begun() or not (stage.folder / store.MANIFEST).exists():
        return False
    manifest = store.read_manifest(stage.folder)
    return not _missing(stage.folder, len(manifest.shards)) and all((stage.folder / n).exists() for n in manifest.files)


def _manifest(
    settings: Settings, stage: Stage, target: Target | TargetEnds, answers: Sequence[Answer], shards: list[list[Batch]]
) -> Manifest:
    """Write what stands beside the shards, and describe all of it."""
    folder, name = stage.folder, file_sha256(stage.path)
    remove_temporaries(folder)
    remove_temporaries(folder / store.TOKENIZER)
    entries = tuple(read_entry(shard_path(folder, number)) for number in range(len(shards)))
    stored = Shard.open(folder, entries[0]).tensors
    in_order = [answers[sample] for shard in shards for batch in shard for sample in batch]
    beside = {
        stage.path.name: FileEntry(name, stage.path.stat().st_size),
        store.INDEX: _write_index(folder, name, in_order),
        store.HEAD: _write_head(folder, target.head),
        store.VOCABULARY: _write_vocabulary(folder, answers, target.info.vocab_size),
        **_write_tokenizer(folder, target.tokenizer),
    }
    hashes = tokenizer_hash(target.tokenizer)
    return Manifest(
        schema=store.SCHEMA,
        recording=name,
        recipe=_recipe(settings),
        target=asdict(target.info) | {"layers": list(target.info.layers), "eos_ids": list(target.info.eos_ids)},
        tokenizer_sha256=hashes.tokenizer,
        chat_template_sha256=hashes.chat_template,
        last_hidden="after the final norm",
        dtypes={key: dtype_name(tensor) for key, tensor in sorted(stored.items())},
        samples=sum(entry.samples for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        supervised_tokens=sum(entry.supervised_tokens for entry in entries),
        greedy_tokens=sum(entry.greedy_tokens for entry in entries),
        disagreeing=sum(entry.disagreeing for entry in entries),
        files=beside,
        shards=entries,
    )


def _write_index(folder: Path, recording: str, answers: list[Answer]) -> FileEntry:
    """The index of all samples, in the order in which the shards hold them."""
    index = Index.of(
        [Identity(answer.id, answer.source, answer.split, answer.temperature) for answer in answers],
        [len(answer.ids) for answer in answers],
        [len(answer.said) for answer in answers],
    )
    content = tensor_file(index.tensors(), {**index.metadata(), "recording": recording})
    return write_listed(folder / store.INDEX, *content)


def _write_head(folder: Path, head: TargetHead) -> FileEntry:
    """A tied LM head is written once."""
    tensors = {"embedding": head.embedding, "norm.weight": head.norm_weight}
    if head.lm_head.data_ptr() != head.embedding.data_ptr():
        tensors["lm_head"] = head.lm_head
    stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return write_listed(folder / store.HEAD, *tensor_file(stored, {"norm_eps": repr(head.norm_eps)}))


def _write_vocabulary(folder: Path, answers: Sequence[Answer], vocab_size: int) -> FileEntry:
    said = count_tokens(((a.source, a.said) for a in answers if a.split == "train"), vocab_size)
    return write_listed(folder / store.VOCABULARY, said.content())


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, FileEntry]:
    """Save the tokenizer so that each of its files is whole; returns what they are."""
    (folder / store.TOKENIZER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        files = {f"{store.TOKENIZER}/{path.name}": path.read_bytes() for path in sorted(Path(saved).iterdir())}
    return {name: write_listed(folder / name, content) for name, content in files.items()}


def _stage(settings: Settings, run_dir: Path, target: Target | TargetEnds | None) -> Stage:
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
    }
