"""A real vLLM on the CPU records what transformers computes: in float32 to rounding, in bfloat16 up to router flips.

`make test-serving` makes its environment.
"""

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.loader import load
from eagle3.configs.settings import Settings, TargetSettings
from eagle3.data.chat import prompt_ids
from eagle3.data.conversations import Conversation
from eagle3.data.recorders import States
from eagle3.data.vllm_launch import launch_command
from eagle3.data.vllm_recorder import VllmRecorder
from eagle3.models.target import Target, TargetOutput, load_target, load_text
from eagle3.models.target_files import layers_of, load_ends
from eagle3.models.target_info import find_decoder
from torch import Tensor

from .conftest import TARGET, Engine, Start

pytestmark = pytest.mark.serving

CONVERSATIONS = 32
MOST = 620  # tokens of a prompt
PATIENCE_S = 150.0  # for an engine that is starting
RELATIVE = 1e-4  # of a token's state in one layer: |theirs - ours| / |ours|, both norms over the width


class Server(NamedTuple):
    """An engine that a recipe's own command has started, with what a CPU needs, and the recipe."""

    engine: Engine
    settings: Settings


@pytest.fixture(scope="module")
def servers(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Server]:
    """One in float32, and one in bfloat16 that captures every layer; they start at the same time."""
    chosen = [f"record.patience_s={PATIENCE_S}", "record.in_flight=4", "prepare.max_prompt_tokens=640", "run.name=none"]
    tiny = load("tiny", chosen)
    targets = {"float32": TargetSettings(), "bfloat16": TargetSettings(dtype="bfloat16", layers=tuple(range(16)))}
    connector = {"kv_connector": "CpuHiddenStatesConnector", "kv_connector_module_path": "cpu_connector"}
    started = {}
    for name, target in targets.items():
        record = replace(tiny.record, states_folder=str(tmp_path_factory.mktemp(name) / "states"))
        settings = replace(tiny, target=target, record=record)
        _, _, model, *options, handover = launch_command(settings, *layers_of(target), load_text(target))
        assert Path(model).samefile(TARGET)
        engine = start(name, [*options, json.dumps(json.loads(handover) | connector)])
        started[name] = Server(engine, replace(settings, record=replace(record, endpoints=(engine.url,))))
    return started


@pytest.fixture(scope="module")
def conversations(target: Target) -> list[tuple[np.ndarray, int]]:
    """Token ids of questions with their greedy answers, and where the answer begins; the longest cross chunks of 256."""
    functions = [entry for module in (textwrap, shutil) for _, entry in sorted(inspect.getmembers(module, callable))]
    texts = [text for function in functions if (text := inspect.getdoc(function))][:CONVERSATIONS]
    prompts = []
    for text in texts:
        asked = [{"role": "user", "content": f"Write a function for this:\n{text}"}]
        prompts.append(prompt_ids(target.tokenizer, Conversation("", "", "test", asked))[-MOST:])
    assert len(prompts) == CONVERSATIONS
    assert min(map(len, prompts)) < 128 < 400 < max(map(len, prompts))
    answers = target.generate(prompts, [0.0] * len(prompts), 32)
    return [
        (np.array([*prompt, *answer.ids], dtype=np.int32), len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def forward(target: Target, ids: np.ndarray) -> TargetOutput:
    return target.forward(torch.from_numpy(ids).long()[None])


def errors(states: States, output: TargetOutput) -> Tensor:
    """``[T, F + 1]``: how far each token's states are from transformers', relative to these."""
    theirs = torch.cat([states.features, states.last_hidden[:, None]], 1).float()
    ours = torch.cat([output.features[0], output.last_hidden[0, :, None]], 1).float()
    return (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)


def test_float32_is_transformers_although_the_server_is_killed_and_restarted(
    servers: dict[str, Server],
    target: Target,
    conversations: list[tuple[np.ndarray, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, settings = servers["float32"]
    recorder = VllmRecorder(settings, load_ends(settings.target))
    recording = recorder.record([[ids for ids, _ in conversations]])
    recorded = [next(recording) for _ in range(6)]
    capsys.readouterr()  # it waited while the server started, and said so
    engine.kill()
    engine.start()
    recorded += recording
    assert f"record: {engine.url}: it " in capsys.readouterr().err
    assert list(Path(settings.record.states_folder).iterdir()) == []
    worst = 0.0
    for states, (ids, answer) in zip(recorded, conversations, strict=True):
        assert states.features.dtype == states.last_hidden.dtype == torch.float32
        worst = max(worst, errors(states, forward(target, ids)).max().item())
        said = target.logits(states.last_hidden[answer - 1 : -1]).argmax(-1)
        assert said.tolist() == ids[answer:].tolist()
    tokens = sum(len(ids) for ids, _ in conversations)
    print(f"float32: {tokens:,} tokens, largest relative error {worst:.2g}")
    assert worst < RELATIVE


def test_another_recipe_is_refused(servers: dict[str, Server], conversations: list[tuple[np.ndarray, int]]) -> None:
    """The layers were changed after the server was started: it would record the wrong ones without a word."""
    settings = servers["float32"].settings
    other = replace(settings, target=replace(settings.target, layers=(1, 8, 12)))
    recorder = VllmRecorder(other, load_ends(other.target))
    with pytest.raises(UserError, match="it serves embedded@2-8-13-16 and not embedded@2-9-13-16; start it as: vllm"):
        list(recorder.record([[conversations[0][0]]]))


def test_bfloat16_is_transformers_up_to_rounding_and_the_router_flips_that_come_of_it(
    servers: dict[str, Server], conversations: list[tuple[np.ndarray, int]]
) -> None:
    settings = servers["bfloat16"].settings
    target = load_target(settings.target)
    recorded = list(VllmRecorder(settings, load_ends(settings.target)).record([[ids for ids, _ in conversations]]))
    differences, flips, choices = list[Tensor](), 0, 0
    for states, (ids, _) in zip(recorded, conversations, strict=True):
        ours, output = routed(target, ids)
        theirs, _ = routed(target, ids, states.features)
        flips += int((ours != theirs).sum())
        choices += ours.numel()
        differences.append(errors(states, output))
    quantiles = torch.cat(differences)[:, -1].quantile(torch.tensor([0.5, 0.9, 0.99, 1.0])).tolist()
    print(f"bfloat16: last hidden, relative error at 50%, 90%, 99%, 100%: {quantiles}")
    print(f"bfloat16: the router chooses another expert {flips:,} times of {choices:,}")
    assert quantiles[0] < 0.02
    assert flips < 0.02 * choices


def routed(target: Target, ids: np.ndarray, features: Tensor | None = None) -> tuple[Tensor, TargetOutput]:
    """Which expert each MoE layer's router chooses for each token ``[layers, T]``; what goes from layer to layer is
    ``features`` if they are given, so that the choices are those that follow from them."""
    chosen, hooks = list[Tensor](), []
    for number, layer in enumerate(find_decoder(target.model, "").layers):
        if number % 2:
            hooks.append(
                layer.feed_forward.router.register_forward_hook(lambda m, a, out: chosen.append(out[1].argmax(-1)))
            )
        if features is not None:
            hooks.append(layer.register_forward_hook(lambda m, a, out, number=number: features[None, :, number]))
    output = forward(target, ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen), output
