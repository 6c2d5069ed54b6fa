"""Rollout and objective against the definitions, written out in plain loops, and the objective's edges.

``Reference`` shares no code with what it checks: turns come from the text of the mask, attention from an explicit list
of visible keys, gradients from autograd. Everything is float64.
"""

from __future__ import annotations

import math
import re
from itertools import accumulate, product

import eagle3.train.objective
import pytest
import torch
from eagle3.models.draft import DraftConfig, Eagle3Draft
from eagle3.models.rollout import RolloutBatch, StepOutput, rollout
from eagle3.train.objective import StepResult, objective, teacher_of, weighted
from torch import Tensor

H, V, F, K, DECAY = 10, 15, 3, 4, 0.7
HEADS, KV_HEADS, WIDTH, EPS, THETA = 4, 2, 6, 1e-3, 50.0
DRAFT_IDS = [1, 2, 5, 6, 9, 12, 14]
MASKS = ["...aaaaaa", "..aaaa..aaa.aaaaa.", "aaaa.", ".....", ".a.aa"]  # a: the assistant wrote this token


def random_draft(ids: list[int] | None, fc_norm: bool = False, norm_output: bool = False) -> Eagle3Draft:
    """A head whose norms are not all ones."""
    torch.manual_seed(0)
    size = len(ids) if ids else V
    config = DraftConfig(H, 16, HEADS, KV_HEADS, WIDTH, V, size, (1, 3, 5), EPS, THETA, 64, fc_norm, norm_output)
    draft = Eagle3Draft(config, torch.tensor(ids) if ids else None).double()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.5)
    return draft


def batch_of(masks: list[str]) -> RolloutBatch:
    """Documents with random content."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([letter == "a" for letter in "".join(masks)])
    return RolloutBatch(
        input_ids=torch.randint(V, mask.shape, generator=generator),
        loss_mask=mask,
        features=torch.randn(len(mask), F, H, dtype=torch.float64, generator=generator),
        last_hidden=torch.randn(len(mask), H, dtype=torch.float64, generator=generator),
        lengths=torch.tensor([len(text) for text in masks]),
    )


def target_ends() -> tuple[Tensor, Tensor]:
    """An embedding and an LM head, ``[V, H]`` each."""
    return torch.randn(2, V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind()


def losses_of(
    draft: Eagle3Draft, batch: RolloutBatch, kind: str = "kl", steps: int = K
) -> tuple[list[StepOutput], list[StepResult]]:
    embedding, lm_head = target_ends()
    outputs = rollout(draft, embedding, batch, steps)
    return outputs, objective(draft, outputs, batch, lm_head, kind)


class Reference:
    """One document at a time, one row at a time, one head at a time; ``w`` are the head's tensors by name."""

    def __init__(self, w: dict[str, Tensor], ids: list[int], fc_norm: bool, norm_output: bool, kind: str) -> None:
        self.w, self.ids, self.fc_norm, self.norm_output, self.kind = w, ids, fc_norm, norm_output, kind
        self.loss: list[list[Tensor]] = [[] for _ in range(K)]
        self.alpha: list[list[Tensor]] = [[] for _ in range(K)]
        self.hits: list[dict[int, bool]] = [{} for _ in range(K)]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.w[f"{name}.weight"] * x / (sum(value**2 for value in x) / len(x) + EPS).sqrt()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.w[f"{name}.weight"] @ x

    def rotated(self, x: Tensor, position: int) -> Tensor:
        out = [x[0]] * WIDTH
        for i in range(WIDTH // 2):
            angle = position / THETA ** (2 * i / WIDTH)
            low, high = x[i], x[i + WIDTH // 2]
            out[i] = low * math.cos(angle) - high * math.sin(angle)
            out[i + WIDTH // 2] = low * math.sin(angle) + high * math.cos(angle)
        return torch.stack(out)

    def attention_input(self, embed: Tensor, h: Tensor) -> Tensor:
        return torch.cat([self.norm(embed, "midlayer.input_layernorm"), self.norm(h, "midlayer.hidden_norm")])

    def key_value(self, x: Tensor, position: int) -> list[tuple[Tensor, Tensor]]:
        """A key and a value per key/value head."""
        key, value = (self.linear(f"midlayer.self_attn.{name}_proj", x) for name in "kv")
        cut = [slice(m * WIDTH, (m + 1) * WIDTH) for m in range(KV_HEADS)]
        return [(self.rotated(key[part], position), value[part]) for part in cut]

    def attention(self, x: Tensor, position: int, visible: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        query = self.linear("midlayer.self_attn.q_proj", x)
        heads = []
        for n in range(HEADS):
            q, m = self.rotated(query[n * WIDTH : (n + 1) * WIDTH], position), n * KV_HEADS // HEADS
            powers = [torch.exp((q @ pairs[m][0]) / math.sqrt(WIDTH)) for pairs in visible]
            heads.append(sum(power * pairs[m][1] for power, pairs in zip(powers, visible, strict=True)) / sum(powers))
        return self.linear("midlayer.self_attn.o_proj", torch.cat(heads))

    def mlp(self, y: Tensor) -> Tensor:
        x = self.norm(y, "midlayer.post_attention_layernorm")
        gate, up = (self.linear(f"midlayer.mlp.{name}_proj", x) for name in ("gate", "up"))
        return self.linear("midlayer.mlp.down_proj", gate / (1 + torch.exp(-gate)) * up)

    def combined(self, features: Tensor) -> Tensor:
        parts = [self.norm(features[i], f"fc_norm.{i}") if self.fc_norm else features[i] for i in range(F)]
        return self.linear("fc", torch.cat(parts))

    def score(self, step: int, where: int, logits: Tensor, teacher_logits: Tensor) -> None:
        q, everywhere = (torch.exp(each) / torch.exp(each).sum() for each in (logits, teacher_logits))
        p = everywhere[self.ids]
        kl = (p * (p.log() - q.log())).sum()
        alpha = torch.minimum(p, q).sum()
        w = math.exp(-3 * alpha.item())
        self.loss[step].append(kl if self.kind == "kl" else w * kl + (1 - w) * (1 - alpha))
        self.alpha[step].append(alpha)
        self.hits[step][where] = self.ids[int(q.argmax())] == int(everywhere.argmax())

    def document(
        self, start: int, text: str, ids: list[int], features: Tensor, last_hidden: Tensor, ends: tuple[Tensor, Tensor]
    ) -> None:
        embedding, lm_head = ends
        combined = [self.combined(features[t]) for t in range(len(text) - 1)]
        inputs = [self.attention_input(embedding[ids[t + 1]], h) for t, h in enumerate(combined)]
        past = [self.key_value(x, t) for t, x in enumerate(inputs)]
        turns = [range(*turn.span()) for turn in re.finditer("a+", text)]
        for t in range(len(text)):
            h, own = combined[t] if t < len(combined) else None, []
            for step in range(K):
                if not any(t + 1 in turn and t + 2 + step in turn for turn in turns):
                    break
                x = self.attention_input(embedding[ids[t + 1 + step]], h)
                if step:
                    own.append(self.key_value(x, t + step))
                y = h + self.attention(x, t + step, past[: t + 1] + own)
                y = y + self.mlp(y)
                normed = self.norm(y, "norm")
                teacher_logits = lm_head @ last_hidden[t + 1 + step]
                self.score(step, start + t, self.linear("lm_head", normed), teacher_logits)
                h = normed if self.norm_output else y


def assert_equal_to(found: Tensor, wanted: Tensor, name: str) -> None:
    scale = wanted.abs().max()
    assert scale > 0, f"{name} says nothing"
    assert (found - wanted).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize(
    ("kind", "ids", "fc_norm", "norm_output"),
    [*product(("kl", "lk"), (None, DRAFT_IDS), (False, True), (False, True))],
)
def test_losses_and_gradients_are_those_of_the_definition(
    kind: str, ids: list[int] | None, fc_norm: bool, norm_output: bool
) -> None:
    draft, batch = random_draft(ids, fc_norm, norm_output), batch_of(MASKS)
    embedding, lm_head = (end.requires_grad_() for end in target_ends())
    batch = batch._replace(features=batch.features.requires_grad_())
    outputs = rollout(draft, embedding, batch, K)
    results = objective(draft, outputs, batch, lm_head, kind)
    weighted(results, DECAY).backward()
    assert lm_head.grad is None

    w = {name: parameter.detach().clone().requires_grad_() for name, parameter in draft.named_parameters()}
    features, ends = batch.features.detach().clone().requires_grad_(), target_ends()
    ends[0].requires_grad_()
    reference = Reference(w, ids or list(range(V)), fc_norm, norm_output, kind)
    lengths = batch.lengths.tolist()
    parts = (each.split(lengths) for each in (batch.input_ids, features, batch.last_hidden))
    for text, start, ids, states, last in zip(MASKS, accumulate([0, *lengths[:-1]]), *parts, strict=True):
        reference.document(start, text, ids.tolist(), states, last, ends)
    sum(DECAY**step * sum(losses) for step, losses in enumerate(reference.loss)).backward()

    for step, result in enumerate(results):
        assert_equal_to(result.loss, sum(reference.loss[step]), f"loss {step}")
        assert_equal_to(result.alpha, sum(reference.alpha[step]), f"alpha {step}")
        rows = outputs[step].rows.tolist()
        assert dict(zip(rows, result.hits.tolist(), strict=True)) == reference.hits[step]
        assert len(rows) == len(reference.hits[step]) > 1
    assert {False, True} == {hit for hits in reference.hits for hit in hits.values()}
    for name, parameter in draft.named_parameters():
        assert_equal_to(parameter.grad, w[name].grad, name)
    assert_equal_to(batch.features.grad, features.grad, "features")
    assert_equal_to(embedding.grad, ends[0].grad, "embedding")


def without(position: int, name: str, batch: RolloutBatch) -> RolloutBatch:
    """The batch with another content at ``position``."""
    changed = getattr(batch, name).clone()
    changed[position] = (changed[position] + 1) % V if name == "input_ids" else -changed[position]
    return batch._replace(**{name: changed})


#: By hand, per step: the positions whose features, tokens and last hidden states the loss of "...aaaaa.." may see.
#: Tokens P = 3 to 7 are the answer. Row 2 drafts token 4 first, from the target at token 3; token 3 is the target's own.
#: The last token drafted is 7, from the target at token 6: in step j by row 5 - j, which sees features up to its own.
SEEN = [
    ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6]),
    ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [4, 5, 6]),
    ([0, 1, 2, 3], [1, 2, 3, 4, 5, 6], [5, 6]),
    ([0, 1, 2], [1, 2, 3, 4, 5, 6], [6]),
]


@pytest.mark.parametrize("kind", ["kl", "lk"])
@pytest.mark.parametrize("text", ["...aaaaa..", "...aaaaa"])
@torch.no_grad()
def test_the_loss_sees_neither_a_token_more_nor_a_token_less(text: str, kind: str) -> None:
    draft, batch = random_draft(DRAFT_IDS), batch_of([text, "." * 12])
    before = [result.loss.item() for result in losses_of(draft, batch, kind)[1]]
    for column, name in enumerate(("features", "input_ids", "last_hidden")):
        seen: list[list[int]] = [[] for _ in range(K)]
        for position in range(12):
            after = losses_of(draft, without(position, name, batch), kind)[1]
            for step, result in enumerate(after):
                if result.loss.item() != before[step]:
                    seen[step].append(position)
        assert seen == [sets[column] for sets in SEEN], name


@torch.no_grad()
def test_the_targets_choice_of_the_first_token_is_no_lesson() -> None:
    """Where answers have one token there is nothing to draft; a second one is drafted from the target at the first."""
    draft = random_draft(DRAFT_IDS)
    assert [len(output.rows) for output in losses_of(draft, batch_of([".a..a"]))[0]] == [0] * K
    outputs, results = losses_of(draft, batch_of([".aa.a"]))
    assert outputs[0].rows.tolist() == [0] and len(outputs[1].rows) == 0
    assert results[0].loss > 0 and results[1].loss == 0


@pytest.mark.parametrize("kind", ["kl", "lk"])
@pytest.mark.parametrize("ids", [None, DRAFT_IDS])
def test_prompts_alone_give_exact_zeros(ids: list[int] | None, kind: str) -> None:
    draft = random_draft(ids, fc_norm=True, norm_output=True)
    _, results = losses_of(draft, batch_of(["....", ".a", "..."]), kind)
    loss = weighted(results, DECAY)
    loss.backward()
    assert loss == 0 and all(result.alpha == 0 and result.hits.shape == (0,) for result in results)
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_step_j_weighs_decay_to_the_j() -> None:
    results = [StepResult(torch.tensor(loss), torch.tensor(0.0), torch.empty(0)) for loss in (1.0, 10.0, 100.0)]
    assert weighted(results, 0.5) == 1 + 5 + 25


@pytest.mark.parametrize("kind", ["kl", "lk"])
@pytest.mark.parametrize("elements", [1, 2 * V + 1])
def test_chunks_do_not_show(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers go by single rows or by eights, losses by single rows or by fours; neither divides the 17 rows."""
    found = []
    for chosen in (2**20, elements):
        monkeypatch.setattr(eagle3.train.objective, "CHUNK_ELEMENTS", chosen)
        draft, batch = random_draft(DRAFT_IDS), batch_of(MASKS)
        outputs, results = losses_of(draft, batch, kind)
        weighted(results, DECAY).backward()
        rows = batch.last_hidden[outputs[0].rows]
        teacher = teacher_of(rows, target_ends()[1], torch.tensor(DRAFT_IDS))
        gradients = [parameter.grad for parameter in draft.parameters()]
        found.append([*gradients, *teacher, *(tensor for result in results for tensor in result)])
    assert len(outputs[0].rows) == 17
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_teacher_probabilities_are_normalised_over_the_whole_vocabulary() -> None:
    states, (_, lm_head) = batch_of(MASKS).last_hidden[:12], target_ends()
    whole, part = teacher_of(states, lm_head, None), teacher_of(states, lm_head, torch.tensor(DRAFT_IDS))
    torch.testing.assert_close(whole.mass, torch.ones(len(states), dtype=torch.float64))
    torch.testing.assert_close(part.p, whole.p[:, DRAFT_IDS], rtol=1e-12, atol=0)
    assert torch.equal(part.top, whole.top) and part.mass.max() < 1


@torch.no_grad()
def test_what_the_draft_cannot_say_is_never_a_hit() -> None:
    """The target is made to say what the draft says, and then the target id that has the draft id's number."""
    draft = random_draft(list(range(V - 7, V)))
    batch, (_, lm_head) = batch_of(MASKS), target_ends()
    (output,), _ = losses_of(draft, batch, steps=1)
    own = draft.logits(output.y).argmax(-1)
    assert len(own.unique()) > 1
    lm_head = lm_head / lm_head.norm(dim=1, keepdim=True)  # so that a row's own product is the largest
    for target, hit in ((own + V - 7, True), (own, False)):
        states = batch.last_hidden.index_put((output.rows + 1,), 50 * lm_head[target])
        (result,) = objective(draft, [output], batch._replace(last_hidden=states), lm_head, "lk")
        assert result.hits.tolist() == [hit] * len(output.rows)
    assert result.alpha < 1e-3 * len(output.rows)


@pytest.mark.parametrize("kind", ["kl", "lk"])
def test_states_of_the_stores_dtype_train_a_float32_head(kind: str) -> None:
    """bfloat16 states count for what they are, under a target's head of either type."""
    exact = batch_of(MASKS)
    stored = exact._replace(features=exact.features.bfloat16(), last_hidden=exact.last_hidden.bfloat16())
    wide = stored._replace(features=stored.features.float(), last_hidden=stored.last_hidden.float())
    embedding, lm_head = (end.bfloat16() for end in target_ends())
    found = []
    for batch, ends in ((wide, lm_head.float()), (stored, lm_head.float()), (stored, lm_head)):
        draft = random_draft(DRAFT_IDS, fc_norm=True).float()
        results = objective(draft, rollout(draft, embedding, batch, K), batch, ends, kind)
        loss = weighted(results, DECAY)
        loss.backward()
        gradients = [parameter.grad for parameter in draft.parameters()]
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
        assert loss.dtype == torch.float32
        found.append((loss, *gradients))
    assert all(torch.equal(*pair) for pair in zip(found[0], found[1], strict=True))
    assert found[2][0].item() == pytest.approx(found[0][0].item(), rel=0.01)


@pytest.mark.parametrize("kind", ["kl", "lk"])
@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_bfloat16_training_computes_the_same(way: str, kind: str) -> None:
    """DeepSpeed casts the head; accelerate leaves it in float32 and casts on the way."""
    embedding, lm_head = (end.bfloat16() for end in target_ends())
    exact = batch_of(MASKS)
    batch = exact._replace(features=exact.features.bfloat16(), last_hidden=exact.last_hidden.bfloat16())
    found = []
    for lower in (False, True):
        draft = random_draft(DRAFT_IDS, fc_norm=True, norm_output=True)
        draft = draft.bfloat16() if lower and way == "cast" else draft.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower and way == "autocast"):
            results = objective(draft, rollout(draft, embedding, batch, K), batch, lm_head, kind)
            loss = weighted(results, DECAY)
        loss.backward()
        assert loss.dtype == torch.float32
        found.append((loss.item(), torch.cat([parameter.grad.flatten().float() for parameter in draft.parameters()])))
    (loss, gradient), (rounded_loss, rounded_gradient) = found
    assert rounded_loss == pytest.approx(loss, rel=0.03)
    assert torch.cosine_similarity(rounded_gradient, gradient, dim=0) > 0.99
