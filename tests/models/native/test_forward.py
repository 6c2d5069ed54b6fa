"""Logits and features are transformers' own, whichever way tokens come: at once, packed, after a rollback, as a tree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from eagle3.configs.settings import TargetSettings
from eagle3.models.native.loading import load_native
from eagle3.models.target import TargetOutput, load_target
from torch import Tensor

from .conftest import CHUNK, Pair, assert_close, random_ids

#: Parents of a tree's nodes, the root's being none: branches of unequal depth, siblings apart from each other.
PARENTS = (-1, 0, 0, 1, 1, 2, 3, 3, 6, 6, 9)


def agree(pair: Pair, ours: TargetOutput, ids: Tensor, start: int = 0) -> None:
    """Ours are what transformers says of ``ids`` from ``start`` on."""
    features, logits = pair.states(ids)
    assert_close(ours.features, features[start:])
    assert_close(pair.ours.logits(ours.last_hidden), logits[start:])


def paths(parents: tuple[int, ...]) -> list[list[int]]:
    """From the root to every leaf."""
    found = []
    for node in set(range(len(parents))) - set(parents):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        found.append(path)
    return found


def ancestors(parents: tuple[int, ...]) -> Tensor:
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def test_prefill_over_several_chunks(pair: Pair) -> None:
    ids = random_ids(53)
    agree(pair, pair.ours.prefill(ids, [53]), ids)


def test_packed_documents_see_nothing_of_each_other(pair: Pair) -> None:
    lengths = [1, 13, CHUNK, 31, 17]
    ids = random_ids(sum(lengths))
    output = pair.ours.prefill(ids, lengths)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        agree(pair, TargetOutput(output.last_hidden[part], tuple(x[part] for x in output.captured)), ids[part])
        start += length


def test_cache_grows_by_portions(pair: Pair) -> None:
    """Long ones, short ones, and those that end with a chunk."""
    ids, cache = random_ids(60), pair.ours.new_cache(60)
    for start, end in ((0, 11), (11, 16), (16, 17), (17, 43), (43, 48), (48, 49), (49, 60)):
        agree(pair, pair.ours.forward(ids[start:end], cache), ids[:end], start)
    assert cache.length == 60


def test_rollback_leaves_no_trace(pair: Pair) -> None:
    """Rejected drafts that cross a chunk boundary, and are replaced, wherever they begin."""
    ids, cache = random_ids(48), pair.ours.new_cache(48)
    features, logits = pair.states(ids)
    for start in range(1, 40, 3):
        cache.rollback(0)
        pair.ours.forward(ids[:start], cache)
        pair.ours.forward(random_ids(8, seed=start), cache)
        cache.rollback(start)
        one = pair.ours.forward(ids[start : start + 1], cache)
        several = pair.ours.forward(ids[start + 1 : start + 8], cache)
        assert_close(torch.cat((one.features, several.features)), features[start : start + 8])
        states = torch.cat((one.last_hidden, several.last_hidden))
        assert_close(pair.ours.logits(states), logits[start : start + 8])


@pytest.mark.parametrize("start", [1, CHUNK - 3, CHUNK, 2 * CHUNK - 1, 25])
def test_tree_is_every_path_of_it(pair: Pair, start: int) -> None:
    """... also where its nodes are in two chunks; and the path that is kept is what is continued."""
    ids, nodes, cache = random_ids(start), random_ids(len(PARENTS), seed=start), pair.ours.new_cache(60)
    pair.ours.forward(ids, cache)
    output = pair.ours.forward(nodes, cache, ancestors(PARENTS))
    assert cache.length == start
    logits = pair.ours.logits(output.last_hidden)
    for path in paths(PARENTS):
        features, expected = pair.states(torch.cat((ids, nodes[path])))
        assert_close(output.features[path], features[start:])
        assert_close(logits[path], expected[start:])
    accepted = [0, 1, 3, 6, 9]
    cache.keep(torch.tensor(accepted))
    text = torch.cat((ids, nodes[accepted], random_ids(6, seed=99)))
    assert cache.length == start + len(accepted)
    agree(pair, pair.ours.forward(text[-6:-5], cache), text[:-5], len(text) - 6)
    agree(pair, pair.ours.forward(text[-5:], cache), text, len(text) - 5)


def test_tree_that_is_a_chain_is_the_chain(pairs: Callable[[str], Pair]) -> None:
    target = pairs("maverick").ours
    ids, cache = random_ids(30), target.new_cache(40)
    target.forward(ids[:21], cache)
    chain = target.forward(ids[21:], cache)
    cache.rollback(21)
    tree = target.forward(ids[21:], cache, torch.ones(9, 9, dtype=torch.bool).tril())
    assert_close(tree.last_hidden, chain.last_hidden)
    cache.rollback(21)  # none of it is kept
    again = target.forward(ids[21:], cache)
    assert torch.equal(again.last_hidden, chain.last_hidden)


def test_the_target_that_ships_says_the_same() -> None:
    """Prompts of one token, of less than a chunk, whose end the answer may cross, and of more."""
    settings = TargetSettings()
    ours, theirs = load_native(settings, 320), load_target(settings)
    assert ours.info == theirs.info
    cache = ours.new_cache(320)
    for length in (1, 250, 300):
        ids = torch.randint(7, ours.info.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
        expected = theirs.generate([ids.tolist()], [0.0], 20)[0].ids
        cache.rollback(0)
        output = ours.forward(ids, cache)
        for token in expected:
            logits = ours.logits(output.last_hidden[-1])
            assert int(logits.argmax()) == token
            output = ours.forward(torch.tensor([token]), cache)


def test_a_tree_is_settled_before_anything_else(pairs: Callable[[str], Pair]) -> None:
    target = pairs("llama").ours
    cache = target.new_cache(12)
    target.forward(random_ids(5), cache)
    with pytest.raises(ValueError, match="do not fit"):
        target.forward(random_ids(8), cache)
    with pytest.raises(ValueError, match="roll"):
        cache.rollback(6)
    with pytest.raises(ValueError, match="in a tree of 0"):
        cache.keep(torch.tensor([0]))
    target.forward(random_ids(3), cache, ancestors((-1, 0, 0)))
    with pytest.raises(ValueError, match="none of its paths"):
        target.forward(random_ids(1), cache)
    with pytest.raises(ValueError, match="in a tree of 3"):
        cache.keep(torch.tensor([0, 1, 2, 3]))
    cache.keep(torch.tensor([0, 2]))
    assert cache.length == 7
