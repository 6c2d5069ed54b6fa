"""The trainer as a launcher starts it, on any number of processes.

    accelerate launch --config_file configs/accelerate/8gpu.yaml -m eagle3.train maverick run.name=first

The same as ``eagle3 train``, to the exit code.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..configs.entry import Lazy, finish, opened, share_cores
from ..configs.errors import UserError
from ..configs.loader import load

if TYPE_CHECKING:
    from . import stage
else:
    stage = Lazy("eagle3.train.stage")


def main() -> None:
    """Train what the command line names."""
    recipe, *overrides = sys.argv[1:] or [""]
    if not recipe or recipe.startswith("-"):
        raise UserError("recipe", recipe or "(none)", "there is no recipe", "write CONFIG [section.name=value ...]")
    settings = load(recipe, overrides)
    with opened(settings) as folder:
        stage.train(settings, folder)


if __name__ == "__main__":
    share_cores()
    sys.exit(finish(main))
