"""Rows of every kind of file and of datasets of the hub, in their order, and where each stands."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from eagle3.configs.errors import UserError
from eagle3.configs.settings import PrepareSettings
from eagle3.data import sources
from eagle3.data.files import file_sha256
from eagle3.data.sources import Row, files, fingerprint, hub_rows, rows
from pyarrow import parquet

LINES = [{"prompt": "One?"}, {"prompt": "Two?"}, {"prompt": "Three?"}]
#: Contents that are now a text, now parts: one type for all would change them.
MIXED = [
    {"messages": [{"role": "user", "content": "One?"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Two?"}]}]},
]


def jsonl(path: Path, lines: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(prompts: Path | str, **values: object) -> list[Row]:
    return list(rows(PrepareSettings(prompts=str(prompts), **values)))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_json_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", LINES)
    assert read(path) == [Row(f"{path}, line {n}", "mine", line) for n, line in enumerate(LINES, 1)]


@pytest.mark.parametrize("layout", ["list", "indented", "lines", "object"])
def test_json(tmp_path: Path, layout: str) -> None:
    path, lines = tmp_path / "mine.json", MIXED
    if layout == "lines":
        jsonl(path, lines)
    elif layout == "object":
        lines = lines[:1]
        path.write_text(json.dumps(lines[0]))
    else:
        path.write_text(json.dumps(lines, indent=2 if layout == "indented" else None))
    assert read(path) == [Row(f"{path}, row {n}", "mine", line) for n, line in enumerate(lines, 1)]
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [row.values for row in read(path)] == lines


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[{"prompt": "One?"}, {"prompt": ', r"mine.json, row 2: not JSON \(.*line 1"),
        ('[{"prompt": "One?"}, 3]', "mine.json, row 2: not a JSON object; write a list of objects"),
        ('[{"prompt": "One?"}', "mine.json: the list breaks off before row 2; write it again"),
        ('[{"prompt": "One?"},\n', "mine.json: the list breaks off before row 2; write it again"),
        ("nothing", "mine.json, row 1: not JSON"),
        ('[{"prompt": ' + "[" * 100_000, "mine.json, row 1: not JSON"),
        ("[{}]\xe9", r"mine.json: it cannot be read \(.*utf-8.*\); check"),
    ],
)
def test_broken_json(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "mine.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=complaint):
        read(tmp_path / "mine.json")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "mine-00001-of-00002.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(LINES), path, row_group_size=2)
    assert read(path) == [Row(f"{path}, row {n}", "mine", line) for n, line in enumerate(LINES, 1)]
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="mine-00001-of-00002.parquet: it cannot be read"):
        read(path)


def test_parquet_that_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    parquet.write_table(pyarrow.table({"prompt": [str(n) * 99 for n in range(3000)]}), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(UserError, match="mine.parquet: it cannot be read to its end"):
        read(path)


def test_folders_and_globs(tmp_path: Path) -> None:
    jsonl(tmp_path / "b" / "two.jsonl", LINES[1:2])
    jsonl(tmp_path / "a.jsonl", LINES[:1])
    jsonl(tmp_path / ".cache" / "hidden.jsonl", LINES)
    (tmp_path / "README.md").write_text("not prompts")
    assert [row.source for row in read(tmp_path)] == ["a", "two"]
    assert [row.source for row in read(tmp_path / "*.jsonl")] == ["a"]
    assert [row.source for row in read(tmp_path / "**" / "t*.jsonl")] == ["two"]
    with pytest.raises(UserError, match=r"there is no file that can be read; give a file \(.jsonl, .json, .parquet\)"):
        read(tmp_path / "*.txt")


@pytest.mark.parametrize("name", ["absent.jsonl", "a/absent.parquet", "/data/absent", "plain", "a/b/c"])
def test_no_such_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'there is no such file; give .*, a dataset \(owner/name\) or "stdlib"'):
        files(name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt")
    with pytest.raises(UserError, match='files that end in ".csv" are not read; give a file'):
        files(str(tmp_path / "mine.csv"))


def test_a_dataset_of_the_hub_that_cannot_be_had() -> None:
    with pytest.raises(
        UserError, match=r"prepare.prompts = nobody/nothing: it is no file, and datasets cannot load it"
    ):
        read("nobody/nothing")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder as a dataset's repository is laid out, with two configurations and two splits."""
    folder = tmp_path / "ultra"
    jsonl(folder / "chat" / "train.jsonl", [{"id": "x", "split": "sft", **line} for line in LINES])
    jsonl(folder / "chat" / "test.jsonl", LINES[:1])
    jsonl(folder / "code" / "train.jsonl", LINES[1:])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: chat\n  data_dir: chat\n  default: true\n"
        "- config_name: code\n  data_dir: code\n---\n"
    )
    return folder


def test_a_dataset_of_the_hub(dataset: Path) -> None:
    found = list(hub_rows(PrepareSettings(prompts=str(dataset))))
    assert found == [Row(f"{dataset}, row {n}", "ultra", line) for n, line in enumerate(LINES, 1)]
    held_out = hub_rows(PrepareSettings(prompts=str(dataset), hub_split="test"))
    assert [row.values for row in held_out] == LINES[:1]
    code = hub_rows(PrepareSettings(prompts=str(dataset), hub_config="code"))
    assert [row.values for row in code] == LINES[1:]
    for values in ({"hub_split": "dev"}, {"hub_config": "maths"}):
        with pytest.raises(
            UserError, match="datasets cannot load it .*; check name, prepare.hub_config, prepare.hub_split"
        ):
            list(hub_rows(PrepareSettings(prompts=str(dataset), **values)))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_dataset_of_mixed_contents_is_read_as_it_stands(tmp_path: Path, suffix: str) -> None:
    path = jsonl(tmp_path / "mixed" / f"train.{suffix}", MIXED)
    if suffix == "json":
        path.write_text(json.dumps(MIXED))
    assert [row.values for row in hub_rows(PrepareSettings(prompts=str(path.parent)))] == MIXED


def test_a_name_is_the_hubs_where_no_file_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple] = []

    class Stream(list):
        features = ("prompt",)

    def load_dataset(name: str, config: str | None, **values: object) -> Stream:
        asked.append((name, config, values))
        return Stream(LINES)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    found = read("me/ultra", hub_config="chat", hub_split="train_sft", hub_revision="abc")
    assert [(row.where, row.source) for row in found] == [(f"me/ultra, row {n}", "ultra") for n in (1, 2, 3)]
    assert asked == [("me/ultra", "chat", {"split": "train_sft", "revision": "abc", "streaming": True})]
    jsonl(tmp_path / "me" / "ultra" / "mine.jsonl", LINES[:1])
    assert [row.where for row in read("me/ultra")] == ["me/ultra/mine.jsonl, line 1"]


def test_fingerprints(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", LINES)
    assert fingerprint(PrepareSettings(prompts=str(path))) == {"prepare.prompts": file_sha256(path)}
    one = fingerprint(PrepareSettings(prompts=str(path), column="prompt"))
    assert one == {"prepare.prompts": file_sha256(path), "prepare.column": "prompt"}
    jsonl(tmp_path / "other.jsonl", LINES[:1])
    both = fingerprint(PrepareSettings(prompts=str(tmp_path)))
    (tmp_path / "other.jsonl").rename(tmp_path / "another.jsonl")  # it names the source
    assert fingerprint(PrepareSettings(prompts=str(tmp_path))) != both
    hub = fingerprint(PrepareSettings(prompts="me/ultra", hub_revision="abc"))
    assert hub == {
        "prepare.prompts": "me/ultra",
        "prepare.hub_config": None,
        "prepare.hub_split": "train",
        "prepare.hub_revision": "abc",
    }
