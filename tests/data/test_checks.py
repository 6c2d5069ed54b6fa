"""Every way in which recorded states can be wrong is told, wherever in them it is."""

from __future__ import annotations

import pytest
import torch
from eagle3.configs.errors import Incomplete
from eagle3.data import checks
from eagle3.data.answers import Answer
from eagle3.data.checks import check_agreement, check_states
from eagle3.data.recorders import States
from eagle3.models.target import Target

LENGTH, TURNS = 20, [[3, 9], [12, 20]]


def conversation(ids: list[int], temperature: float = 0.0, name: str = "one") -> Answer:
    return Answer(name, "words", "train", temperature, ids, TURNS, "stop", True)


@pytest.fixture
def states(tiny_target: Target) -> States:
    output = tiny_target.forward(torch.arange(10, 10 + LENGTH)[None])
    return States(output.features[0].clone(), output.last_hidden[0].clone())


@pytest.fixture
def greedy(tiny_target: Target, states: States) -> Answer:
    """What the states predict, as an answer."""
    said = tiny_target.logits(states.last_hidden).argmax(-1).tolist()
    return conversation([0, *said[:-1]])


def test_the_targets_own_states_pass(states: States, greedy: Answer, tiny_target: Target) -> None:
    assert check_states(greedy, states, tiny_target) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("name", "place"), [("features", (0, 0, 31)), ("features", (19, 2, 0)), ("last_hidden", (7, 5))]
)
def test_one_state_that_is_not_finite_is_told(
    states: States, tiny_target: Target, dtype: torch.dtype, value: float, name: str, place: tuple[int, ...]
) -> None:
    wrong = States(*(tensor.to(dtype) for tensor in states))
    getattr(wrong, name)[place] = value
    with pytest.raises(Incomplete, match=f"{name} of conversation one are not finite"):
        check_states(conversation([1] * LENGTH, 0.7), wrong, tiny_target)


@pytest.mark.parametrize(("name", "place"), [("features", (0, 1)), ("features", (19, 2)), ("last_hidden", (7,))])
def test_one_vector_of_zeros_is_told(states: States, tiny_target: Target, name: str, place: tuple[int, ...]) -> None:
    getattr(states, name)[place] = 0.0
    getattr(states, name)[place][..., 3] = -0.0
    with pytest.raises(Incomplete, match=f"{name} of conversation one are zero"):
        check_states(conversation([1] * LENGTH, 0.7), states, tiny_target)
    getattr(states, name)[place][..., 3] = -1e-30  # small is not zero
    check_states(conversation([1] * LENGTH, 0.7), states, tiny_target)


@pytest.mark.parametrize("name", States._fields)
def test_another_shape_is_told(states: States, tiny_target: Target, name: str) -> None:
    for wrong in (getattr(states, name)[1:], getattr(states, name)[..., 1:]):
        with pytest.raises(Incomplete, match=rf"{name} of conversation one are \(.*\) and not \(.*; the capture"):
            check_states(conversation([1] * LENGTH), states._replace(**{name: wrong}), tiny_target)


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_greedy_tokens_that_are_not_predicted_are_counted_whatever_is_computed_at_once(
    states: States, greedy: Answer, tiny_target: Target, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    shapes = list[int]()
    real = tiny_target.logits
    monkeypatch.setattr(checks, "LOGITS", rows * tiny_target.info.vocab_size + 1)
    monkeypatch.setattr(tiny_target, "logits", lambda hidden: shapes.append(len(hidden)) or real(hidden))
    said = [at for start, end in TURNS for at in range(start, end)]
    for wrong in ([], [3], [8, 12], [19], said):
        ids = [
            (token + 1) % tiny_target.info.vocab_size if at in wrong else token for at, token in enumerate(greedy.ids)
        ]
        assert check_states(conversation(ids), states, tiny_target) == len(wrong)
        assert check_states(conversation(ids, 0.7), states, tiny_target) == 0  # what was drawn need not be likely
    ids = [token if at in said else 0 for at, token in enumerate(greedy.ids)]
    assert check_states(conversation(ids), states, tiny_target) == 0  # what was not said is not looked at
    assert max(shapes) == min(rows, 8) and sum(shapes) == 6 * len(said)


def test_a_token_as_likely_as_the_top_one_agrees(states: States, greedy: Answer, tiny_target: Target) -> None:
    logits = tiny_target.logits(states.last_hidden[2])
    second = int(logits.topk(2).indices[1])
    ids = [*greedy.ids[:3], second, *greedy.ids[4:]]
    gap = float(logits.max() - logits[second])
    assert check_states(conversation(ids), states, tiny_target) == 1
    states.last_hidden[2] *= checks.TIE["float32"] / gap / 2
    assert check_states(conversation(ids), states, tiny_target) == 0


def test_more_than_rounding_is_refused_and_the_worst_is_named() -> None:
    answers = [conversation([1] * LENGTH, heat, name) for heat, name in ((0.0, "a"), (0.0, "b"), (1.0, "c"))]
    check_agreement(4, answers, [1, 1, 0])  # 2, and a fiftieth of 28
    with pytest.raises(Incomplete, match="shard 4: .* for 3 of 28 greedy ones, most in conversation b; the capture"):
        check_agreement(4, answers, [1, 2, 0])
