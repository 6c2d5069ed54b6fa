"""Questions and answers from source: what is extracted, how it is split, what counts as a near-duplicate."""

from pathlib import Path

from eagle3.data import corpus

SOURCE = '''
import os


class Box:
    @property
    def size(self):
        """Return how many things the box holds.

        Empty boxes hold nothing.
        """
        count = 0
        for thing in self.things:
            count += thing.weight
        if count > self.limit:
            raise OverflowError("too heavy")
        return count


def one_liner(): return 1


def bare(first, second):
    total = first + second
    total *= 2
    total -= first
    total += second * second
    return total
'''


def write(folder: Path, text: str = SOURCE) -> list[corpus.Function]:
    (folder / "boxes.py").write_text(text)
    return list(corpus.functions(corpus.source_files(folder)))


def test_a_documented_method_gives_all_four_kinds(tmp_path: Path) -> None:
    method = next(f for f in write(tmp_path) if f.name == "Box.size")
    found = {e.kind: e for e in corpus.examples(method)}
    assert tuple(found) == corpus.KINDS
    assert method.signature == "@property\ndef size(self):"
    assert found["explain"].answer == "Return how many things the box holds.\n\nEmpty boxes hold nothing."
    assert "boxes.Box.size" in found["explain"].question
    assert "Return how many" not in found["document"].question
    assert found["implement"].answer.startswith("```python\n@property\ndef size(self):\n    count = 0")
    shown = found["complete"].question.partition("```python\n")[2].removesuffix("\n```")
    rest = found["complete"].answer.removeprefix("```python\n").removesuffix("\n```")
    assert f"{shown}\n{rest}" == method.body


def test_without_a_docstring_there_is_only_code_to_complete(tmp_path: Path) -> None:
    functions = {f.name: f for f in write(tmp_path)}
    assert set(functions) == {"Box.size", "bare"}
    assert [e.kind for e in corpus.examples(functions["bare"])] == ["complete"]


def test_files_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("print 'Python 2'")
    (tmp_path / "latin.py").write_bytes(b"# \xff\n")
    assert {f.module for f in write(tmp_path)} == {"boxes"}


def test_the_split_is_the_top_level_modules() -> None:
    assert corpus.split_of("importlib.metadata") == corpus.split_of("importlib") == "test"
    assert corpus.split_of("mailbox") == "validation"
    assert corpus.split_of("json.decoder") == "train"


def test_the_standard_library_has_prompts_of_every_kind_in_every_split() -> None:
    found = [e for f in corpus.functions(corpus.standard_library()) for e in corpus.examples(f)]
    assert len({e.id for e in found}) == len(found)
    for split, at_least in (("train", 2000), ("validation", 200), ("test", 400)):
        for kind in corpus.KINDS:
            assert sum(e.split == split and e.kind == kind for e in found) >= at_least


def test_near_duplicates_are_found_and_new_text_is_not() -> None:
    novelty = corpus.Novelty(limit=0.2)
    text = " ".join(f"word{i}" for i in range(100))
    assert novelty.accept(text)
    assert not novelty.accept(text.replace("word50", "other"))
    assert novelty.accept(" ".join(f"new{i}" for i in range(100)))
