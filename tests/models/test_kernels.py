"""Triton's kernels against plain torch: in its interpreter where there is no GPU, and not at all where it is missing."""

from __future__ import annotations

import os

import pytest
import torch
from eagle3.models import kernels
from eagle3.models.draft import DraftConfig, Eagle3Draft
from eagle3.models.rollout import RolloutBatch, layout, rollout
from eagle3.train.objective import objective, weighted
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads it when it is first imported, and torch may do that.
    pytest.skip("there is no GPU; TRITON_INTERPRET=1, as make test-slow sets it, does without", allow_module_level=True)

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, V, F, K, HEADS, KV_HEADS, WIDTH = 24, 97, 3, 4, 4, 2, 16
TURNS = ["...aaaaaa", "..aaaa..aaa.aaaaa.", "aaaa.", ".....", ".a.aa"]
LONG = ["..." + "a" * 140 + "...." + "a" * 12, "." * 90 + "a" * 20]  # more rows and keys than a tile has


def random_draft(size: int, **flags: bool) -> Eagle3Draft:
    torch.manual_seed(0)
    config = DraftConfig(H, 40, HEADS, KV_HEADS, WIDTH, V, size, (1, 3, 5), 1e-5, 100.0, 512, **flags)
    draft = Eagle3Draft(config, torch.arange(size) * 2 + 1 if size < V else None)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.25)
    return draft.to(DEVICE)


def batch_of(masks: list[str]) -> RolloutBatch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([letter == "a" for letter in "".join(masks)])
    batch = RolloutBatch(
        input_ids=torch.randint(V, mask.shape, generator=generator),
        loss_mask=mask,
        features=torch.randn(len(mask), F, H, generator=generator),
        last_hidden=torch.randn(len(mask), H, generator=generator),
        lengths=torch.tensor([len(text) for text in masks]),
    )
    return RolloutBatch(*(tensor.to(DEVICE) for tensor in batch))


def close(found: Tensor, wanted: Tensor, name: str) -> None:
    """To float32's accuracy, relative to the whole tensor."""
    assert (found - wanted).norm() <= 2e-5 * wanted.norm(), name


@pytest.mark.parametrize(
    ("masks", "kind", "size", "flags"),
    [
        (TURNS, "lk", 33, {}),
        (TURNS, "kl", 33, {"fc_norm": True, "norm_output": True}),
        (TURNS, "lk", V, {"norm_before_residual": True, "norm_before_fc": True}),
        (LONG, "lk", 33, {}),
        (["....", ".a"], "lk", 33, {"fc_norm": True}),
    ],
)
def test_losses_and_gradients_are_those_of_the_plain_path(
    masks: list[str], kind: str, size: int, flags: dict[str, bool]
) -> None:
    batch, found = batch_of(masks), []
    embedding, lm_head = (0.3 * torch.randn(2, V, H, generator=torch.Generator().manual_seed(2))).to(DEVICE).unbind()
    for fused in (True, False):
        draft = random_draft(size, **flags)
        with kernels.using(fused):
            outputs = rollout(draft, embedding, batch, K)
            results = objective(draft, outputs, batch, lm_head, kind)
        (weighted(results, 0.8) * 3).backward()
        found.append((outputs, results, dict(draft.named_parameters())))
    (outputs, results, ours), (plain_outputs, plain_results, theirs) = found
    for step in range(K):
        assert torch.equal(outputs[step].rows, plain_outputs[step].rows)
        close(outputs[step].y, plain_outputs[step].y, f"y of step {step}")
        close(results[step].loss, plain_results[step].loss, f"loss of step {step}")
        close(results[step].alpha, plain_results[step].alpha, f"alpha of step {step}")
        assert torch.equal(results[step].hits, plain_results[step].hits)
    for name, parameter in theirs.items():
        assert ours[name].grad is not None and parameter.grad is not None
        close(ours[name].grad, parameter.grad, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_is_one_softmax_over_past_and_own_keys(dtype: torch.dtype) -> None:
    """float16 has the kernels' roundings in it, and unlike bfloat16 the interpreter multiplies it."""
    fused = kernels.load()
    torch.manual_seed(0)
    lengths, count, heads, own_keys = torch.tensor([2, 150, 1, 290, 128]), 150, KV_HEADS * 2, 2
    tokens, starts = int(lengths.sum()), lengths.cumsum(0) - lengths
    of_documents = [
        (1, torch.arange(140) + 3),
        (3, torch.arange(18) + 260),
        (0, torch.zeros(1).long()),
        (4, torch.tensor([127])),
    ]
    rows = torch.cat([starts[document] + row for document, row in of_documents])[torch.randperm(160)]
    shapes = [(count, heads, WIDTH), (tokens, 2, KV_HEADS, WIDTH)]
    shapes += [(160 - 5 * i, 2, KV_HEADS, WIDTH) for i in range(own_keys)]
    found = [torch.randn(shape, dtype=dtype).to(DEVICE).requires_grad_() for shape in shapes]
    wanted = [tensor.detach().double().requires_grad_() for tensor in found]

    places = fused.place(rows.to(DEVICE), layout(lengths.to(DEVICE), tokens), lengths.to(DEVICE))
    out = fused.attend(found[0], found[1], found[2:], places)
    d_out = torch.randn_like(out)
    out.backward(d_out)

    exact = []
    for i in range(count):
        first = starts[starts <= rows[i]].max()
        seen = torch.cat([wanted[1][first : rows[i] + 1], *(own[i : i + 1] for own in wanted[2:])])
        seen = seen.repeat_interleave(heads // KV_HEADS, 2)
        scores = torch.einsum("nw,snw->ns", wanted[0][i], seen[:, 0]) * WIDTH**-0.5
        exact.append(torch.einsum("ns,snw->nw", scores.softmax(-1), seen[:, 1]))
    torch.stack(exact).backward(d_out.double())

    limit = 1e-6 if dtype == torch.float32 else 2e-3
    assert (out - torch.stack(exact)).norm() < limit * torch.stack(exact).norm()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() < limit * theirs.grad.norm()


def test_nothing_is_chosen_silently() -> None:
    draft = random_draft(33)
    assert kernels.refusal(draft) is None
    assert "float64" in str(kernels.refusal(draft.double()))
    narrow = DraftConfig(H, 40, 4, 2, 6, V, V, (1, 3, 5), 1e-5, 100.0, 64)
    assert "head_dim = 6" in str(kernels.refusal(Eagle3Draft(narrow)))
