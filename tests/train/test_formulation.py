"""The reference formulation and every rung from it to ours compute the same, pay what they are said to pay, and are measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.entry import finish
from eagle3.configs.errors import Incomplete
from eagle3.data.bench import sides
from eagle3.models.draft import DraftConfig
from eagle3.models.rollout import rollout
from eagle3.train.bench import formulation, ladder, reference
from eagle3.train.bench.head import Preset
from eagle3.train.bench.ladder import CAUSES, Ladder, Rung
from torch.utils._python_dispatch import TorchDispatchMode

V, D, STEPS = 37, 11, 7
MASKS = ["......aaaaaaaaa..aa", ".aaa...aa...aaaaa.a", "aaaaaaaaaaaaaa.....", "..................."]
SHAPE = (len(MASKS), len(MASKS[0]))


def odd_ladder(kind: str, fc_norm: bool = False, norm_output: bool = False) -> Ladder:
    """Nothing is a power of two; several turns, more prompt than not, and a document from which nothing is learnt."""
    config = DraftConfig(20, 34, 6, 3, 6, V, D, (0, 2), 1e-4, 50.0, 64, fc_norm, norm_output)
    found = Ladder(Preset(config, *SHAPE), 0, kind)
    mask = torch.tensor([[letter == "a" for letter in text] for text in MASKS])
    assert 0.4 < mask.float().mean() < 0.5
    found.documents = found.documents._replace(loss_mask=mask)
    return found


@pytest.mark.parametrize("kind", ["kl", "lk"])
@pytest.mark.parametrize("flags", [(False, False), (True, True)])
@pytest.mark.parametrize("rung", Rung)
def test_every_rung_computes_what_ours_does(kind: str, flags: tuple[bool, bool], rung: Rung) -> None:
    found = odd_ladder(kind, *flags)
    wanted = found.losses_and_gradients(Rung.OURS)
    assert len(wanted.losses) == STEPS and all(loss > 1e-2 for loss in wanted.losses)
    assert max(found.errors(rung, wanted)) < 2e-6
    hits = [[sums.hits.item() for sums in found.step_sums(each, found.documents)] for each in (rung, Rung.OURS)]
    assert hits[0] == hits[1] and sum(hits[0]) > 0


def test_supervised_rows_are_those_of_the_rollout() -> None:
    found = odd_ladder("kl")
    outputs = rollout(found.draft, found.embedding, ladder.batch_of(found.documents), STEPS)
    masks_KBT = reference.supervised(found.documents.loss_mask, STEPS)
    for output, mask in zip(outputs, masks_KBT, strict=True):
        ones = ladder.spread(output._replace(y=torch.ones_like(output.y)), found.documents)
        assert ones.any(1).view(SHAPE).equal(mask)
    rows = ladder.rows_of(found.documents, STEPS)
    assert rows.counts == [len(output.y) for output in outputs] and 0 < rows.counts[-1] < rows.counts[0]
    back = ladder.output_of(rows.places, torch.ones(len(rows.places), 1), found.documents)
    assert ladder.spread(back, found.documents).any(1).view(SHAPE).equal(masks_KBT[0])


def later_seen(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda query, keys, values, causal: real(query, keys, values, torch.zeros_like(causal))


def own_forgotten(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda query, keys, values, causal: real(query, keys[:-1] or keys, values[:-1] or values, causal)


def renormalised(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, logsumexp, top, ids: real(logits, logits[..., ids].logsumexp(-1), top, ids)


def unmasked(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mask, steps: torch.ones_like(real(mask, steps))


def token_late(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, by: real(x, by) if x.dtype == torch.bool else real(x, by + 1)


def standing_still(real: Callable[..., Any]) -> Callable[..., Any]:
    """Rotations that are those of step 0 in all steps."""

    class Table:
        def __init__(self, table: torch.Tensor) -> None:
            self.table = table

        def __getitem__(self, at: tuple[slice, slice]) -> torch.Tensor:
            return self.table[:, : at[1].stop - at[1].start]

    return lambda *given: Table(real(*given))


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("attend", later_seen),
        ("attend", own_forgotten),
        ("restricted", renormalised),
        ("supervised", unmasked),
        ("shifted", token_late),
        ("rotation_table", standing_still),
    ],
)
def test_a_reference_that_computes_something_else_is_refused(
    name: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = odd_ladder("kl")
    formulation.check(found)
    monkeypatch.setattr(reference, name, broken(getattr(reference, name)))
    with pytest.raises(Incomplete, match=r"not equal to ours.*'reference formulation'"):
        formulation.check(found)


def test_nan_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reference, "restricted", lambda *given: ladder.restricted(given[0] * torch.nan, *given[1:]))
    assert finish(lambda: formulation.main(["--preset", "tiny"])) == 3
    assert "losses nan, gradients nan" in capsys.readouterr().err


class Shapes(TorchDispatchMode):
    """The shapes of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[tuple[int, ...]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.seen |= {
            tuple(each.shape) for each in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(each)
        }
        return out


def test_a_rung_no_longer_pays_for_what_is_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle3.train.objective.CHUNK_ELEMENTS", 2 * V)
    (count, length), paid = SHAPE, []
    for rung in Rung:
        found = odd_ladder("kl")
        rows = ladder.rows_of(found.documents, STEPS).counts[0]
        with Shapes() as shapes:
            found.losses_and_gradients(rung)
        most = max(shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == 34)  # in the MLP
        taught = [(*SHAPE, V) in shapes.seen, (rows, V) in shapes.seen]
        paid.append((*taught, (count, 6, length, length + STEPS - 1) in shapes.seen, most))
    all_rows = count * length
    assert paid == [
        (True, False, True, all_rows),
        (True, False, True, all_rows),
        (False, True, True, all_rows),
        (False, False, True, all_rows),
        (False, False, True, all_rows),
        (False, False, False, all_rows - 2 * count),  # the last two tokens of a document teach nothing
        (False, False, False, rows),
    ]


def test_it_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "LEAST", 1)
    out = tmp_path / "found" / "it.json"
    formulation.main(["--preset", "tiny", "--objective", "lk", "--rounds", "1", "--out", str(out), "--commit", "abc"])
    said = capsys.readouterr().out
    assert all(said.count(cause) == 2 for cause in CAUSES.values())
    results = json.loads(out.read_bytes())
    assert [(line["benchmark"], line["limit"]) for line in results] == [
        ("training, speed", 2.0),
        ("training, memory", 0.5),
    ] * 2
    for line in results:
        assert line["commit"] == "abc" and "lk, float32" in line["shape"]
        assert line["ratio"] == pytest.approx(line["value"] / line["reference"]["value"], rel=0.01)
    assert [line["shape"].startswith("half of the tokens prompt") for line in results] == [True, True, False, False]
    config, documents, length = ladder.PRESETS["tiny"]
    logits_mib = 4 * documents * length * config.vocab_size / 2**20
    assert all(line["reference"]["value"] > logits_mib and line["value"] > 0 for line in results[1::2])
    assert results[1]["ratio"] < 0.5


def test_without_the_systems_help_memory_is_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*given: object) -> int:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        assert ladder.memory_of(ladder.PRESETS["tiny"], 32, "kl", Rung.OURS) is None
    monkeypatch.setattr(sides, "LEAST", 1)
    monkeypatch.setattr(formulation, "peaks", lambda *given: None)
    formulation.main(["--preset", "tiny", "--rounds", "1", "--out", str(tmp_path / "it.json")])
    said = capsys.readouterr().out
    assert said.count("memory: not measured") == 2 and "MiB" not in said
    assert len(json.loads((tmp_path / "it.json").read_bytes())) == 2


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(lambda: formulation.main(["--rounds", "4"])) == 2
    assert "error: --rounds = 4:" in capsys.readouterr().err
