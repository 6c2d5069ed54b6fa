"""Muon's steps against torch's Muon and AdamW, and what it does with inputs that are not of one scale."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from eagle3.configs.settings import Settings
from eagle3.models.costs import stacks
from eagle3.models.draft import DraftConfig, Eagle3Draft
from eagle3.train.muon import Muon, orthogonalise
from eagle3.train.optimizer import kinds, make_optimizer

CONFIG = DraftConfig(12, 20, 2, 1, 6, 40, 30, (1, 3), 1e-5, 1e4, 64, fc_norm=True)


def test_muon_is_torchs_muon_up_to_its_rounding() -> None:
    """Tall, wide and stacked matrices against torch's own, which rounds to bfloat16 on the way."""
    random = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 16)]
    theirs = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs[:2]]
    ours.append(torch.nn.Parameter(torch.stack([theirs[2].detach()] * 3)))
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    optimiser = Muon(ours, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for their, our in zip(theirs, ours, strict=True):
            their.grad = torch.randn(their.shape, generator=random)
            our.grad = their.grad.expand_as(our).clone()
        before = [p.detach().clone() for p in theirs]
        reference.step()
        optimiser.step()
        for their, our, was in zip(theirs, ours, before, strict=True):
            assert (our - their).norm() < 0.05 * (their - was).norm() * (our.numel() / their.numel()) ** 0.5


def test_matrices_are_orthogonalised_alone_or_in_a_stack() -> None:
    """The iteration leaves singular values between about 0.7 and 1.2, and the singular vectors."""
    stack = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(stack)
    for matrix, ours in zip(stack, found, strict=True):
        torch.testing.assert_close(ours, orthogonalise(matrix[None])[0], rtol=1e-4, atol=1e-5)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        turned = left.T @ ours @ right.T
        assert turned.diagonal().min() > 0.6 and turned.diagonal().max() < 1.3
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-3
    torch.testing.assert_close(orthogonalise(stack.mT), found.mT)


def test_nothing_moves_where_there_is_no_gradient() -> None:
    matrix = torch.nn.Parameter(torch.ones(3, 4))
    matrix.grad = torch.zeros(3, 4)
    Muon([matrix], lr=0.1).step()
    assert matrix.equal(torch.ones(3, 4))


def test_a_group_of_adamw_is_torchs_adamw() -> None:
    random = torch.Generator().manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((7,), (3, 4))]
    ours = copy.deepcopy(theirs)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.8, 0.9)}
    reference = torch.optim.AdamW(theirs, **options)
    optimizer = Muon([{"params": ours, "kind": "adamw"}], **options)
    for _ in range(5):
        for their, our in zip(theirs, ours, strict=True):
            their.grad = torch.randn(their.shape, generator=random)
            our.grad = their.grad.clone()
        reference.step()
        optimizer.step()
        for their, our in zip(theirs, ours, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)


def test_the_scale_of_inputs_does_not_matter_where_it_is_known() -> None:
    """A product with inputs of some scale moves as one with inputs of scale 1 does."""
    random = torch.Generator().manual_seed(0)
    scale, x = torch.tensor([0.1, 1.0, 30.0, 200.0]), torch.randn(5, 4, generator=random)
    plain = torch.nn.Parameter(torch.randn(3, 4, generator=random))
    scaled = torch.nn.Parameter(plain.detach() / scale)
    optimizers = [Muon([plain], lr=0.1), Muon([{"params": [scaled], "input_scale": scale}], lr=0.1)]
    for _ in range(3):
        for weight, given, optimizer in zip((plain, scaled), (x, x * scale), optimizers, strict=True):
            optimizer.zero_grad()
            (given @ weight.T).pow(3).sum().backward()
            optimizer.step()
        torch.testing.assert_close(scaled * scale, plain.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_of_a_head_is_in_one_group(name: str, short: Settings) -> None:
    draft = Eagle3Draft(CONFIG, torch.arange(30))
    chosen = replace(short.train, optimizer=name, weight_decay=0.25, betas=(0.5, 0.75))
    optimizer = make_optimizer(draft, torch.tensor([2.0, 6.0]), chosen)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(draft.parameters()))
    for parameter, kind in zip(draft.parameters(), kinds(draft, name).values(), strict=True):
        group = found[id(parameter)]
        assert (
            group["kind"]
            == kind
            == (
                "muon" if name == "muon" and parameter.dim() == 2 and parameter is not draft.lm_head.weight else "adamw"
            )
        )
        assert (group["betas"], group["weight_decay"]) == ((0.5, 0.75), 0.25)
    by_muon = [p for p in draft.parameters() if found[id(p)]["kind"] == "muon"]
    if by_muon:  # as eagle3 plan has it
        assert sum(p.numel() for p in by_muon) == sum(math.prod(stack) for stack in stacks(CONFIG))
    fc = found[id(draft.fc.weight)]
    if name == "muon":
        assert fc["scale"] == 1.0 and fc["input_scale"].tolist() == [2.0] * 12 + [6.0] * 12
    else:
        assert fc["scale"] == 0.25


def test_a_state_from_before_an_option_gets_its_default() -> None:
    optimizer = Muon([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    saved = optimizer.state_dict()
    for option in ("kind", "input_scale"):
        del saved["param_groups"][0][option]
    optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["kind"], optimizer.param_groups[0]["input_scale"]) == ("muon", None)
