"""How fast a target is recorded beside its own forward passes, which no recorder of it can outrun.

    python -m eagle3.data.bench.recording                                  # the target that ships, and a Llama of 134 M
    python -m eagle3.data.bench.recording --device cuda --targets llama --llama 8b --tokens 400000

In every round each of these runs once over the same batches: the bare forward pass of transformers' decoder, without
hooks, logits or anything kept; and recording as `eagle3 record` does it, from the batches to the last synced shard, for
each way to store states. The ratio of their speeds is the median over the rounds.

Then every step of recording is timed alone, one after the other: what must fit behind the forward pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import torch

from ...configs.entry import finish
from ...configs.settings import RecordSettings
from ...configs.signals import StopRequest
from ...models.parallel import ALONE
from ..checks import check_states
from ..files import sha256, tensor_file, write_atomic
from ..quantise import encode
from ..recorders import TransformersRecorder
from ..recording import Filling, Recording
from ..shards import read_entry, shard_path
from ..spool import StoreWriter
from ..units import in_bytes, measured
from .sides import Compared, Spent, add_options, check_rounds, compare, in_turn, measure, result, write
from .subjects import PRESETS, Shape, Subject, embedded, llama

LIMIT = 0.9  # performance.md's: the least of the forward pass's speed
STORED = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "features in FP8": ("float8_e4m3fn", "bfloat16"),
    "all in FP8": ("float8_e4m3fn", "float8_e4m3fn"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print a table, and write it where it is asked for."""
    asked = _parse(arguments)
    check_rounds(asked.rounds)
    results = list[dict[str, object]]()
    for kind in asked.targets:
        subject = _subject(asked, kind)
        results += _measure(subject, asked)
    if asked.out:
        write(asked.out, results)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="recording", description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=("embedded", "llama"), default=["embedded", "llama"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    said = "of the embedded target; default %(default)s"
    parser.add_argument("--conversations", type=int, default=200, help=said)
    parser.add_argument("--llama", choices=PRESETS, default="88m", help="its shape; default %(default)s")
    for name in Shape._fields:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help="of the Llama, where the preset does not suit"
        )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the Llama")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the Llama's conversations; default %(default)s")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of the Llama's batches; default %(default)s")
    add_options(parser)
    return parser.parse_args(arguments)


def _subject(asked: argparse.Namespace, kind: str) -> Subject:
    if kind == "embedded":
        return embedded(asked.device, asked.conversations)
    given = {name: vars(asked)[name] for name in Shape._fields if vars(asked)[name] is not None}
    return llama(PRESETS[asked.llama]._replace(**given), asked.device, asked.dtype, asked.tokens, asked.batch_tokens)


def _measure(subject: Subject, asked: argparse.Namespace) -> list[dict[str, object]]:
    inputs = subject.inputs()
    flop, tokens, sizes = subject.flop_per_token(), subject.tokens, dict[str, int]()
    print(f"{subject.name}: {tokens:,} tokens in {len(inputs)} batches and {len(subject.shards)} shards, ", end="")
    print(f"{measured(flop, 'FLOP')} a token, {asked.device}, {torch.get_num_threads()} threads", flush=True)

    def recorded(name: str) -> Spent:
        spent, sizes[name] = record(subject, _stored(subject.settings, name), asked.folder)
        return spent

    runs = {"forward": partial(measure, partial(subject.forward, inputs))}
    runs |= {name: partial(recorded, name) for name in STORED}
    spent = in_turn(runs, asked.rounds)
    results = []
    for name in STORED:
        found, size = compare(spent[name], spent["forward"]), sizes[name] / tokens
        ratios = [round(theirs.wall / ours.wall, 3) for ours, theirs in zip(spent[name], spent["forward"], strict=True)]
        steps = {step: 1e6 * spent / tokens for step, spent in alone(subject, name, asked.folder).items()}
        print(f"  {name:<16} {in_bytes(size)} a token; {_line(found, tokens)}", flush=True)
        print(
            f"  {'':<16} alone, in us a token: {', '.join(f'{step} {us:.2f}' for step, us in steps.items())}",
            flush=True,
        )
        shape = f"{subject.name}, {name}, {tokens} tokens, {len(inputs)} batches, {asked.device}"
        notes = f"rounds: {ratios}; of processor time {found.cpu:.3f}; {size:.0f} bytes and {flop:.3g} FLOP a token; "
        notes += f"alone, in us a token: { {step: round(us, 2) for step, us in steps.items()} }"
        reference = ("forward pass alone", round(tokens / found.reference, 1))
        value = round(tokens / found.value, 1)
        results.append(result(asked, "recording", shape, "tokens/s", value, reference, LIMIT, notes, found.ratio))
    return results


def _line(found: Compared, tokens: int) -> str:
    speeds = f"{tokens / found.value:,.0f} tokens/s of {tokens / found.reference:,.0f}"
    return f"{speeds}: {found.ratio:.1%} [at least {LIMIT:.0%}], of processor time {found.cpu:.1%}"


def _stored(settings: RecordSettings, name: str) -> RecordSettings:
    features, last_hidden = STORED[name]
    return replace(settings, features_dtype=features, last_hidden_dtype=last_hidden)


def record(subject: Subject, settings: RecordSettings, where: Path | None) -> tuple[Spent, int]:
    """Record all of ``subject`` to a store that is then gone; returns what that took, and the bytes of its shards."""
    with scratch(where) as folder, StopRequest("nothing") as stop, redirect_stderr(StringIO()):
        place, recorder = StoreWriter(folder, len(subject.shards)), TransformersRecorder(subject.target)
        recording = Recording(place, "measured", settings, subject.target, subject.answers, recorder)
        spent = measure(lambda: recording.run(subject.shards, ALONE, stop))
        written = (read_entry(shard_path(folder, number)).bytes for number in range(len(subject.shards)))
        return spent, sum(written)


@torch.no_grad()
def alone(subject: Subject, name: str, where: Path | None) -> dict[str, float]:
    """Seconds of every step of recording, one after the other in this thread; of writing, until it is synced."""
    settings, spent = _stored(subject.settings, name), defaultdict[str, float](float)
    recorder = TransformersRecorder(subject.target)

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if subject.target.device.type == "cuda":
            torch.cuda.synchronize()
        spent[step] += time.perf_counter() - start

    with scratch(where) as folder:
        for number, batches in enumerate(subject.shards):
            shard = Filling([subject.answers[sample] for batch in batches for sample in batch])
            for batch in batches:
                ids = [torch.tensor(subject.answers[sample].ids, dtype=torch.int32).numpy() for sample in batch]
                with timed("forward and capture"):
                    found = list(recorder.record([ids]))
                for states in found:
                    with timed("check"):
                        missed = check_states(shard.next, states, subject.target)
                    with timed("encode"):
                        features = encode("features", states.features, settings.features_dtype)
                        encoded = features | encode("last_hidden", states.last_hidden, settings.last_hidden_dtype)
                    with timed("copy"):
                        shard.put(encoded, missed)
            parts = tensor_file(shard.states, {})
            with timed("hash"):
                sha256(*parts)
            with timed("write"):
                write_atomic(folder / str(number), *parts)
    return dict(spent)


@contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    """A folder that is then gone, with all that was not written to the disk yet written before."""
    os.sync()
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(finish(main))
