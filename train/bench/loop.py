"""The trainer itself over a store of random states in FP8: its MFU, and how much of it is waiting for data.

    python -m eagle3.train.bench.loop --out train/bench/results/<hardware>/loop.json

The store has Maverick's shape, and everything is as in ``eagle3 train``: samples are read and packed while the steps before
them are taken. Weights, states and tokens are random; neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ...configs.entry import finish
from ...configs.errors import UserError
from ...configs.settings import DraftSettings, EvalSettings, RunSettings, Settings, TrainSettings
from ...data.files import encode_json, tensor_file, write_atomic, write_listed
from ...data.index import Identity, Index
from ...data.manifest import HEAD, INDEX, SCHEMA, VOCABULARY, Manifest, write_manifest
from ...data.quantise import dtype_name, encode
from ...data.shards import publish
from ...data.vocabulary import TokenCounts
from ...models.draft import DraftConfig
from ..stage import train
from .head import PRESETS

TOKENS = 16384  # of a step
WARM = 3  # steps that are not timed


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the store, train, print, and write where it is asked for."""
    parser = argparse.ArgumentParser(prog="loop", description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="maverick")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of 16,384 tokens; default %(default)s")
    parser.add_argument("--hardware", default="", help="the machine's name, for the results file")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the results file")
    parser.add_argument("--out", type=Path, help="where to write the results")
    asked = parser.parse_args(arguments)
    if asked.steps <= WARM:
        raise UserError("--steps", asked.steps, f"the first {WARM} are not timed", f"give {WARM + 1} or more")
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")
    preset = PRESETS[asked.preset]
    config, length = preset.config, preset.length
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        settings = _settings(config, TOKENS if asked.preset == "maverick" else 4 * length)
        samples = asked.steps * settings.train.batch_tokens // length
        random_store(run_dir / "store", settings, config, samples, length)
        print(f"a store of {samples} samples of {length} tokens is made", flush=True)
        train(settings, run_dir)
        lines = [json.loads(line) for line in (run_dir / "train" / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(run_dir)
    steps = [line for line in lines if "loss" in line][WARM:]
    found = {key: statistics.median(line.get(key, 0.0) for line in steps) for key in ("mfu", "tokens_per_s", "waited")}
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(
        f"MFU {found['mfu']:.1%}, {found['tokens_per_s']:,.0f} tokens/s, waiting {found['waited']:.1%}, {memory:.1f} GiB"
    )
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        notes = f"waiting for data {found['waited']:.4f} of the time, peak {memory:.1f} GiB, {found['tokens_per_s']} tokens/s"
        result = {
            "benchmark": "trainer over a store in FP8",
            "hardware": asked.hardware,
            "commit": asked.commit,
            "versions": {"torch": torch.__version__},
            "shape": f"{asked.preset}: {settings.train.batch_tokens} tokens a step in samples of {length}, answers alone",
            "unit": "MFU",
            "value": found["mfu"],
            "reference": {"name": "peak of the GPU, bfloat16", "value": 1.0},
            "ratio": found["mfu"],
            "limit": 0.55,
            "notes": notes,
        }
        write_atomic(asked.out, encode_json(result))


def _settings(config: DraftConfig, batch_tokens: int) -> Settings:
    """One epoch of ``config``'s head."""
    chosen = TrainSettings(ttt_steps=7, epochs=1, batch_tokens=batch_tokens, validate_every=10**6, learning_rate=1e-5)
    draft = DraftSettings(config.draft_vocab_size, config.intermediate_size)
    return replace(Settings(run=RunSettings("bench")), draft=draft, train=chosen, eval=EvalSettings(chain=3))


def random_store(folder: Path, settings: Settings, config: DraftConfig, samples: int, length: int) -> None:
    """A finished store of ``samples`` training conversations and one for validation, each one answer of ``length`` tokens."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    recording, entries, identities = hashlib.sha256(b"random").hexdigest(), [], []
    head = torch.randn(config.vocab_size, config.hidden_size, dtype=torch.bfloat16) * 0.02
    kinds = settings.record
    for number in range(samples + 1):
        identities.append(Identity(f"sample-{number}", "random", "train" if number else "validation", 1.0))
        states = {
            "features": torch.randn(length, len(config.target_layers), config.hidden_size),
            "last_hidden": torch.randn(length, config.hidden_size),
        }
        packed = {
            "input_ids": torch.randint(config.vocab_size, (length,), dtype=torch.int32),
            "loss_mask": torch.arange(length) > 0,
            **encode("features", states["features"], kinds.features_dtype),
            **encode("last_hidden", states["last_hidden"], kinds.last_hidden_dtype),
        }
        index = Index.of(identities[-1:], [length], [length - 1])
        entries.append(publish(folder, number, recording, index, packed, 0, 0))
    index = Index.of(identities, [length] * (samples + 1), [length - 1] * (samples + 1))
    ends = {"embedding": head, "norm.weight": torch.ones(config.hidden_size)}
    said = TokenCounts(("random",), torch.ones(1, config.vocab_size, dtype=torch.int64))
    target = asdict(config) | {
        "name": settings.target.path, "revision": None, "weights_sha256": "", "layers": list(config.target_layers),
        "num_layers": config.target_layers[-1] + 4, "dtype": "bfloat16",
    }  # fmt: skip
    recipe = {f"target.{key}": value for key, value in asdict(settings.target).items()}
    recipe |= {f"record.{key}": value for key, value in asdict(kinds).items()}
    files = {
        INDEX: write_listed(
            folder / INDEX, *tensor_file(index.tensors(), {**index.metadata(), "recording": recording})
        ),
        HEAD: write_listed(folder / HEAD, *tensor_file(ends, {"norm_eps": repr(config.rms_norm_eps)})),
        VOCABULARY: write_listed(folder / VOCABULARY, said.content()),
    }
    tokens = length * (samples + 1)
    dtypes = {name: dtype_name(tensor) for name, tensor in sorted(packed.items())}
    counted = (len(index), tokens, tokens - samples - 1, 0, 0)
    manifest = Manifest(
        SCHEMA, recording, recipe, target, "", "", "after the final norm", dtypes, *counted, files, tuple(entries)
    )
    write_manifest(folder, manifest)


if __name__ == "__main__":
    sys.exit(finish(main))
