"""Two results files of the benchmark of decoding side by side, such as those before and after a change.

python -m eagle3.eval.bench.comparison before.json after.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...configs.entry import finish
from ...configs.errors import UserError

Line = dict[str, Any]
NEEDED = {"benchmark", "hardware", "commit", "shape", "unit", "value", "reference", "ratio", "notes"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(prog="comparison", description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    asked = parser.parse_args(arguments)
    for line in compared(read_results(asked.before, "before"), read_results(asked.after, "after")):
        print(line)


def read_results(path: Path, option: str) -> list[Line]:
    """The lines of a results file.

    Raises:
        UserError: there is none, or it is something else.
    """
    remedy = "give a file that --out wrote"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(option, path, f"it cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        raise UserError(option, path, "it is no JSON", remedy) from error
    if not isinstance(found, list) or not all(isinstance(line, dict) and line.keys() >= NEEDED for line in found):
        raise UserError(option, path, "it holds no results of a benchmark", remedy)
    return found


def compared(before: Sequence[Line], after: Sequence[Line]) -> Iterator[str]:
    """What to print: where the two were measured if that differs, then a line per figure that both have."""
    for name in ("commit", "hardware", "shape"):
        at_first, now = ("; ".join(dict.fromkeys(str(line[name]) for line in lines)) for lines in (before, after))
        if at_first != now:
            yield f"{name}: {at_first or '-'} before, {now or '-'} after"
    theirs, ours = ({_identity(line): line for line in lines} for lines in (before, after))
    both = [each for each in ours if each in theirs]
    names = {each: f"{ours[each]['notes'].partition(';')[0]}, {ours[each]['unit']}" for each in both}
    width = max(map(len, names.values()), default=0)
    yield f"  {'':<{width}} {'before':>9} {'after':>9} {'ratio':>8} {'ratio':>8} {'times as fast':>14}"
    for each in both:
        earlier, later = theirs[each], ours[each]
        values = f"{earlier['value']:9.2f} {later['value']:9.2f} {earlier['ratio']:8.2f} {later['ratio']:8.2f}"
        slow, fast = earlier["value"], later["value"]
        if later["unit"].endswith("/user"):
            slow, fast = fast, slow
        times = f"{slow / fast:14.2f}" if fast else f"{'-':>14}"
        yield f"  {names[each]:<{width}} {values} {times}  (ratio: to {later['reference']['name']})"
    alone = len(ours.keys() ^ theirs.keys())
    if alone:
        yield f"  {alone} figure{'s are' if alone > 1 else ' is'} in one of the two alone"


def _identity(line: Line) -> tuple[str, str, str]:
    return line["benchmark"], line["notes"].partition(";")[0], line["reference"]["name"]


if __name__ == "__main__":
    sys.exit(finish(main))
