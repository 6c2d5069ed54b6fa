"""Trees of drafted tokens: which are grown, which of their nodes stand, and that answers stay the target's own.

Shapes: N nodes, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from eagle3.configs.settings import TargetSettings
from eagle3.eval.drafters import ChainDrafter, TreeDrafter
from eagle3.eval.sampling import Judgement, Proposal, distribution
from eagle3.eval.speculate import Limits, NativeVerifier, Sampling, Verdict, decode
from eagle3.eval.trees import Tree, TreeShape, judge_tree, judge_tree_sampled
from eagle3.models.draft import Eagle3Draft
from eagle3.models.native.draft import NativeDraft
from eagle3.models.native.loading import load_native
from eagle3.models.native.target import NativeTarget
from eagle3.models.target import Target
from torch import Tensor

#: Row 0 is the root, its children are rows 1, 2 and 4; row 3 and 6 are children of 1, row 5 of 2, row 7 of 6.
TOKENS, PARENTS, DEPTH = [5, 6, 8, 7, 8, 9, 3], [0, 0, 1, 0, 2, 1, 6], 3
V = 12
ANSWER, CAPACITY = 30, 80


def tree_of(tokens: Sequence[int] = TOKENS, parents: Sequence[int] = PARENTS, depth: int = DEPTH) -> Tree:
    return Tree(torch.tensor(tokens), torch.tensor(parents), depth)


def test_ancestors_are_those_up_to_the_root() -> None:
    found = [row.nonzero()[:, 0].tolist() for row in tree_of().ancestors()]
    assert found == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 4], [0, 2, 5], [0, 1, 6], [0, 1, 6, 7]]


@pytest.mark.parametrize(
    ("said", "rows", "tokens"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0], [], [1]),
        ([7, 0, 0, 0, 2, 0, 0, 0], [4], [7, 2]),
        ([5, 9, 0, 0, 0, 0, 4, 0], [1, 6], [5, 9, 4]),
        ([5, 9, 0, 0, 0, 0, 3, 11], [1, 6, 7], [5, 9, 3, 11]),
        ([6, 0, 9, 0, 0, 0, 0, 0], [2], [6, 9]),  # 9 is a child of row 1, and not of row 2
    ],
)
def test_the_greedy_path_by_hand(said: list[int], rows: list[int], tokens: list[int]) -> None:
    logits = torch.zeros(len(said), V)
    logits[range(len(said)), said] = 1.0
    assert judge_tree(logits, tree_of()) == Judgement(rows, tokens)


def reference(logits: Tensor, tree: Tree, temperature: float, uniform: Tensor) -> tuple[Judgement, float]:
    """Node by node in float64, and how near any decision was to going the other way."""
    p_RV = (logits.double() / temperature).softmax(-1)
    parents, tokens, numbers = tree.parents.tolist(), tree.tokens.tolist(), uniform.tolist()
    rows, row, margin = list[int](), 0, 1.0
    left_V = p_RV[0].clone()
    for node, (parent, token) in enumerate(zip(parents, tokens, strict=True), 1):
        if parent != row:
            continue
        margin = min(margin, abs(numbers[node] * float(left_V.sum()) - float(left_V[token])))
        if numbers[node] * left_V.sum() < left_V[token]:
            rows.append(node)
            row, left_V = node, p_RV[node].clone()
        else:
            left_V[token] = 0.0
    passed_V = left_V.cumsum(0)
    at = numbers[0] * float(passed_V[-1])
    margin = min(margin, float((passed_V - at).abs().min()))
    return Judgement(rows, [*(tokens[row - 1] for row in rows), int((passed_V > at).int().argmax())]), margin


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_trees_are_judged_as_by_the_reference_in_float64(temperature: float) -> None:
    """Random trees over what is likely: the same nodes and tokens for the same numbers."""
    size, nodes, rounds, depths = 60, 20, 200, Counter[int]()
    generator = torch.Generator().manual_seed(5)
    for _ in range(rounds):
        logits = 2 * torch.randn(nodes + 1, size, generator=generator)
        parents, tokens, levels = list[int](), list[int](), [0]
        for row in range(nodes):
            parent = int(torch.randint(max(0, row - 6), row + 1, (), generator=generator))
            likely = logits[parent].sort(descending=True).indices.tolist()
            parents.append(parent)
            tokens.append(likely[parents.count(parent) - 1])
            levels.append(levels[parent] + 1)
        tree = tree_of(tokens, parents, max(levels))
        uniform = torch.rand(nodes + 1, generator=generator, dtype=torch.float64)
        expected, margin = reference(logits, tree, temperature, uniform)
        if margin > 1e-6:
            assert judge_tree_sampled(logits, tree, temperature, uniform) == expected
            depths[len(expected.rows)] += 1
    assert sum(depths.values()) > 0.95 * rounds
    assert len(depths) > 3


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_children_that_are_all_that_can_follow_leave_nothing_else(number: float) -> None:
    """Two children have all of the probability; rounding may reject both, and then one of them comes all the same."""
    for share in torch.linspace(0.01, 0.99, 99):
        logits = torch.stack((share, 1 - share, torch.zeros(()), torch.zeros(()))).log().expand(3, -1)
        uniform = torch.full((3,), number, dtype=torch.float64)
        assert judge_tree_sampled(logits, tree_of([0, 1], [0, 0], 1), 1.0, uniform).tokens[0] in (0, 1)


@pytest.mark.parametrize("depth", range(1, 10))
def test_a_path_of_any_length_is_found(depth: int) -> None:
    """A chain, with a second child of the root behind it."""
    tree = tree_of([1] * depth + [2], [*range(depth), 0], depth)
    assert tree.ancestors()[:-1, :-1].equal(torch.ones(depth + 1, depth + 1, dtype=torch.bool).tril())
    logits = torch.full((depth + 2, 4), -20.0)
    logits[:, 1] = 20.0
    uniform = torch.full((depth + 2,), 0.5, dtype=torch.float64)
    for stop in range(depth + 1):
        other = logits.clone()
        other[stop] = torch.tensor([-20.0, -20.0, -20.0, 20.0])
        judged = judge_tree_sampled(other, tree, 1.0, uniform)
        expected = [*range(1, stop + 1)], [1] * stop + [3]
        assert judged == (expected if stop < depth else ([*range(1, depth + 1)], [1] * depth + [3]))


DRAWS = 100_000


@pytest.mark.slow
def test_what_is_sampled_through_a_tree_is_the_targets_own() -> None:
    """The first three tokens that come out, over many rounds, against the target's distribution: chi-square.

    The target's logits depend on the path alone, so that what stands is continued by plain sampling where it is short.
    """
    vocabulary, tree = 4, tree_of([0, 1, 2, 0, 3, 1], [0, 0, 1, 1, 2, 4], 3)
    generator = torch.Generator().manual_seed(0)
    temperature, table = 0.8, torch.randn(1 + 4 + 16, vocabulary, generator=generator)

    def logits_behind(said: Sequence[int]) -> Tensor:
        return table[[0, 1, 5][len(said)] + sum(token * 4**place for place, token in enumerate(reversed(said)))]

    paths = {0: (), 1: (0,), 2: (1,), 3: (0, 2), 4: (0, 0), 5: (1, 3), 6: (0, 0, 1)}
    logits = torch.stack([logits_behind(paths[row]) if len(paths[row]) < 3 else table[0] for row in range(7)])
    uniform = torch.rand(DRAWS, 7 + 3, generator=generator, dtype=torch.float64)
    known = {
        said: distribution(logits_behind(said), temperature)
        for length in range(3)
        for said in itertools.product(range(4), repeat=length)
    }
    counted = Counter[tuple[int, ...]]()
    for chances in uniform:
        judged = judge_tree_sampled(logits, tree, temperature, chances[:7])
        assert tuple(judged.tokens[:-1]) == (paths[judged.rows[-1]] if judged.rows else ())
        said = tuple(judged.tokens)[:3]
        while len(said) < 3:
            passed = known[said].cumsum(0) > chances[7 + len(said)]
            said = (*said, int(passed.int().argmax()))
        counted[said] += 1
    expected = {
        said: DRAWS * float(known[said[:0]][said[0]] * known[said[:1]][said[1]] * known[said[:2]][said[2]])
        for said in itertools.product(range(4), repeat=3)
    }
    statistic = sum((counted[said] - number) ** 2 / number for said, number in expected.items())
    assert min(expected.values()) > 5
    assert statistic < 103.4  # the 99.9% quantile of chi-square with 63 degrees of freedom


@pytest.fixture(scope="module")
def native(tiny_folder: Path) -> NativeTarget:
    return load_native(TargetSettings(path=str(tiny_folder)), CAPACITY)


@pytest.fixture(scope="module")
def verifier(native: NativeTarget) -> NativeVerifier:
    return NativeVerifier(native, CAPACITY)


def head_of(draft: Eagle3Draft, embedding: Tensor, shape: TreeShape) -> NativeDraft:
    return NativeDraft(draft, embedding, CAPACITY, shape.depth * shape.top_k)


def brute_force(draft: Eagle3Draft, drafter: TreeDrafter, verdict: Verdict, embedding: Tensor, shape: TreeShape) -> set:
    """The nodes of the tree as paths of target ids, every path drafted by itself as a chain."""
    tokens = torch.tensor(verdict.tokens)
    rows = draft.combine(verdict.features)

    def children(path: tuple[int, ...]) -> list[tuple[float, int]]:
        h_TH, embedded = rows, embedding[tokens]
        for token in path:
            y = run(embedded, h_TH)
            h_TH = torch.cat((h_TH, draft.feedback(y[-1:])))
            embedded = torch.cat((embedded, embedding[token][None]))
        best = draft.logits(run(embedded, h_TH)[-1]).log_softmax(-1).topk(shape.top_k)
        return [(score, int(draft.draft_ids[token])) for score, token in zip(*map(Tensor.tolist, best), strict=True)]

    def run(embedded: Tensor, h_TH: Tensor) -> Tensor:
        positions = torch.arange(len(embedded))[None]
        return draft.decode(embedded[None], h_TH[None], positions, draft.new_cache(1, len(embedded)))[0]

    level, candidates = {(): 0.0}, dict[tuple[int, ...], float]()
    for _ in range(shape.depth):
        grown = {(*path, token): before + score for path, before in level.items() for score, token in children(path)}
        candidates |= grown
        level = dict(sorted(grown.items(), key=lambda item: -item[1])[: shape.top_k])
    return set(sorted(candidates, key=lambda path: -candidates[path])[: shape.total])


@pytest.mark.parametrize("shape", [TreeShape(9, 3, 3), TreeShape(60, 4, 5), TreeShape(4, 4, 2), TreeShape(2, 1, 2)])
@pytest.mark.parametrize("changes", [{}, {"norm_output": True, "fc_norm": True}])
@torch.inference_mode()
def test_the_likeliest_paths_are_grown(
    native: NativeTarget,
    verifier: NativeVerifier,
    new_draft: Callable[..., Eagle3Draft],
    shape: TreeShape,
    changes: dict,
) -> None:
    draft, embedding = new_draft(**changes), native.head.embedding
    drafter = TreeDrafter(head_of(draft, embedding, shape), shape)
    drafter.start(Sampling())
    verdict = verifier.start([9, 8, 7, 6, 5, 4, 3], Sampling())
    drafter.update(verdict)
    for _ in range(2):  # a proposal leaves no trace in the cache
        tree = drafter.propose()
        told = tree.ancestors()[1:, 1:]
        paths = {tuple(tree.tokens[row].tolist()) for row in told}
        assert paths == brute_force(draft, drafter, verdict, embedding, shape)
        assert len(tree.tokens) == len(paths) <= shape.total


@pytest.mark.parametrize("shape", [None, TreeShape(20, 4, 4), TreeShape(60, 7, 10)])
@torch.inference_mode()
def test_answers_are_the_targets_own(
    native: NativeTarget, tiny_target: Target, new_draft: Callable[..., Eagle3Draft], shape: TreeShape | None
) -> None:
    """Chains and trees, across the borders of chunks; a random head is helped by a large vocabulary's shares being even."""
    draft, embedding = new_draft(), native.head.embedding
    capacity = CAPACITY + 64
    verifier = NativeVerifier(native, capacity)
    if shape is None:
        drafter = ChainDrafter(NativeDraft(draft, embedding, capacity, 3), 3)
    else:
        drafter = TreeDrafter(head_of(draft, embedding, shape), shape)
    accepted = 0
    for length in (2, 15, 16, 21):
        prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        text = list(prompt)
        for _ in range(ANSWER):
            text.append(int(tiny_target.logits(tiny_target.forward(torch.tensor([text])).last_hidden[0, -1]).argmax()))
        limits = Limits(ANSWER, ())
        plain = decode(prompt, verifier, None, limits, Sampling())
        fast = decode(prompt, verifier, drafter, limits, Sampling())
        assert plain.ids == fast.ids == text[length:]
        accepted += sum(entry.accepted for entry in fast.rounds)
    assert shape is None or accepted > 0


@pytest.mark.parametrize("drafting", ["greedy", "sampled"])
@torch.inference_mode()
def test_drafting_asks_its_device_for_nothing(new_draft: Callable[..., Eagle3Draft], drafting: str) -> None:
    """The device "meta" has shapes and no values: who asks it for one gets an error."""
    draft, device = new_draft(), torch.device("meta")
    size, width = draft.config.vocab_size, draft.config.hidden_size
    head = NativeDraft(draft, torch.empty(size, width, device=device), CAPACITY, 20)
    for drafter in (ChainDrafter(head, 4), TreeDrafter(head, TreeShape(9, 4, 5))):
        drafter.start(Sampling(0.7, drafting))
        for count in (5, 1, 3):
            features = torch.empty(count, len(draft.config.target_layers), width, device=device)
            drafter.update(Verdict([7] * count, features))
            proposal = drafter.propose()
        assert proposal.tokens.shape == ((4,) if isinstance(proposal, Proposal) else (9,))
