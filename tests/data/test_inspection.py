"""``eagle3 inspect``: what the store is, how far it is, and whether it is whole."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from eagle3 import cli
from eagle3.configs import status
from eagle3.configs.errors import UserError
from eagle3.configs.loader import save
from eagle3.configs.settings import Settings
from eagle3.data import inspection, verification
from eagle3.data.manifest import read_manifest, write_manifest
from eagle3.data.record import record
from eagle3.data.shards import Shard, read_entry
from eagle3.data.store import Store
from eagle3.models.target import Target


class Said(NamedTuple):
    code: int
    out: str
    error: str


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``inspect(run, "--verify")`` is what the command says; one that fails says why in one line."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = cli.main(["inspect", *map(str, arguments)])
        said = Said(code, *capsys.readouterr())
        assert said.error.count("\n") == (code != 0) and said.error.startswith("error: " if code else "")
        return said

    return run


def refusal(run: Path) -> str:
    """What the command would say of a store that is damaged, told some thousand times without its parser."""
    with pytest.raises(UserError) as caught:
        list(inspection.inspect(run, verify=True))
    return str(caught.value)


def flip(path: Path, offset: int) -> None:
    """Flip one bit, another one at every offset."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << offset % 8]))


def offsets(path: Path, step: int) -> list[int]:
    """Every ``step``-th byte of a JSON file or of the header of tensors, and some of whatever there is."""
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else size
    dense = range(0, 0 if path.parent.name == "tokenizer" else header, step)
    return sorted({*dense, *range(size - 1, 0, -max(1, size // 15 - 1))})


def test_description(finished: Path, tiny_target: Target, inspect) -> None:
    text, manifest = inspect(finished / "store").out, Store(finished / "store").manifest
    assert tiny_target.info.weights_sha256 in text
    assert "layers       [1, 3, 4] of 8, width 32" in text
    assert "ran in       float32, stored as bfloat16" in text
    assert f"24 samples, {manifest.tokens:,} tokens, {manifest.supervised_tokens:,} of them answers" in text
    assert "agreement    100.000% of" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("train")]
    assert [(row[1], int(row[2])) for row in rows] == [("sums", 8), ("words", 8)]
    assert "checksum holds" not in text


def coverage(text: str) -> list[list[str]]:
    """The table of what draft vocabularies cover, with what stands below it."""
    lines = text.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("draft vocabulary covers"))
    return [line.split() for line in lines[start:]]


def shown(store: Store, sizes: list[int]) -> list[list[str]]:
    """The same table of these sizes, from the vocabularies themselves."""
    found = [store.draft_vocabulary(size) for size in sizes]
    return [
        ["draft", "vocabulary", "covers", *(f"D={size:,}" for size in sizes)],
        ["all", "sources", *(f"{vocabulary.covered:.1%}" for vocabulary in found)],
        *([name, *(f"{vocabulary.coverage[name]:.1%}" for vocabulary in found)] for name in ("sums", "words")),
    ]


def test_coverage_of_all_answers_and_of_each_source(
    run_dir: Path, recipe: Settings, changed: Callable[..., Settings], inspect
) -> None:
    store = Store(run_dir / "store")
    size = store.manifest.target["vocab_size"]
    shares = [size // part for part in (16, 8, 4, 2)]
    assert coverage(inspect(run_dir).out) == shown(store, shares)
    save(recipe, run_dir / "config.yaml")
    with_recipe = [*shown(store, sorted([*shares, 64])), ["D=64", "is", "that", "of", "the", "run's", "recipe"]]
    assert coverage(inspect(run_dir).out) == coverage(inspect(store.path).out) == with_recipe
    save(changed("draft", vocab_size=size), run_dir / "config.yaml")
    *table, words = coverage(inspect(run_dir).out)
    assert [row[-1] for row in table] == [f"D={size:,}", "100.0%", "100.0%", "100.0%"]
    assert words[0] == f"D={size:,}"
    for recipe_text in ("draft:\n  vocab_size: 1000000\n", "draft:\n  no_such_setting: 1\n"):
        (run_dir / "config.yaml").write_text(recipe_text)
        assert coverage(inspect(run_dir).out) == shown(store, shares)


def test_a_run_is_as_good_as_its_store(finished: Path, inspect) -> None:
    assert inspect(finished) == inspect(finished / "store")
    assert inspect(finished, "--verify").out == inspect(finished).out + "\nevery checksum holds\n"


def test_no_store(tmp_path: Path, inspect) -> None:
    said = inspect(tmp_path, "--verify")
    assert said.code == 2 and "it holds no manifest, so it is not finished; run eagle3 record first" in said.error


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_found(run_dir: Path, inspect, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Anywhere in JSON, in the headers of shards and tensors, and here and there among the states."""
    monkeypatch.setattr(verification, "READERS", 1)  # files this small only lose by more
    found = 0
    for path in sorted((run_dir / "store").rglob("*")):
        if path.is_file() and path.suffix != ".lock" and not re.match("shard-0000[1-3]", path.name):
            for offset in offsets(path, step):
                flip(path, offset)
                said = refusal(run_dir)
                assert path.stem in said or "its schema is" in said, f"{path.name}, byte {offset}: {said}"
                flip(path, offset)
                found += 1
    assert inspect(run_dir, "--verify").code == 0
    assert found > 7_000 / step


def test_a_flipped_bit_among_the_states_is_not_seen_without_verify(run_dir: Path, inspect) -> None:
    shard = run_dir / "store" / "shard-00000.safetensors"
    flip(shard, shard.stat().st_size - 5)
    assert inspect(run_dir).code == 0
    said = inspect(run_dir, "--verify")
    assert said.code == 2 and said.out == inspect(run_dir).out
    assert said.error == (
        f"error: store = {run_dir / 'store'}: 3 of 4 shards are whole, but not shard-00000.safetensors: its checksum is "
        "not that of what was recorded; delete these files and run eagle3 record again, which keeps what is whole\n"
    )


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "problem"), [(Path.unlink, "it is missing"), (truncate, r"it has [\d,]+ bytes and not [\d,]+")]
)
def test_a_truncated_or_missing_shard_leaves_the_others_readable(run_dir: Path, inspect, harm, problem: str) -> None:
    folder = run_dir / "store"
    harm(folder / "shard-00002.safetensors")
    for arguments in ((run_dir,), (run_dir, "--verify")):
        said = inspect(*arguments)
        assert said.code == 2 and said.out == ""
        assert re.search(f": 3 of 4 shards are whole, but not shard-00002.safetensors: {problem}; delete", said.error)
    for number in (0, 1, 3):
        path = folder / f"shard-0000{number}.safetensors"
        shard = Shard.open(folder, read_entry(path))
        assert [
            len(sample.input_ids) for sample in (shard[row] for row in range(len(shard)))
        ] == shard.index.lengths().tolist()


def test_more_files_than_a_line_names_are_listed(run_dir: Path, inspect) -> None:
    for name in ("head", "index", "shard-00000", "shard-00001", "shard-00003"):
        flip(run_dir / "store" / f"{name}.safetensors", 1_000)
    said = inspect(run_dir, "--verify")
    assert said.code == 2 and "1 of 4 shards are whole, but not shard-00000" in said.error
    assert (
        "shard-00003.safetensors: its checksum is not that of what was recorded, and 2 more files, listed above"
        in said.error
    )
    assert [line.split(":")[0] for line in said.out.splitlines()] == [
        f"{name}.safetensors" for name in ("shard-00000", "shard-00001", "shard-00003", "index", "head")
    ]


@pytest.mark.parametrize("harm", [Path.unlink, truncate, lambda path: flip(path, 33)])
def test_who_does_as_is_said_has_the_store_again(
    run_dir: Path, finished: Path, recipe: Settings, tiny_target: Target, inspect, files_of, harm
) -> None:
    expected = files_of(finished / "store")
    for name in expected:
        harm(run_dir / "store" / name)
        said = inspect(run_dir, "--verify")
        kept = {path.name: path.stat().st_ino for path in (run_dir / "store").glob("shard-*.safetensors")}
        if name == "manifest.json" and harm is Path.unlink:
            assert said.code == 0 and "not finished" in said.out
        else:
            assert said.code == 2 and "run eagle3 record" in said.error, name
            problem = said.error.partition("; delete ")[0]
            for file in re.findall(r"[\w./-]+\.(?:safetensors|json|jinja)(?=:)", problem):
                (run_dir / "store" / file).unlink(missing_ok=True)
                kept.pop(Path(file).name, None)
        record(recipe, run_dir, tiny_target)
        assert files_of(run_dir / "store") == expected, name
        assert all((run_dir / "store" / shard).stat().st_ino == inode for shard, inode in kept.items()), name


def test_a_shard_that_belongs_elsewhere(run_dir: Path, inspect) -> None:
    shutil.copy(run_dir / "store" / "shard-00001.safetensors", run_dir / "store" / "shard-00099.safetensors")
    said = inspect(run_dir)
    assert (
        said.code == 2 and "4 of 4 shards are whole, but not shard-00099.safetensors: it does not belong" in said.error
    )


@pytest.mark.parametrize(
    ("setting", "value", "other"),
    [
        ("weights of the target", "beef", lambda made: {"target": made.target | {"weights_sha256": "beef"}}),
        ("target.path", "other", lambda made: {"recipe": made.recipe | {"target.path": "other"}}),
        ("record.shard_tokens", 99, lambda made: {"recipe": made.recipe | {"record.shard_tokens": 99}}),
    ],
)
def test_a_manifest_of_another_recording(
    run_dir: Path, recipe: Settings, tiny_target: Target, inspect, setting: str, value: object, other
) -> None:
    """Both values are named, whoever opens the store."""
    folder, made = run_dir / "store", read_manifest(run_dir / "store")
    shards = tuple(replace(shard, recording="another") for shard in made.shards)
    write_manifest(folder, replace(made, recording="another", shards=shards, **other(made)))
    own = json.loads((folder / "record.stage.json").read_bytes())[setting]
    complaint = (
        f"{setting} = {value}: {folder / 'manifest.json'} says so, and the store was recorded with {own}; delete"
    )
    for arguments in ((run_dir,), (run_dir, "--verify")):
        said = inspect(*arguments)
        assert said.code == 2 and complaint in said.error
    with pytest.raises(UserError, match="delete that manifest and run eagle3 record again"):
        Store(folder)
    (folder / "manifest.json").unlink()
    record(recipe, run_dir, tiny_target)
    assert read_manifest(folder) == made


@pytest.fixture
def unfinished(run_dir: Path, files_of) -> Path:
    """A run of whose store two of four shards are recorded, and half of a third."""
    for name in files_of(run_dir / "store"):
        if not re.match(r"shard-0000[02]|record", name):
            (run_dir / "store" / name).unlink()
    (run_dir / "store" / ".shard-00001.safetensors.99.tmp").write_bytes(b"half")
    return run_dir


def test_a_store_that_is_not_finished_is_described(
    unfinished: Path, finished: Path, tiny_target: Target, inspect
) -> None:
    manifest = read_manifest(finished / "store")
    held = [manifest.shards[number] for number in (0, 2)]
    samples, tokens = sum(shard.samples for shard in held), sum(shard.tokens for shard in held)
    said = inspect(unfinished)
    assert said.code == 0
    assert f"store        {unfinished / 'store'}, not finished" in said.out
    assert f"weights      sha256 {tiny_target.info.weights_sha256}" in said.out
    assert f"recorded     {samples} of 24 samples, {tokens} of {manifest.tokens:,} tokens, " in said.out
    assert f"size         {sum(shard.bytes for shard in held):,} bytes in 2 shards" in said.out
    assert said.out.endswith("\ngo on with   eagle3 record CONFIG\n")
    (unfinished / "config.yaml").touch()
    verified = inspect(unfinished, "--verify").out
    assert verified.endswith(f"\nevery checksum holds\ngo on with   eagle3 record {unfinished / 'config.yaml'}\n")
    (unfinished / "conversations" / "answers.jsonl").write_text("other")
    assert f"recorded     {samples} samples, {tokens} tokens, " in inspect(unfinished / "store").out


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_recorded_of_it_is_verified(unfinished: Path, inspect, monkeypatch, step: int) -> None:
    monkeypatch.setattr(verification, "READERS", 1)
    folder, found = unfinished / "store", 0
    for path in (folder / "shard-00002.json", folder / "shard-00002.safetensors", folder / "record.stage.json"):
        unchecked = path.read_bytes().find(b'"disagreeing": ') + 15 if path.name == "shard-00002.json" else -1
        for offset in offsets(path, step):
            if offset != unchecked:  # how many tokens the states do not predict, nothing else says
                flip(path, offset)
                said = refusal(unfinished)
                assert path.stem in said, f"{path.name}, byte {offset}: {said}"
                flip(path, offset)
                found += 1
    assert inspect(unfinished, "--verify").code == 0
    assert found > 1_500 / step


def test_a_truncated_shard_of_it_is_seen_at_once(unfinished: Path, inspect) -> None:
    truncate(unfinished / "store" / "shard-00002.safetensors")
    said = inspect(unfinished)
    assert said.code == 2 and "in 1 shards" in said.out
    assert "1 of 2 shards are whole, but not shard-00002.safetensors: it has" in said.error


def test_how_many_read_changes_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(run_dir / "store")
    for name in ("head", "shard-00003", "shard-00001"):
        flip(run_dir / "store" / f"{name}.safetensors", 1_000)
    found = []
    for readers in (1, 3, 16):
        monkeypatch.setattr(verification, "READERS", readers)
        found.append(store.verify())
    assert found[0] == found[1] == found[2]
    assert [line.split(":")[0] for line in found[0]] == [
        "shard-00001.safetensors",
        "shard-00003.safetensors",
        "head.safetensors",
    ]


def test_a_disk_that_cannot_be_read(run_dir: Path, inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def failing(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "shard-00001.safetensors" and "buffering" in options:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    said = inspect(run_dir, "--verify")
    assert said.code == 2 and "shard-00001.safetensors: it cannot be read (Input/output error)" in said.error


def test_what_takes_long_says_how_far_it_is(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "INTERVAL_LOG", 0.0)
    assert Store(finished / "store").verify() == []
    lines = capsys.readouterr().err.splitlines()
    size = r"[\d.]+ kB"
    assert all(re.fullmatch(rf"verify {size} of {size}, [\d.]+ [kMG]?B/s, \d+:\d\d left", line) for line in lines)
    done, total = re.findall(size, lines[-1])[:2]
    assert done == total and lines[-1].endswith("0:00 left")
