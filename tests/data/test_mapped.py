"""A sample is in memory before it is touched, whole, and what cannot be read ahead is read as it is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eagle3.data import mapped, shards
from eagle3.data.files import write_atomic
from eagle3.data.mapped import fetch, resident
from eagle3.data.store import Store
from torch import Tensor

TOKENS, WIDTH = 2000, 512


def drop(path: Path) -> None:
    """Make the system forget what it holds of a file."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@pytest.fixture
def cold(tmp_path: Path) -> Callable[[], tuple[Path, Tensor]]:
    """A file of 4 MB and a view of it, none of which is in memory."""
    path = tmp_path / "file"
    content = torch.arange(TOKENS * WIDTH, dtype=torch.int32)
    write_atomic(path, content.numpy().data)

    def opened() -> tuple[Path, Tensor]:
        drop(path)
        view = torch.from_file(str(path), shared=False, size=len(content), dtype=torch.int32).view(TOKENS, WIDTH)
        if resident(view) > 0:
            pytest.skip("a file in this folder is always in memory")
        return path, view

    return opened


@pytest.mark.parametrize("block", [4096, 100_000, 1 << 20])
def test_what_is_fetched_is_in_memory_and_nothing_changes(
    cold: Callable[[], tuple[Path, Tensor]], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(mapped, "_scratch", memoryview(bytearray(block)))
    path, view = cold()
    rows = view[700:1300]
    assert resident(rows) == 0
    fetch(rows, path, 700 * view[0].nbytes)
    assert resident(rows) == 1
    assert rows.equal(torch.arange(700 * WIDTH, 1300 * WIDTH, dtype=torch.int32).view(600, WIDTH))


def test_what_is_in_memory_is_not_read_again(
    cold: Callable[[], tuple[Path, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, view = cold()
    total = view.sum()
    assert resident(view) == 1
    monkeypatch.setattr(mapped.os, "preadv", None)
    fetch(view, path, 0)
    assert view.sum() == total


def test_a_file_that_has_lost_its_name_is_read_through_its_map(cold: Callable[[], tuple[Path, Tensor]]) -> None:
    path, view = cold()
    path.unlink()
    fetch(view, path, 0)
    assert view[-1].tolist() == list(range((TOKENS - 1) * WIDTH, TOKENS * WIDTH))


def test_a_file_that_was_cut_ends_the_fetching(cold: Callable[[], tuple[Path, Tensor]]) -> None:
    path, view = cold()
    os.truncate(path, 4096)
    fetch(view, path, 0)  # and does not go on for ever


def test_nothing_has_no_pages(cold: Callable[[], tuple[Path, Tensor]]) -> None:
    path, view = cold()
    fetch(view[:0], path, 0)
    assert resident(view[:0]) == 1


def test_a_shard_fetches_the_sample_that_is_asked_for_and_no_more(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[tuple[Tensor, Path, int]]()
    monkeypatch.setattr(shards, "fetch", lambda *what: fetched.append(what))
    store = Store(finished / "store")
    for sample in store:
        assert [len(view) for view, _, _ in fetched] == [len(sample.input_ids)] * 4
        for view, path, offset in fetched:
            content = path.read_bytes()[offset : offset + view.nbytes]
            assert content == bytes(view.view(torch.uint8).flatten().tolist())
        assert {view.data_ptr() for view, _, _ in fetched} == {tensor.data_ptr() for tensor in sample[4:]}
        fetched.clear()
