"""How fast the native decoder records a mixture of experts beside transformers, which gives every token to every expert.

    python -m eagle3.data.bench.experts                       # a Llama-4 of 32 experts with random weights
    python -m eagle3.data.bench.experts --dtypes bfloat16 --hidden 2048 --inner 4096 --tokens 100000

In every round both record the same batches as `eagle3 record` does, from the batches to the last synced shard. Before
that, in float32, both record them once as they are, and the stores are compared: states may differ by rounding alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig
from transformers.utils.logging import disable_progress_bar

from ...configs.entry import finish
from ...configs.errors import Incomplete
from ...configs.settings import RecordSettings, TargetSettings
from ...configs.signals import StopRequest
from ...models.native.loading import load_native
from ...models.parallel import ALONE
from ...models.target import DTYPES, EMBEDDED, load_target
from ..answers import Answer
from ..planning import Batch, plan
from ..recorders import NativeRecorder, RecordedTarget, Recorder, TransformersRecorder
from ..recording import Recording
from ..shards import shard_path
from ..spool import StoreWriter
from ..stage import at_least
from .recording import scratch
from .sides import Spent, add_options, check_rounds, compare, in_turn, measure, result, write
from .subjects import random_answers

LIMIT = 3.0  # the least that the native decoder's speed is to be, in terms of transformers'
TOLERANCE = 1e-4  # of the largest state, in float32
FULL = RecordSettings(features_dtype="float32", last_hidden_dtype="float32")


class Side(NamedTuple):
    """A target, and what computes its states."""

    target: RecordedTarget
    recorder: Recorder


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print a table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(prog="experts", description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=32, help="of every second layer; default %(default)s")
    parser.add_argument("--hidden", type=int, default=256, help="width of the states; default %(default)s")
    parser.add_argument("--inner", type=int, default=512, help="width of an expert; default %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="8 or more; default %(default)s")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=8000, help="that are recorded; default %(default)s")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a batch; default %(default)s")
    add_options(parser)
    asked = parser.parse_args(arguments)
    check_rounds(asked.rounds)
    at_least("--layers", asked.layers, 8)  # of fewer the three that are captured by default are not different ones
    for option in ("experts", "hidden", "inner", "tokens", "batch_tokens"):
        at_least(f"--{option.replace('_', '-')}", getattr(asked, option), 1)
    results = list[dict[str, object]]()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        save_random(Path(folder), asked)
        for dtype in asked.dtypes:
            results.append(_measure(Path(folder), dtype, asked))
    if asked.out:
        write(asked.out, results)


def save_random(folder: Path, asked: argparse.Namespace) -> None:
    """Write a Llama-4 of random weights, with the tokenizer of the target that ships."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = Llama4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=asked.hidden,
        intermediate_size=asked.inner,
        intermediate_size_mlp=2 * asked.inner,
        num_hidden_layers=asked.layers,
        num_attention_heads=max(1, asked.hidden // 32),
        num_key_value_heads=max(1, asked.hidden // 64),
        head_dim=32,
        num_local_experts=asked.experts,
        interleave_moe_layer_step=2,
        attention_chunk_size=256,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    disable_progress_bar()
    Llama4ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _measure(folder: Path, dtype: str, asked: argparse.Namespace) -> dict[str, object]:
    settings = TargetSettings(path=str(folder), dtype=dtype)
    theirs, ours = load_target(settings), load_native(settings, capacity=0)
    sides = {
        "native": Side(ours, NativeRecorder(ours)),
        "transformers": Side(theirs, TransformersRecorder(theirs)),
    }
    answers = [answer._replace(temperature=1.0) for answer in random_answers(ours.info.vocab_size, asked.tokens)]
    answers = [answer for answer in answers if len(answer.ids) <= ours.info.max_positions]
    tokens = sum(len(answer.ids) for answer in answers)
    record = RecordSettings(batch_tokens=asked.batch_tokens, shard_tokens=max(1, tokens // 6))
    shards = plan([len(answer.ids) for answer in answers], record)
    weights = sum(tensor.numel() for tensor in theirs.model.parameters())
    name = f"Llama-4 of {weights / 1e6:,.0f} M parameters, {asked.experts} experts, {dtype}"
    print(f"{name}: {tokens:,} tokens, {ours.device}, {torch.get_num_threads()} threads", flush=True)
    notes = ""
    if dtype == "float32":
        difference = compare_stores(sides, answers, shards, asked.folder)
        notes = f"largest difference of states {difference:.1e}; "
        print(f"  stores differ by at most {difference:.1e} [at most {TOLERANCE:g}], relative to the largest state")

    def run(side: Side) -> Callable[[], Spent]:
        def recorded() -> Spent:
            with scratch(asked.folder) as store:
                return write_store(side, record, answers, shards, store)

        return recorded

    spent = in_turn({key: run(side) for key, side in sides.items()}, asked.rounds)
    found = compare(spent["native"], spent["transformers"])
    value, reference = round(tokens / found.value, 1), round(tokens / found.reference, 1)
    said = f"{value:,.0f} tokens/s beside {reference:,.0f}: {found.ratio:.1f} times [at least {LIMIT:g}]"
    print(f"  native {said}", flush=True)
    notes += f"batches of {asked.batch_tokens} tokens, {ours.device}"
    return result(
        asked, "recording experts", name, "tokens/s", value, ("transformers", reference), LIMIT, notes, found.ratio
    )


def write_store(
    side: Side, settings: RecordSettings, answers: list[Answer], shards: list[list[Batch]], store: Path
) -> Spent:
    """Record all of ``answers`` to the shards of a store; returns what that took."""
    with StopRequest("nothing") as stop, redirect_stderr(StringIO()):
        place = StoreWriter(store, len(shards))
        recording = Recording(place, "measured", settings, side.target, answers, side.recorder)
        return measure(lambda: recording.run(shards, ALONE, stop))


def compare_stores(
    sides: dict[str, Side], answers: list[Answer], shards: list[list[Batch]], where: Path | None
) -> float:
    """How far apart the states of two recorders are, in terms of the largest.

    Raises:
        Incomplete: further than rounding.
    """
    with scratch(where) as first, scratch(where) as second:
        for side, store in zip(sides.values(), (first, second), strict=True):
            write_store(side, FULL, answers, shards, store)
        pairs = [[load_file(shard_path(store, number)) for store in (first, second)] for number in range(len(shards))]
        furthest = max(
            _apart(ours[name], theirs[name]) for ours, theirs in pairs for name in ("features", "last_hidden")
        )
    if furthest > TOLERANCE:
        raise Incomplete(f"the recorders' states are {furthest:.1e} apart, of {TOLERANCE:g} that rounding explains")
    return furthest


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    sys.exit(finish(main))
