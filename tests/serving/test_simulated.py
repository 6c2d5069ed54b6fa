"""The acceptance length that training chooses heads by is the one that decoding has, over the demo's own answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eagle3.configs.loader import load
from eagle3.data.store import Store
from eagle3.eval.metrics import rounds_of
from eagle3.eval.traces import read_traces
from eagle3.models.checkpoint import load_draft
from eagle3.train.batches import collate
from eagle3.train.module import TrainingTimeTest
from eagle3.train.validate import Tally

from .conftest import DEMO


@pytest.mark.serving
@torch.no_grad()
def test_the_simulated_acceptance_length_is_the_decoded_one() -> None:
    """Rounds that cross an answer's end are left out of both. The head was trained on fewer steps than it drafts."""
    settings, store = load(str(DEMO / "config.yaml")), Store(DEMO / "store")
    chain, head = settings.eval.fixed_chain, store.head()
    assert settings.eval.max_new_tokens == settings.regenerate.max_new_tokens
    traces = [
        trace
        for trace in read_traces(DEMO / "eval" / "traces.jsonl")
        if trace.temperature == 0.0 and trace.drafting == f"chain {chain}"
    ]
    rounds = [entry for trace in traces for entry in rounds_of(trace, "whole")]
    decoded = 1 + sum(entry.accepted for entry in rounds) / len(rounds)

    rolled = replace(settings.train, ttt_steps=chain)
    module = TrainingTimeTest(load_draft(DEMO / "draft"), head.embedding.float(), head.lm_head.float(), rolled).eval()
    tally, answered = Tally(chain, chain), {trace.prompt_id for trace in traces}
    for index in store.indices("test"):
        if (sample := store[index]).id in answered:
            batch = collate([sample]).on(head.embedding.device)
            tally.add(batch, module(batch))
    simulated = tally.result()
    assert len(traces) == settings.eval.prompts
    assert simulated.acceptance_length == pytest.approx(decoded, rel=0.01)
    assert simulated.rounds == pytest.approx(len(rounds), rel=0.02)
