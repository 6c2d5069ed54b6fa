"""What every room's tests use: a small Llama-4, and a run over 24 prompts whose data stages are complete.

The model has 8 layers, every second one a mixture of 4 experts, and chunks of 16 tokens.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.settings import (
    DraftSettings,
    EvalSettings,
    PrepareSettings,
    RecordSettings,
    RegenerateSettings,
    RunSettings,
    Settings,
    TargetSettings,
)
from eagle3.data.prepare import prepare
from eagle3.data.record import record
from eagle3.data.regenerate import regenerate
from eagle3.models.native.parallel import join
from eagle3.models.target import Target, load_target
from eagle3.train.embedded.corpus import train_tokenizer
from torch.distributed import TCPStore
from transformers import Llama4ForCausalLM, Llama4TextConfig

CHUNK = 16
COUNTS = {"train": 16, "validation": 4, "test": 4}
MEMBERS = 2

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True, scope="session")
def single_threaded() -> None:
    """Models this small only lose by threads, and every run adds in the same order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights and a byte-level tokenizer with Llama-4's chat format."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(iter([]))
    config = Llama4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        attention_chunk_size=CHUNK,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Llama4ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tiny_folder: Path) -> Target:
    """The saved model in float32; captured layers 1, 3 and 4."""
    return load_target(TargetSettings(path=str(tiny_folder)))


def write_prompts(path: Path) -> Path:
    """A prompt file with two sources."""
    lines = [
        {
            "id": f"{split}-{i}",
            "source": ("sums", "words")[i % 2],
            "split": split,
            "prompt": f"Say {'so ' * (i % 5)}{split[:2]} {i}.",
        }
        for split, count in COUNTS.items()
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def changed(recipe: Settings) -> Callable[..., Settings]:
    """``changed("record", dtype="float32")`` is the recipe with that setting."""
    return lambda section, **values: replace(recipe, **{section: replace(getattr(recipe, section), **values)})


@pytest.fixture(scope="session")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    prompts = write_prompts(tmp_path_factory.mktemp("prompts") / "tiny.jsonl")
    return Settings(
        run=RunSettings(name="tiny", seed=3),
        target=TargetSettings(path=str(tiny_folder)),
        prepare=PrepareSettings(prompts=str(prompts), **COUNTS),
        regenerate=RegenerateSettings(temperatures=(0.0, 0.7, 1.0), max_new_tokens=8, batch_size=7),
        # In bfloat16, so that tests can compare what was recorded with what the target says, value by value.
        record=RecordSettings(160, 320, features_dtype="bfloat16", last_hidden_dtype="bfloat16"),
        draft=DraftSettings(vocab_size=64),
        eval=EvalSettings(chain=5),
    )


@pytest.fixture(scope="session")
def finished(recipe: Settings, tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data stages are complete; not to be written to."""
    run_dir = tmp_path_factory.mktemp("finished")
    prepare(recipe, run_dir, tiny_target.text)
    regenerate(recipe, run_dir, tiny_target)
    record(recipe, run_dir, tiny_target)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the complete run, to damage or to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _member(rank: int, port: int, out: Path, task: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(MEMBERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.cuda.is_available = lambda: False  # a fork cannot use what its parent may have begun to
    torch.save(task(join(MEMBERS), *given), out / f"{rank}.pt")


def _launch(port: Connection) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True)
    port.send(store.port)
    signal.pause()


@pytest.fixture(scope="session")
def meeting() -> Iterator[Callable[[], int]]:
    """``meeting()`` is the port of a new store where processes meet, as a launcher has one.

    It is in a process of its own: a fork of one that serves it would wait for ever for what the serving thread holds.
    """
    processes = []

    def open_store() -> int:
        ours, theirs = fork.Pipe()
        processes.append(fork.Process(target=_launch, args=(theirs,), daemon=True))
        processes[-1].start()
        return int(ours.recv())

    yield open_store
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory, meeting: Callable[[], int]) -> Callable[..., list[Any]]:
    """``together(task, *given)``: what ``task(group, *given)`` returns in each of two processes that are a group."""

    def run(task: Callable[..., Any], *given: Any) -> list[Any]:
        out, port = tmp_path_factory.mktemp("together"), meeting()
        processes = [fork.Process(target=_member, args=(rank, port, out, task, given)) for rank in range(MEMBERS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * MEMBERS
        return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(MEMBERS)]

    return run
