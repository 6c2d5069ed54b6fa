"""Reading the store: zero copies, and every kind of damage is told."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import Settings
from eagle3.data.files import encode_json
from eagle3.data.manifest import read_manifest, write_manifest
from eagle3.data.store import Store
from eagle3.models.target import Target
from transformers import AutoTokenizer

SHARD = "shard-00001.safetensors"
BESIDE = (
    "index.safetensors",
    "head.safetensors",
    "vocabulary.safetensors",
    "record.stage.json",
    "tokenizer/tokenizer.json",
)


def flip(path: Path, offset: int) -> None:
    """Flip one bit of the byte at ``offset``; a negative one counts from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_random_access(finished: Path, tiny_target: Target) -> None:
    store = Store(finished / "store")
    assert len(store) == 24
    assert store.lengths() == [len(store[i].input_ids) for i in range(24)]
    assert sorted(i for split in ("train", "validation", "test") for i in store.indices(split)) == list(range(24))
    assert [store[i].split for i in store.indices("validation")] == ["validation"] * 4
    assert all(store[i].temperature == 0.0 for i in store.indices("validation") + store.indices("test"))
    assert {store[i].temperature for i in store.indices("train")} == {0.0, 0.7, 1.0}
    sample = store[23]
    length = len(sample.input_ids)
    assert sample.features.shape == (length, 3, 32)
    assert sample.last_hidden.shape == (length, 32)
    assert (sample.input_ids.dtype, sample.features.dtype) == (torch.int32, torch.bfloat16)
    for outside in (24, -1):
        with pytest.raises(IndexError):
            store[outside]
    assert len(list(store)) == 24


def test_samples_are_views_of_mapped_files(finished: Path) -> None:
    store = Store(finished / "store")
    first, second = store[0], store[1]
    assert first.features.untyped_storage().data_ptr() == second.features.untyped_storage().data_ptr()
    mapped = (line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "shard-00000" in line)
    ranges = [tuple(int(end, 16) for end in addresses.split("-")) for addresses in mapped]
    assert any(start <= first.features.data_ptr() < end for start, end in ranges)


def test_writing_to_a_sample_leaves_the_store_alone(finished: Path) -> None:
    Store(finished / "store")[0].features.zero_()
    assert Store(finished / "store").verify() == []
    assert Store(finished / "store")[0].features.abs().sum() > 0


def test_head_and_tokenizer_are_the_targets(finished: Path, tiny_target: Target) -> None:
    store = Store(finished / "store")
    head = store.head()
    for ours, theirs in zip(head, tiny_target.head, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert head.lm_head.data_ptr() == head.embedding.data_ptr()  # tied, and stored once
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages) == tiny_target.tokenizer.apply_chat_template(messages)


def test_vocabulary_counts_training_answers_only(finished: Path) -> None:
    store = Store(finished / "store")
    counts = torch.zeros_like(store.token_counts())
    for i in store.indices("train"):
        sample = store[i]
        counts += torch.bincount(sample.input_ids[sample.loss_mask], minlength=len(counts))
    assert store.token_counts().equal(counts)
    chosen = store.draft_vocabulary(64)
    assert chosen.ids is not None and len(chosen.ids) == 64
    assert set(chosen.coverage) == {"sums", "words"}


def test_check_accepts_the_recipe(finished: Path, recipe: Settings, changed) -> None:
    store = Store(finished / "store")
    store.check(recipe)
    store.check(changed("target", layers=(1, 3, 4)))  # the default, spelled out
    store.check(changed("record", shard_tokens=5))  # of no concern to a reader


@pytest.mark.parametrize(
    ("section", "values", "complaint"),
    [
        ("target", {"path": "other"}, "target.path = other: .* was recorded with /.*tiny"),
        ("target", {"revision": "v2"}, "target.revision = v2: .* was recorded with None"),
        ("target", {"dtype": "bfloat16"}, "target.dtype = bfloat16: .* was recorded with float32"),
        ("target", {"layers": (0, 3, 4)}, r"target.layers = \[0, 3, 4\]: .* was recorded with \[1, 3, 4\]"),
        ("record", {"features_dtype": "float32"}, "record.features_dtype = float32: .* was recorded with bfloat16"),
        ("draft", {"vocab_size": 100_000}, "draft.vocab_size = 100000: the target has a vocabulary of"),
    ],
)
def test_check_names_both_values(finished: Path, changed, section: str, values: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Store(finished / "store").check(changed(section, **values))


def test_a_whole_store_verifies(finished: Path) -> None:
    assert Store(finished / "store").verify() == []


@pytest.mark.parametrize("name", [SHARD, *BESIDE])
def test_a_flipped_byte_is_found(run_dir: Path, name: str) -> None:
    store = Store(run_dir / "store")
    flip(run_dir / "store" / name, -3)
    assert store.verify() == [f"{name}: its checksum is not that of what was recorded"]


@pytest.mark.parametrize("offset", [0, 3, 7, 8, 9, 40, 100, 200])
def test_a_damaged_header_is_found_when_the_shard_is_first_read(run_dir: Path, offset: int) -> None:
    flip(run_dir / "store" / SHARD, offset)
    store = Store(run_dir / "store")
    kept = store.manifest.shards[0].samples
    assert [store[i].id for i in range(kept)]  # the shard before it is as good as ever
    with pytest.raises(UserError, match=SHARD):
        store[kept]


@pytest.mark.parametrize("name", [SHARD, *BESIDE])
def test_a_truncated_or_missing_file_is_found_at_once(run_dir: Path, name: str) -> None:
    path = run_dir / "store" / name
    store = Store(run_dir / "store")
    os.truncate(path, path.stat().st_size - 1)
    complaint = "it is not what was recorded" if name == "record.stage.json" else "it has .* bytes and not"
    with pytest.raises(UserError, match=f"{name}: {complaint}"):
        Store(run_dir / "store")
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: it is missing; run eagle3 record again"):
        Store(run_dir / "store")
    assert store.verify() == [f"{name}: it is missing"]


def test_a_foreign_shard_is_found_at_once(run_dir: Path) -> None:
    store = Store(run_dir / "store")
    shutil.copy(run_dir / "store" / SHARD, run_dir / "store" / "shard-00099.safetensors")
    with pytest.raises(UserError, match=r"shard-00099.safetensors: it does not belong to this store; delete it"):
        Store(run_dir / "store")
    assert store.verify() == ["shard-00099.safetensors: it does not belong to this store"]


def test_shards_in_each_others_place(run_dir: Path) -> None:
    folder = run_dir / "store"
    first, second = folder / "shard-00000.safetensors", folder / SHARD
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(UserError, match="shard-00000"):
        Store(folder)


def test_an_unfinished_store_is_refused(run_dir: Path) -> None:
    (run_dir / "store" / "manifest.json").unlink()
    with pytest.raises(UserError, match="it holds no manifest, so it is not finished; run eagle3 record first"):
        Store(run_dir / "store")


def test_a_damaged_manifest_is_refused(run_dir: Path) -> None:
    path = run_dir / "store" / "manifest.json"
    fields = json.loads(path.read_bytes())
    for content in (
        b"",
        b"[]",
        b'{"schema": 2}',
        path.read_bytes().replace(b'"sums"', b'"bums"').replace(b"32", b"33", 1),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"manifest.json: it is damaged"):
            Store(run_dir / "store")
    path.write_bytes(encode_json(fields | {"schema": 1}))
    with pytest.raises(UserError, match="its schema is 1, this version reads 2"):
        Store(run_dir / "store")


def test_a_manifest_that_contradicts_its_shards(run_dir: Path) -> None:
    folder = run_dir / "store"
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, target=manifest.target | {"layers": [1, 3]}))
    with pytest.raises(UserError, match="its tensors are not those of the manifest"):
        Store(folder)[0]
    write_manifest(folder, replace(manifest, dtypes=manifest.dtypes | {"features": "float8_e4m3fn"}))
    with pytest.raises(UserError, match="its tensors are not those of the manifest"):
        Store(folder)[0]


def test_shards_and_index_of_another_recording_are_refused(run_dir: Path) -> None:
    folder = run_dir / "store"
    manifest = read_manifest(folder)
    others = tuple(replace(entry, recording="another") for entry in manifest.shards)
    write_manifest(folder, replace(manifest, shards=others))
    with pytest.raises(UserError, match="shard-00000.safetensors: it is another recording's"):
        Store(folder)[0]
    write_manifest(folder, replace(manifest, recording="another"))
    with pytest.raises(UserError, match="manifest.json: it is another recording's"):
        Store(folder)
    (folder / "record.stage.json").unlink()  # as if another tool had written the store
    files = {name: entry for name, entry in manifest.files.items() if name != "record.stage.json"}
    write_manifest(folder, replace(manifest, recording="another", files=files))
    with pytest.raises(UserError, match="index.safetensors: it is another recording's"):
        Store(folder)
    manifest = replace(manifest, files=files)
    write_manifest(folder, replace(manifest, shards=tuple(reversed(manifest.shards))))
    with pytest.raises(UserError, match="its samples are not those of index.safetensors"):
        Store(folder)[0]


def test_a_damaged_index_is_found_at_once(run_dir: Path) -> None:
    flip(run_dir / "store" / "index.safetensors", -3)
    with pytest.raises(UserError, match="index.safetensors: it is not what was recorded"):
        Store(run_dir / "store")


def test_the_facts_of_a_shard_are_verified(run_dir: Path) -> None:
    store, path = Store(run_dir / "store"), run_dir / "store" / "shard-00001.json"
    flip(path, 20)
    assert store.verify() == [f"{SHARD}: its shard-00001.json is missing or damaged"]
    path.unlink()
    assert store.verify() == [f"{SHARD}: its shard-00001.json is missing or damaged"]
