"""Two processes that hold a target together answer as one does, and as rank 0 says where they would not agree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from eagle3.configs.settings import TargetSettings
from eagle3.eval.agreement import agreed, decided
from eagle3.eval.drafters import ChainDrafter, HeadDrafter, TreeDrafter
from eagle3.eval.sampling import Drawn, Judgement, Proposal
from eagle3.eval.speculate import Decoded, Limits, NativeVerifier, Sampling, decode
from eagle3.eval.trees import Tree, TreeShape
from eagle3.models.draft import Eagle3Draft
from eagle3.models.native.draft import NativeDraft
from eagle3.models.native.loading import load_native
from eagle3.models.native.parallel import Group
from eagle3.models.native.target import NativeTarget
from torch import Tensor, distributed
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

CPU = torch.device("cpu")
ANSWER, CAPACITY, CHAIN, SHAPE = 12, 96, 3, TreeShape(40, 5, 8)
LENGTHS = (2, 13)  # the second goes on in another chunk
DRAFTED = [(way, temperature) for way in ("chain", "tree") for temperature in (0.0, 1.0)]
WAYS = [("plain", 0.0), ("plain", 1.0), *DRAFTED]
FOLDERS, VOCABULARY, LAYERS = ("llama4", "llama"), 264, (0, 1, 2)

Drafts = Callable[..., Eagle3Draft]


class Said(NamedTuple):
    """What stays the same whoever computes it: an answer, who proposed its tokens, and how many were accepted."""

    ids: list[int]
    authors: list[str]
    accepted: list[tuple[int, int]]


def said(answer: Decoded) -> Said:
    return Said(answer.ids, answer.authors, [(entry.drafted, entry.accepted) for entry in answer.rounds])


def answers(
    target: NativeTarget, draft: Eagle3Draft, way: str, temperature: float, group: Group | None = None
) -> list[Said]:
    """With a head that is dealt to ``group``, or that each process has whole."""
    verifier = NativeVerifier(target, CAPACITY)
    head = NativeDraft(draft, target.head.embedding, CAPACITY, SHAPE.depth * SHAPE.top_k, group)
    drafters: dict[str, HeadDrafter] = {"chain": ChainDrafter(head, CHAIN), "tree": TreeDrafter(head, SHAPE)}
    found = []
    for length in LENGTHS:
        prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        sampling = Sampling(temperature, seed=length)
        found.append(said(decode(prompt, verifier, drafters.get(way), Limits(ANSWER, ()), sampling)))
    return found


def _apart(target: NativeTarget, rank: int) -> None:
    """Rank 1 sees other logits and other features than it should, as if its floats were far off."""
    if rank == 0:
        return
    logits, forward = target.logits, target.forward

    def other_logits(last_hidden: Tensor) -> Tensor:
        return logits(last_hidden).flip(-1)

    def other_features(*arguments: Any) -> Any:
        output = forward(*arguments)
        return output._replace(captured=tuple(-states for states in output.captured))

    target.logits, target.forward = other_logits, other_features  # type: ignore[method-assign]


def _broadcasts(target: NativeTarget, draft: Eagle3Draft) -> tuple[int, int]:
    """How many there are in an answer, and what of it should be: one for the first token, two a round."""
    counted, broadcast = Counter[str](), distributed.broadcast

    def counting(x: Tensor, **options: Any) -> Any:
        counted["broadcast"] += 1
        counted["elements"] = max(counted["elements"], x.numel())
        return broadcast(x, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "broadcast", counting)
        found = answers(target, draft, "tree", 0.0)
    assert counted["elements"] <= 2 * SHAPE.total + 2
    return counted["broadcast"], sum(1 + 2 * len(answer.accepted) for answer in found)


def _member(group: Group, folders: dict[str, Path], head: Drafts) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, folder in folders.items():
        target = load_native(TargetSettings(path=str(folder), layers=LAYERS), CAPACITY, group=group)
        found |= {(name, *way): answers(target, head(), *way, group) for way in WAYS}
        found[name, "broadcasts"] = _broadcasts(target, head())
        _apart(target, group.rank)
        found |= {(name, *way, "apart"): answers(target, head(group.rank), *way) for way in DRAFTED}
    row = torch.arange(3) + 10 * group.rank
    chain = Proposal(row, Drawn(row, torch.full((4, 4), float(group.rank)), torch.arange(4)))
    tree = Tree(row, row - 1, 2)
    found["agreed"] = agreed(group, chain), agreed(group, tree), chain, tree
    found["decided"] = [
        decided(group, 3, lambda rows=rows: Judgement(rows, [*rows, 7 + group.rank]))
        for rows in ([], [1, 3], [1, 2, 3])
    ]
    return found


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture of experts whose ends are one matrix, and a dense model whose are two; an odd vocabulary is not dealt."""
    root, tokenizer = tmp_path_factory.mktemp("agreement"), AutoTokenizer.from_pretrained(tiny_folder)
    tiny = json.loads((tiny_folder / "config.json").read_text())
    tiny = {key: value for key, value in tiny.items() if key not in ("layer_types", "no_rope_layers", "moe_layers")}
    mixture = Llama4TextConfig(**tiny | {"vocab_size": VOCABULARY, "num_hidden_layers": 4})
    dense = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    for name, kind, config in zip(FOLDERS, (Llama4ForCausalLM, LlamaForCausalLM), (mixture, dense), strict=True):
        torch.manual_seed(0)
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in FOLDERS}


@pytest.fixture(scope="module")
def head(new_draft: Drafts) -> Drafts:
    """``head(seed)`` is a random head that fits them."""
    return lambda seed=0: new_draft(seed, vocab_size=VOCABULARY, target_layers=LAYERS)


@pytest.fixture(scope="module")
def computed(folders: dict[str, Path], head: Drafts, together: Callable[..., list[Any]]) -> list[dict[Any, Any]]:
    """What each of two processes found, by rank."""
    return together(_member, folders, head)


@pytest.mark.parametrize("name", FOLDERS)
def test_together_as_alone(name: str, folders: dict[str, Path], head: Drafts, computed: list[dict[Any, Any]]) -> None:
    """Chains and trees, greedily and sampled; by the same rounds."""
    alone, accepted = load_native(TargetSettings(path=str(folders[name]), layers=LAYERS), CAPACITY, CPU), 0
    for way in WAYS:
        expected = answers(alone, head(), *way)
        assert [member[name, *way] for member in computed] == [expected, expected]
        accepted += sum(stood for answer in expected for _, stood in answer.accepted)
    assert accepted > 0


@pytest.mark.parametrize("way", DRAFTED)
@pytest.mark.parametrize("name", FOLDERS)
def test_what_rank_0_says_is_said(name: str, way: tuple[str, float], computed: list[dict[Any, Any]]) -> None:
    """Rank 1 has another head, other features and other logits, and says the same all the same."""
    first, second = (member[name, *way, "apart"] for member in computed)
    assert first == second == computed[0][name, *way]


@pytest.mark.parametrize("name", FOLDERS)
def test_two_small_broadcasts_a_round(name: str, computed: list[dict[Any, Any]]) -> None:
    for member in computed:
        found, expected = member[name, "broadcasts"]
        assert found == expected


def test_of_a_proposal_all_that_is_verified_is_rank_0s(computed: list[dict[Any, Any]]) -> None:
    for rank, member in enumerate(computed):
        chain, tree, own_chain, own_tree = member["agreed"]
        assert chain.tokens.tolist() == tree.tokens.tolist() == [0, 1, 2]
        assert (tree.parents.tolist(), tree.depth) == ([-1, 0, 1], 2)
        assert chain.drawn.probabilities.unique().tolist() == [rank]
        # ... and the drafter's own tensors are left alone.
        assert own_chain.tokens.tolist() == own_tree.tokens.tolist() == [10 * rank, 10 * rank + 1, 10 * rank + 2]
        assert member["decided"] == [([], [7]), ([1, 3], [1, 3, 7]), ([1, 2, 3], [1, 2, 3, 7])]
