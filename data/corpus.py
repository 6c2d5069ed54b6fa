"""Questions and answers made from Python source: what the embedded target was trained on, and what the demo asks it.

Every documented function of the standard library (or of any folder of packages) gives conversations of four kinds:

=========== ============================================ ===========================================
kind        question                                     answer
=========== ============================================ ===========================================
explain     the name and the signature                   the docstring
document    the source without its docstring             the docstring
implement   the signature and the docstring              the source without its docstring
complete    the first half of the source                 the other half
=========== ============================================ ===========================================

Sources are parsed, never imported. The split is a hash of the top-level module's name, so a function keeps its split in
every Python version, also when it moves between the files of its package.

    python -m eagle3.data.corpus | head -3
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

KINDS = ("explain", "document", "implement", "complete")

#: Folders of the standard library that hold tests, bundled wheels, generated tables or other people's packages.
SKIPPED_FOLDERS = {
    "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages",
    "__pycache__", "_vendor", "vendor", "vendored", "externals", "pydoc_data", "encodings", "migrations", "locale",
}  # fmt: skip

MIN_DOCSTRING, MAX_DOCSTRING = 24, 900  # characters of an answer that is prose
MIN_SOURCE, MAX_SOURCE = 80, 1500  # characters of one function's source
SHINGLE = 8  # words; near-duplicates are counted in these
HELD_OUT_OVERLAP = 0.2  # share of its shingles that a training function may share with held-out functions
TRAINING_OVERLAP = 0.5  # and with training functions before it
RESEMBLES_HELD_OUT = "functions: resembles a held-out function"
RESEMBLES_TRAINING = "functions: resembles a training function"

_QUESTIONS = {
    "explain": ("What does `{name}` do?", "Explain `{name}`.", "What is `{name}` for?"),
    "document": ("Write a docstring for this function.", "Document this function.", "Summarise what this code does."),
    "implement": ("Implement this function.", "Write the body of `{name}`.", "How would you implement `{name}`?"),
    "complete": ("Complete this function.", "Finish this code.", "Write the rest of `{name}`."),
}


@dataclass(frozen=True)
class Example:
    """One question and its real answer.

    ``id`` is stable across runs; ``kind`` is one of :data:`KINDS`; ``module`` is dotted; ``split`` is ``train``,
    ``validation`` or ``test``.
    """

    id: str
    kind: str
    module: str
    split: str
    question: str
    answer: str


@dataclass(frozen=True)
class Function:
    """One function as written, dedented: ``signature`` with its decorators, ``body`` the source without docstring."""

    module: str
    name: str
    signature: str
    docstring: str
    body: str


def digest(text: str) -> int:
    """A 64-bit hash of ``text`` that is the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(module: str) -> str:
    """The split of every example of ``module``: a function of its top-level name alone (80 / 8 / 12 percent)."""
    share = digest("split:" + module.partition(".")[0]) % 100
    return "train" if share < 80 else "validation" if share < 88 else "test"


def standard_library() -> Iterator[tuple[str, Path]]:
    """Yield ``(module, path)`` for the source files of the running interpreter's standard library, sorted."""
    yield from source_files(Path(sysconfig.get_paths()["stdlib"]))


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield ``(dotted module name, path)`` for the Python files below ``root``, sorted, tests and bundles left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and not parts[-1].startswith(("test_", "_test")):
            yield ".".join(part for part in parts if part != "__init__"), path


def functions(files: Iterable[tuple[str, Path]]) -> Iterator[Function]:
    """Yield the functions of ``files`` in order; a file that does not parse or decode is passed over."""
    for module, path in files:
        try:
            yield from list(_functions(module, path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            continue  # Python 2 left-overs and templates exist in every tree


def examples(function: Function, kinds: Iterable[str] = KINDS) -> Iterator[Example]:
    """Yield the example of each of ``kinds`` for which ``function`` is neither too short nor too long."""
    for kind in kinds:
        exchange = _exchange(function, kind)
        if exchange is None:
            continue
        shown, answer = exchange
        identity = f"{function.module}:{function.name}:{kind}"
        name = f"{function.module}.{function.name}" if kind == "explain" else function.name
        ask = _QUESTIONS[kind][digest(identity) % 3].format(name=name)
        question = f"{ask}\n\n{_fence(shown)}"
        unique = f"{identity}:{digest(question + answer) % 16**8:08x}"  # one name can be defined twice in a module
        yield Example(unique, kind, function.module, split_of(function.module), question, answer)


def _functions(module: str, text: str) -> Iterator[Function]:
    tree = ast.parse(text)
    lines = text.splitlines()
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, prefix = stack.pop()
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, ast.ClassDef):
                stack.append((child, f"{prefix}{child.name}."))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _function(module, child, prefix, lines)
                if function is not None:
                    yield function


def _function(
    module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str, lines: list[str]
) -> Function | None:
    first, last = node.body[0], node.end_lineno or node.lineno
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring = ast.get_docstring(node, clean=True) or ""
    header_end = first.lineno - 1
    if first.lineno == node.lineno:  # `def f(): return 1` has nothing to complete or implement
        return None
    body_start = (first.end_lineno or first.lineno) if docstring else header_end
    header = textwrap.dedent("\n".join(lines[start - 1 : header_end])).rstrip()
    source = textwrap.dedent("\n".join(lines[start - 1 : header_end] + lines[body_start:last])).rstrip()
    if "\t" in source or not header:
        return None
    return Function(module, prefix + node.name, header, inspect.cleandoc(docstring), source)


def _exchange(function: Function, kind: str) -> tuple[str, str] | None:
    """What the question shows and what the answer says, or None where the function is too short or too long for it."""
    prose = _paragraphs(function.docstring)
    fits = MIN_SOURCE <= len(function.body) <= MAX_SOURCE
    if kind == "complete":
        lines = function.body.split("\n")
        half = len(function.signature.split("\n")) + (len(lines) - len(function.signature.split("\n"))) // 2
        if not fits or len(lines) - half < 3:
            return None
        return "\n".join(lines[:half]), _fence("\n".join(lines[half:]))
    if prose is None:
        return None
    if kind == "explain":
        return (function.signature, prose) if len(function.signature) <= MAX_SOURCE else None
    if not fits:
        return None
    if kind == "document":
        return function.body, prose
    documented = f"{function.signature}\n{textwrap.indent(chr(34) * 3 + prose + chr(34) * 3, '    ')}"
    return documented, _fence(function.body)


def _fence(code: str) -> str:
    return f"```python\n{code}\n```"


def _paragraphs(docstring: str) -> str | None:
    """The leading paragraphs of ``docstring`` that fit an answer, or None where even the first does not."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(longer) > MAX_DOCSTRING:
            break
        kept = longer
    return kept if len(kept) >= MIN_DOCSTRING else None


def shingles(text: str) -> set[int]:
    """Hashes of every run of :data:`SHINGLE` consecutive words (identifiers, numbers, punctuation marks) of ``text``."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(max(1, len(words) - SHINGLE + 1))}


class Novelty:
    """Finds near-duplicates: texts of which more than ``limit`` of the shingles stand in texts added before."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._seen: set[int] = set()

    def resembles(self, text: str) -> bool:
        """Whether ``text`` is a near-duplicate of what was added."""
        found = shingles(text)
        return len(found & self._seen) > self.limit * len(found)

    def add(self, text: str) -> None:
        """Remember ``text``."""
        self._seen |= shingles(text)

    def accept(self, text: str) -> bool:
        """Whether ``text`` is new; if it is, remember it."""
        if self.resembles(text):
            return False
        self.add(text)
        return True


class Screen:
    """Keeps copies out of training: of held-out functions, and of training functions that were kept before.

    Args:
        library: all functions of the standard library, whose modules decide what is held out.
    """

    def __init__(self, library: Iterable[Function]) -> None:
        self._held_out, self._seen = Novelty(HELD_OUT_OVERLAP), Novelty(TRAINING_OVERLAP)
        for function in library:
            if split_of(function.module) != "train":
                self._held_out.add(_text(function))

    def refusal(self, function: Function) -> str | None:
        """Why a training function is left out; None where it is kept, and remembered."""
        if self._held_out.resembles(_text(function)):
            return RESEMBLES_HELD_OUT
        return None if self._seen.accept(_text(function)) else RESEMBLES_TRAINING


def _text(function: Function) -> str:
    return f"{function.body}\n{function.docstring}"


def main() -> None:
    """Print the standard library's examples, one JSON object a line."""
    for function in functions(standard_library()):
        for example in examples(function):
            sys.stdout.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
