"""A sample comes into memory before it is touched, in every process, and what cannot is read as it is touched."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.data import mapped, shards
from eagle3.data.bench.reading import drop
from eagle3.data.files import write_atomic
from eagle3.data.mapped import bring, resident
from eagle3.data.store import Store
from torch import Tensor

TOKENS, WIDTH = 2000, 512
DEADLINE = 20.0

fork = multiprocessing.get_context("fork")


@pytest.fixture
def cold(tmp_path: Path) -> Tensor:
    """A view of a file of 4 MB, none of which is in memory."""
    if ctypes.CDLL(None).madvise(None, 0, mapped.POPULATE_READ):
        pytest.skip("this system cannot do it")
    path, content = tmp_path / "file", torch.arange(TOKENS * WIDTH, dtype=torch.int32)
    write_atomic(path, content.numpy().data)
    try:
        drop([path])
    except UserError:
        pytest.skip("a file in this folder is always in memory")
    return torch.from_file(str(path), shared=False, size=len(content), dtype=torch.int32).view(TOKENS, WIDTH)


def comes(view: Tensor) -> bool:
    end = time.monotonic() + DEADLINE
    while resident(view) < 1 and time.monotonic() < end:
        time.sleep(0.005)
    return resident(view) == 1


def test_what_is_brought_comes_without_being_touched_and_nothing_changes(cold: Tensor) -> None:
    rows = cold[700:1300]
    assert resident(rows) == 0
    bring(rows)
    assert comes(rows)
    assert rows.equal(torch.arange(700 * WIDTH, 1300 * WIDTH, dtype=torch.int32).view(600, WIDTH))


def test_it_comes_in_a_process_that_was_forked(cold: Tensor) -> None:
    bring(cold[:200])  # the threads of this process are there
    assert comes(cold[:200])
    child = fork.Process(target=lambda: os._exit(bring(cold[1000:]) or not comes(cold[1000:])))
    child.start()
    child.join(2 * DEADLINE)
    assert child.exitcode == 0


def test_what_is_in_memory_is_mapped_ahead(cold: Tensor, tmp_path: Path) -> None:
    """Else its reader stops at every few pages for the system to say where they are."""
    (tmp_path / "file").read_bytes()
    rows = cold[700:1300]
    assert resident(rows) == 1
    faults = []
    for view in (torch.zeros_like(rows), cold[:600], rows):  # the first only calls all that is called
        if view is rows:
            mapped._bring(rows)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        view.amax()
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    assert faults[2] < faults[1] / 2


def test_little_is_left_to_whoever_touches_it(cold: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_threads", None)
    bring(cold[: mapped.LEAST // cold[0].nbytes - 1])
    with pytest.raises(AttributeError):  # a little more is brought
        bring(cold[: mapped.LEAST // cold[0].nbytes])


def test_a_file_that_was_cut_is_no_trouble(cold: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(tmp_path / "file", 4096)
    done: list[Callable] = []
    monkeypatch.setattr(mapped._threads, "submit", lambda *what: done.append(what[0](*what[1:])))
    bring(cold)
    assert done == [None]


def test_a_store_brings_the_sample_that_is_asked_for(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = list[Tensor]()
    monkeypatch.setattr(shards, "bring", brought.append)
    for sample in Store(finished / "store"):
        assert {(view.data_ptr(), view.nbytes) for view in brought} == {
            (tensor.data_ptr(), tensor.nbytes)
            for tensor in (sample.input_ids, sample.loss_mask, *sample.stored.values())
        }
        brought.clear()
