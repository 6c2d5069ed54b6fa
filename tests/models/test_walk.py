"""The simulated walk against examples by hand and against decoding with fakes."""

from __future__ import annotations

import random

import torch
from eagle3.models.walk import walk


def hits_of(*steps: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in step] for step in steps])


def test_a_walk_by_hand() -> None:
    """Answer: tokens 3..11, so rows 2..; row 10 would draft token 12, which is not there."""
    #               0123456789..
    hits = hits_of("..xx..xxx...", "..x...xx....", "..xx..x.....")
    # Row 2 has all three, row 6 too: tokens 8, 9, 10 are accepted and 11 is the target's own. Nothing is left to draft.
    assert walk(hits, first=2, chain=3) == [3, 3]
    # Two of each: rows 2, 5 (no hit), 6, and 9, where a miss leaves token 11 to the target.
    assert walk(hits, first=2, chain=2) == [2, 0, 2, 0]
    # One of each: rows 2, 4, 5, 6, 8; row 10 has nothing to draft.
    assert walk(hits, first=2, chain=1) == [1, 0, 0, 1, 1]


def test_later_hits_do_not_count_behind_a_miss() -> None:
    assert walk(hits_of(".x......", "xxxx....", "xxxx...."), first=0, chain=3) == [0, 3, 0]


def test_the_round_that_crosses_the_end_is_left_out() -> None:
    """Answer: tokens 1..5. Row 1 can draft tokens 3, 4, 5; if all are right, what follows the answer decides the rest."""
    miss = hits_of("..x...", "......", "......", "......")
    assert walk(miss, first=0, chain=4) == [0, 0, 1]
    right = hits_of(".xxx..", ".xx...", ".x....", "......")
    for chain in (3, 4):
        assert walk(right, first=0, chain=chain) == [0]
    assert walk(right, first=0, chain=2) == [0, 2]


def test_answers_without_anything_to_draft() -> None:
    nothing = torch.zeros(3, 6, dtype=torch.bool)
    assert walk(nothing, first=4, chain=3) == []
    assert walk(nothing, first=3, chain=3) == [0]


def test_walks_count_the_whole_rounds_of_decoding() -> None:
    """Decoding knows what the draft says behind the answer, too; leaving out rounds that were trimmed makes them equal."""
    chance = random.Random(0)
    for _ in range(300):
        prompt, answer, chain = chance.randint(1, 4), chance.randint(1, 12), chance.randint(1, 5)
        length = prompt + answer
        agrees = [[chance.random() < 0.7 for _ in range(length + chain)] for _ in range(chain)]
        rounds, emitted = [], 1
        while emitted < answer:
            row = prompt - 2 + emitted
            accepted = next((step for step in range(chain) if not agrees[step][row]), chain)
            kept = min(accepted + 1, answer - emitted)
            emitted += kept
            if kept == accepted + 1:
                rounds.append(accepted)
        known = [[agrees[step][row] and row + 2 + step < length for row in range(length)] for step in range(chain)]
        assert walk(torch.tensor(known), prompt - 1, chain) == rounds
