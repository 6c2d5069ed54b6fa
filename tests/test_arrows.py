"""Imports go one way: configs <- models <- data <- train, and configs, models, data <- eval; the command line sees all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "configs": {"configs"},
    "models": {"configs", "models"},
    "data": {"configs", "models", "data"},
    "train": {"configs", "models", "data", "train"},
    "eval": {"configs", "models", "data", "eval"},
    "cli": {"cli", "configs", "models", "data", "train", "eval"},
    "__main__": {"cli"},
    "__init__": set(),
}
MODULES = [*ROOT.glob("*.py"), *(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))]


def rooms(source: str, module: tuple[str, ...]) -> Iterator[str]:
    """The rooms of this project that the module ``module`` (its path in the package) imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0, module=str(origin)):
                names = [f"{origin}.{alias.name}" for alias in node.names]
            case ast.ImportFrom(level=level, module=origin):
                base = ["eagle3", *module][:-level]
                names = [".".join([*base, *([origin] if origin else []), alias.name]) for alias in node.names]
            case ast.Constant(value=str(text)):
                # Modules that the command line imports late are named in strings.
                names = [text] if text.startswith("eagle3.") and text.replace(".", "").isidentifier() else []
        for name in names:
            package, _, inside = name.partition(".")
            if package == "eagle3" and inside:
                yield inside.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    module = path.relative_to(ROOT).with_suffix("").parts
    assert set(rooms(path.read_text(encoding="utf-8"), module)) <= ALLOWED[module[0]]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..data.store import Store", {"data"}),
        ("from .. import eval", {"eval"}),
        ("from ..eval import metrics as m", {"eval"}),
        ("import eagle3.train.loop", {"train"}),
        ("from eagle3 import data", {"data"}),
        ("def f():\n    from ..train import loop", {"train"}),
        ("if True:\n    import eagle3.eval", {"eval"}),
        ("loop = Lazy('eagle3.train.loop')", {"train"}),
        ("from .draft import Eagle3Draft", {"models"}),
        ("import torch\nfrom os import path", set()),
    ],
)
def test_every_spelling_is_seen(source: str, found: set[str]) -> None:
    assert set(rooms(source, ("models", "rollout"))) == found


def test_a_module_below_a_room_is_resolved_from_where_it_stands() -> None:
    assert set(rooms("from ...models.target import Target", ("train", "embedded", "card"))) == {"models"}
    assert set(rooms("from .. import loop", ("train", "embedded", "card"))) == {"train"}
