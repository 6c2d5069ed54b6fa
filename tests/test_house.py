"""House rules that no tool checks."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "data", "eval", "models", "train")
MODULES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
LONGEST_FILE, LONGEST_FUNCTION = 350, 60
TEXTS = [
    path
    for folder in (*ROOMS, "slurm", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in {"", ".py", ".md", ".yaml", ".json", ".txt", ".sh", ".sbatch"}
] + [path for path in ROOT.iterdir() if path.is_file() and path.suffix in {"", ".py", ".md", ".toml", ".txt"}]
#: Home folders, and addresses from which packages are downloaded: both are the machine's business.
MACHINE = re.compile(r"/(?:home|root|Users)/\w|pypi|download\.pytorch|--(?:extra-)?index-url")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short_and_say_what_they_are_for(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    tree = ast.parse(source)
    assert ast.get_docstring(tree) or not tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_knows_a_machine(path: Path) -> None:
    if path.name != Path(__file__).name:
        assert not MACHINE.search(path.read_text(encoding="utf-8"))


def test_pins_lie_within_the_ranges_and_cover_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=!~]", line)[0].lower() for line in asked} - {"setuptools"}
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert names <= pins.keys()
    for line in asked:
        name, bounds = re.match(r"([\w-]+)(.*)", line).groups()
        for comparison, bound in re.findall(r"(>=|<)([\d.]+)", bounds):
            if name.lower() in pins:
                pinned, limit = (tuple(map(int, text.split("."))) for text in (pins[name.lower()], bound))
                assert pinned >= limit if comparison == ">=" else pinned < limit
