"""``eagle3 inspect``: what the store is, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from eagle3.configs.errors import Incomplete, UserError
from eagle3.data.inspection import inspect
from eagle3.data.store import Store
from eagle3.models.target import Target


def test_description(finished: Path, tiny_target: Target) -> None:
    text, manifest = inspect(finished / "store", verify=False), Store(finished / "store").manifest
    assert tiny_target.info.weights_sha256 in text
    assert "layers       [1, 3, 4] of 8, width 32" in text
    assert "ran in       float32, stored as bfloat16" in text
    assert f"24 samples, {manifest.tokens:,} tokens, {manifest.supervised_tokens:,} of them answers" in text
    assert "agreement    100.000% of" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("train")]
    assert [(row[1], int(row[2])) for row in rows] == [("sums", 8), ("words", 8)]
    assert "draft vocabulary covers" in text
    assert "checksum holds" not in text


def test_a_run_is_as_good_as_its_store(finished: Path) -> None:
    assert inspect(finished, verify=False) == inspect(finished / "store", verify=False)


def test_verify(run_dir: Path) -> None:
    assert inspect(run_dir, verify=True).endswith("every checksum holds")
    shard = run_dir / "store" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    inspect(run_dir, verify=False)  # a look does not show it
    with pytest.raises(
        Incomplete, match="shard-00000.safetensors is not what was recorded: its checksum differs"
    ) as caught:
        inspect(run_dir, verify=True)
    assert caught.value.exit_code == 3


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds no manifest, so it is not finished") as caught:
        inspect(tmp_path, verify=True)
    assert caught.value.exit_code == 2
