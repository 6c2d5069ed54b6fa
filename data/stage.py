"""What a stage's outputs were made from, so that a run never mixes the outputs of two recipes.

A stage writes ``<name>.stage.json`` before its first output: the settings and input files that determine what it
writes. Started again it goes on, or skips, if they are the same, and refuses if they are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from ..configs.errors import UserError
from .files import encode_json, make_folder, write_atomic

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"


class Stage:
    """One stage of a run.

    Args:
        name: ``prepare``, ``regenerate``, ``record``, ``train`` or ``eval``.
        run_dir: the run's folder.
        folder: where the stage writes.
        inputs: everything that determines its outputs, under the name by which a user knows it.
    """

    def __init__(self, name: str, run_dir: Path, folder: Path, inputs: Mapping[str, Json]) -> None:
        self.name, self.folder, self.inputs = name, folder, dict(inputs)
        self.path = folder / f"{name}.stage.json"
        self.resume = f"eagle3 {name} {run_dir / 'config.yaml'}"

    def begun(self) -> bool:
        """Whether the stage was begun before, with these inputs.

        Raises:
            UserError: it was begun with others.
        """
        if not self.path.exists():
            return False
        earlier = self.earlier()
        for key, value in self.inputs.items():
            if key not in earlier or earlier[key] != value:
                raise UserError(
                    key,
                    json.dumps(value),
                    f"{self.folder} was made with {json.dumps(earlier.get(key))}",
                    f"set it back, choose another run.name, or delete {self.folder}",
                )
        return True

    def begin(self) -> None:
        """Claim the folder for these inputs; raises as :meth:`begun` does, and where the folder cannot be written."""
        if not self.begun():
            make_folder(self.folder)
            write_atomic(self.path, encode_json(self.inputs))

    def earlier(self) -> dict[str, Json]:
        """The inputs with which it was begun; empty if it was not.

        Raises:
            UserError: they cannot be read.
        """
        if not self.path.exists():
            return {}
        try:
            earlier = json.loads(self.path.read_bytes())
        except ValueError:
            earlier = None
        if not isinstance(earlier, dict):
            raise UserError("run.name", self.path, "it is damaged", f"delete {self.folder}")
        return earlier


def at_least(setting: str, value: int, least: int) -> None:
    """Refuse a number of things that makes no sense."""
    if value < least:
        raise UserError(setting, value, "it is too small", f"give at least {least}")
