"""How a round drafts, as a recipe names it: ``chain 5``, or ``tree 60/7/10``.

parse("tree 60/7/10")                    # Drafting(method="tree", length=7, total=60, top_k=10)
named(5, ["chain 7", "tree 60/7/10"])    # the three of a recipe, the main one first
chosen(3, ["chain 7"])                   # chain 3, which was chosen by measurement, chain 5 and chain 7
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

AUTO = "auto"  # of eval.chain: the length is chosen by measurement
FIXED = 5  # the chain that is measured beside a chosen one, for comparison between runs
LONGEST = 8  # of the chains among which is chosen
FORM = re.compile(r"(?P<method>chain) +(?P<length>\d+)|(?P<tree>tree) +(?P<total>\d+)/(?P<depth>\d+)/(?P<top_k>\d+)")


class Drafting(NamedTuple):
    """What is drafted in a round, whatever it is drawn by.

    ``method``: "chain", "tree", or "none" for plain decoding. ``length``: tokens of a chain, levels of a tree. ``total``: most nodes of a tree that
    are verified, root excluded; None for a chain. ``top_k``: children of a node; 1 for a chain.
    """

    method: str
    length: int
    total: int | None
    top_k: int

    @property
    def name(self) -> str:
        """As a recipe says it."""
        if not self.length:
            return self.method
        if self.total is None:
            return f"{self.method} {self.length}"
        return f"{self.method} {self.total}/{self.length}/{self.top_k}"

    @property
    def most(self) -> int:
        """Most tokens of a round."""
        return self.length if self.total is None else self.total


PLAIN = Drafting("none", 0, None, 1)


def chain(length: int) -> Drafting:
    """A chain of so many tokens."""
    return Drafting("chain", length, None, 1)


def parse(name: str) -> Drafting:
    """The drafting of this name.

    Raises:
        ValueError: it is none; the message says why.
    """
    found = FORM.fullmatch(name.strip())
    if found is None:
        raise ValueError(f'"{name}" is no drafting')
    if found["tree"]:
        drafting = Drafting("tree", int(found["depth"]), int(found["total"]), int(found["top_k"]))
    else:
        drafting = chain(int(found["length"]))
    if not all((drafting.length, drafting.most, drafting.top_k)):
        raise ValueError(f'"{name}" has a 0 in it')
    if drafting.most < drafting.length:
        raise ValueError(f'"{name}" verifies fewer nodes than it has levels')
    return drafting


def named(main: int, beside: Iterable[str]) -> tuple[Drafting, ...]:
    """The draftings of a recipe: the main chain of so many tokens, then those ``beside`` it."""
    return (chain(main), *map(parse, beside))


def chosen(length: int, beside: Iterable[str]) -> tuple[Drafting, ...]:
    """The draftings where a chain of ``length`` was chosen, or :data:`PLAIN` (0): it first, the fixed one, those beside."""
    main = chain(length) if length else PLAIN
    return tuple(dict.fromkeys((main, chain(FIXED), *map(parse, beside))))


def candidates(beside: Iterable[str]) -> tuple[Drafting, ...]:
    """All draftings that may be needed where a chain is still to be chosen; the chains of 1, 2, ... tokens come first."""
    return tuple(dict.fromkeys((*map(chain, range(1, LONGEST + 1)), *map(parse, beside))))
