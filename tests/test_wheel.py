"""The wheel holds every module and every data file: setuptools leaves out, silently, what pyproject.toml does not list."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "data", "eval", "models", "train")
NOT_SHIPPED = {".pyc"}


def sources() -> set[str]:
    """What the package consists of: all files of its folders, and the modules beside them."""
    inside = {path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in inside | set(ROOT.glob("*.py")) if path.suffix not in NOT_SHIPPED}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, without the network."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*sources(), "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(out), str(copy)], check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_nothing_is_left_out_and_nothing_else_is_in(wheel: zipfile.ZipFile) -> None:
    packed = {name.removeprefix("eagle3/") for name in wheel.namelist() if name.startswith("eagle3/")}
    assert packed == sources()


def test_only_one_name_is_taken_in_the_users_environment(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"eagle3"}


def test_the_command_and_the_licence_are_in(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "eagle3 = eagle3.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
