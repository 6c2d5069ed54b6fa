"""The vLLM recorder against a server that answers as vLLM 0.32 does, and one that fails in every way we know of.

A real vLLM is asked in tests/serving.
"""

from __future__ import annotations

import fcntl
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagle3.configs.entry import finish
from eagle3.configs.errors import UserError
from eagle3.configs.loader import load
from eagle3.configs.settings import Settings, TargetSettings
from eagle3.data import vllm_launch, vllm_recorder, vllm_server
from eagle3.data.answers import read_answers
from eagle3.data.conversations import Conversation
from eagle3.data.dialogue import Dialogue
from eagle3.data.questions import ask
from eagle3.data.recorders import States
from eagle3.data.vllm_launch import launch_command, layer_ids, longest_conversation
from eagle3.data.vllm_recorder import VllmRecorder, spool
from eagle3.models.target import Target
from eagle3.models.target_files import TargetEnds, load_ends
from eagle3.models.target_info import find_decoder
from safetensors.torch import save_file
from torch import Tensor

MODEL = threading.Lock()  # one target answers for all servers
Change = Callable[[dict[str, Any]], dict[str, Any]]


class StubServer:
    """vLLM's answers and files, for the target given; what is changed below is changed for all that follow."""

    def __init__(self, target: Target, folder: Path, name: str, port: int = 0) -> None:
        self.target, self.folder, self.name = target, folder, name
        self.last = target.info.num_layers  # the layer whose input is captured last
        self.change_file: Change = lambda tensors: tensors
        self.change_answer: Change = lambda answer: answer
        self.metrics = 'vllm:cache_config_info{block_size="32",enable_prefix_caching="False"} 1.0\n'
        self.fail: list[str] = []  # how the next requests fail
        self.delay = 0.0
        self.asked, self.at_once, self.most_at_once = 0, 0, 0
        self._turn = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = {"data": [{"id": stub.name, "max_model_len": 64}]}
                self.send(200, json.dumps(models) if self.path == "/v1/models" else stub.metrics)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.complete(self, body)

            def send(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def complete(self, handler: Any, body: dict[str, Any]) -> None:
        with self._turn:
            self.asked += 1
            failure = self.fail.pop(0) if self.fail else ""
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        ids = torch.tensor(body["prompt"])
        path = self.folder / f"cmpl-{handler.headers['X-Request-Id']}-0-1234.safetensors"
        lock = path.with_name(f"{path.name}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if failure == "dropped":
            handler.connection.close()
        elif failure:
            path.write_bytes(b"torn" if failure == "torn" else b"")
            handler.send(200 if failure == "torn" else 500, self.answer(body, path, ids))
        else:
            handler.send(200, self.answer(body, path, ids))  # the file comes later, under its lock
            time.sleep(0.01)
            with MODEL:
                states = {"hidden_states": self.states(ids), "token_ids": ids.clone()}
                save_file(self.change_file(states), path)
        lock.close()
        with self._turn:
            self.at_once -= 1

    def states(self, ids: Tensor) -> Tensor:
        """``[T, S, H]`` as vLLM numbers them: id i is what enters layer i, and the last what enters the final norm."""
        ids_captured = [*(layer + 1 for layer in self.target.info.layers), self.last]
        outputs = list[Tensor]()
        hooks = [
            layer.register_forward_hook(lambda module, arguments, output: outputs.append(output[0].clone()))
            for layer in find_decoder(self.target.model, "").layers
        ]
        self.target.forward(ids[None])
        for hook in hooks:
            hook.remove()
        return torch.stack([outputs[at - 1] for at in ids_captured], 1)

    def answer(self, body: dict[str, Any], path: Path, ids: Tensor) -> str:
        choice: dict[str, Any] = {"prompt_token_ids": ids.tolist()}
        if "prompt_logprobs" in body:
            with torch.no_grad(), MODEL:
                logprobs = self.target.model(ids[None]).logits[0].log_softmax(-1)
            said = zip(logprobs[:-1], ids[1:].tolist(), strict=True)
            choice["prompt_logprobs"] = [None, *({str(token): {"logprob": float(at[token])}} for at, token in said)]
        handed = {"hidden_states_path": f"/as/the/server/sees/it/{path.name}"}
        return json.dumps(self.change_answer({"choices": [choice], "kv_transfer_params": handed}))


@pytest.fixture(scope="module")
def ends(tiny_target: Target) -> TargetEnds:
    return load_ends(TargetSettings(path=tiny_target.info.name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states"


@pytest.fixture
def serve(tiny_target: Target, folder: Path) -> Iterator[Callable[..., StubServer]]:
    """Start a stub, on a given port if it shall take another's place."""
    servers = list[StubServer]()
    folder.mkdir()

    def started(port: int = 0) -> StubServer:
        ids = "-".join(map(str, layer_ids(tiny_target.info.layers, tiny_target.info.num_layers)))
        servers.append(StubServer(tiny_target, folder, f"{tiny_target.info.name}@{ids}", port))
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


@pytest.fixture
def recorder(
    changed: Callable[..., Settings], ends: TargetEnds, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., VllmRecorder]:
    monkeypatch.setattr(vllm_recorder, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(vllm_recorder, "SHORTEST_PAUSE_S", 0.01)
    monkeypatch.setattr(vllm_server, "GRACE_S", 0.1)

    def made(*servers: StubServer, in_flight: int = 3, patience_s: float = 10.0) -> VllmRecorder:
        endpoints = tuple(server.url for server in servers)
        values = {"endpoints": endpoints, "in_flight": in_flight, "patience_s": patience_s}
        return VllmRecorder(changed("record", states_folder=str(folder), **values), ends)

    return made


def sequences(count: int) -> list[np.ndarray]:
    """Token ids, without the special ones: the embedding of padding is zero."""
    draws = np.random.default_rng(0)
    return [draws.integers(10, 200, int(length), dtype=np.int32) for length in draws.integers(2, 40, count)]


def same(recorded: list[States], asked: list[np.ndarray], target: Target) -> None:
    assert len(recorded) == len(asked)
    for states, ids in zip(recorded, asked, strict=True):
        with MODEL:
            expected = target.forward(torch.from_numpy(ids)[None].long())
        torch.testing.assert_close(states.features, expected.features[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states.last_hidden, expected.last_hidden[0], rtol=1e-5, atol=1e-5)


def test_states_of_several_servers_come_in_order_and_leave_no_file(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], tiny_target: Target, folder: Path
) -> None:
    slow, fast = serve(), serve()
    slow.delay = 0.05
    asked = sequences(30)
    same(list(recorder(slow, fast).record([asked])), asked, tiny_target)
    assert fast.asked > slow.asked > 0
    assert max(slow.most_at_once, fast.most_at_once) <= 3 < slow.most_at_once + fast.most_at_once
    assert list(folder.iterdir()) == []


def test_several_threads_share_what_a_server_takes(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], tiny_target: Target, folder: Path
) -> None:
    server, asked = serve(), sequences(24)
    shared = recorder(server)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda at: list(shared.record([asked[at : at + 6]])), range(0, 24, 6)))
    same([states for part in parts for states in part], asked, tiny_target)
    assert server.most_at_once <= 3
    assert list(folder.iterdir()) == []


def test_a_server_does_not_wait_for_the_end_of_a_batch(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], tiny_target: Target
) -> None:
    server, asked = serve(), sequences(12)
    server.delay = 0.02
    same(list(recorder(server).record([ids] for ids in asked)), asked, tiny_target)
    assert server.most_at_once == 3


def test_it_runs_ahead_of_its_reader_no_further_than_it_says(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], folder: Path
) -> None:
    server = serve()
    states = recorder(server).record([sequences(30)])
    next(states)
    deadline = time.monotonic() + 30
    while [path.suffix for path in folder.iterdir()] != [".owner"]:  # what was read goes before it is yielded
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.asked <= 3 + 7 + 1  # greetings of three threads, twice three ahead, and what was read
    states.close()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("failure", ["refused", "dropped", "torn"])
def test_what_fails_is_tried_again(
    failure: str,
    serve: Callable[..., StubServer],
    recorder: Callable[..., VllmRecorder],
    tiny_target: Target,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve()
    server.fail = [failure] * 5
    asked = sequences(8)
    same(list(recorder(server).record([asked])), asked, tiny_target)
    assert list(folder.iterdir()) == []
    assert 1 <= capsys.readouterr().err.count(f"record: {server.url}: it ") <= 5


def test_a_server_may_end_and_return(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], tiny_target: Target
) -> None:
    first, asked = serve(), sequences(30)
    states = recorder(first).record([asked])
    recorded = [next(states) for _ in range(3)]
    first.stop()
    threading.Timer(0.5, serve, (first.port,)).start()
    same([*recorded, *states], asked, tiny_target)


def test_the_others_take_over_from_one_that_is_gone(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], tiny_target: Target
) -> None:
    gone, well, asked = serve(), serve(), sequences(10)
    gone.stop()
    same(list(recorder(gone, well).record([asked])), asked, tiny_target)


def test_it_gives_up_when_no_server_answers(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], folder: Path
) -> None:
    gone = serve()
    gone.stop()
    with pytest.raises(UserError, match=rf"{gone.url}: it cannot be reached \(.*refused.*start it as: vllm serve"):
        list(recorder(gone, patience_s=0.3).record([sequences(3)]))
    assert list(folder.iterdir()) == []


def set_name(server: StubServer) -> None:
    server.name = server.name.replace("@2", "@1")


def set_prefix_caching(server: StubServer) -> None:
    server.metrics = server.metrics.replace("False", "True")


def set_last(server: StubServer) -> None:
    server.last -= 1


def set_no_connector(server: StubServer) -> None:
    server.change_answer = lambda answer: answer | {"kv_transfer_params": None}


def set_old(server: StubServer) -> None:
    server.change_answer = lambda answer: answer | {"choices": [{}]}


def in_file(change: Callable[[Tensor], Tensor], tensor: str = "hidden_states") -> Callable[[StubServer], None]:
    def changed(server: StubServer) -> None:
        server.change_file = lambda tensors: tensors | {tensor: change(tensors[tensor]).contiguous()}

    return changed


def with_last_row(value: float) -> Callable[[Tensor], Tensor]:
    return lambda states: torch.cat([states[:-1], torch.full_like(states[-1:], value)])


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (set_name, r"it serves .*@1-4-5-8 and not .*@2-4-5-8; start it as: vllm serve .*\[2,4,5,8\]"),
        (set_prefix_caching, r"it caches prefixes, .*; start it as: vllm serve .* --no-enable-prefix-caching"),
        (set_last, "differ from its own by .* in the mean: it runs another model, or its last state is another"),
        (set_no_connector, "it answers without hidden states: it was started without their connector; start it as"),
        (set_old, "it does not repeat the token ids that it was given; take vLLM 0.32 or later"),
        (in_file(lambda ids: ids + 1, "token_ids"), "its states are those of other tokens; start it as"),
        (in_file(lambda states: states[:, 1:]), r"its states are \(\d+, 3, 32\) and not \(\d+, 4, 32\) \(tokens,"),
        (in_file(lambda states: states[..., :16]), r"its states are \(\d+, 4, 16\) and not \(\d+, 4, 32\)"),
        (in_file(lambda states: states[:-1]), r"its states are "),
        (in_file(lambda states: states.bfloat16()), "its states are torch.bfloat16 and not torch.float32; start it as"),
        (in_file(with_last_row(0.0)), "its states are zero for some tokens, as they are for those that it has cached"),
        (in_file(with_last_row(torch.nan)), "its states are not finite; check its dtype"),
    ],
)
def test_a_server_that_is_not_what_is_needed_is_refused(
    plant: Callable[[StubServer], None],
    told: str,
    serve: Callable[..., StubServer],
    recorder: Callable[..., VllmRecorder],
    folder: Path,
) -> None:
    server = serve()
    plant(server)
    with pytest.raises(UserError, match=f"record.endpoints = {server.url}: .*{told}"):
        list(recorder(server).record([sequences(4)]))
    assert list(folder.iterdir()) == []


def test_longer_sequences_than_a_server_takes_are_told(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder]
) -> None:
    with pytest.raises(UserError, match="it takes 63 tokens, and a conversation has 64; start it with a larger"):
        list(recorder(serve()).record([[np.arange(64)]]))


def test_a_folder_that_is_not_the_servers_is_told(
    serve: Callable[..., StubServer], recorder: Callable[..., VllmRecorder], folder: Path, tmp_path: Path
) -> None:
    server = serve()
    server.folder = tmp_path / "elsewhere"
    server.folder.mkdir()
    told = f"record.states_folder = {folder}: the states that {server.url} says are in /as/the/server/sees/it are not"
    with pytest.raises(UserError, match=told):
        list(recorder(server).record([sequences(1)]))


def test_what_a_killed_recorder_left_goes_and_what_a_living_one_needs_stays(folder: Path) -> None:
    with spool(folder) as living:
        needed, left = folder / f"cmpl-{living}-0", folder / f"cmpl-eagle3-{'0' * 32}-0-0-1234.safetensors.lock"
        other = folder / "eagle3-notes.txt"
        for path in (needed, left, other, folder / f"eagle3-{'0' * 32}.owner"):
            path.touch()
        with spool(folder):
            assert {path for path in folder.iterdir() if path.suffix != ".owner"} == {needed, other}
    assert list(folder.iterdir()) == [other]


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="record.states_folder = .*file: it cannot be written"),
        spool(tmp_path / "file"),
    ):
        pass


def test_the_command_is_that_of_mavericks_recipe(tiny_target: Target, tmp_path: Path) -> None:
    settings = load("maverick", ["record.server_gpus=8", "target.revision=main", f"run.root={tmp_path}"])
    command = launch_command(settings, (1, 23, 44), 48, tiny_target.text._replace(max_positions=1 << 20))
    assert shlex.split(shlex.join(command)) == command
    assert command[:3] == ["vllm", "serve", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"]
    options = dict(zip(command[3:-6:2], command[4:-6:2], strict=True))
    assert options == {
        "--served-model-name": "meta-llama/Llama-4-Maverick-17B-128E-Instruct@2-24-45-48",
        "--revision": "main",
        "--dtype": "bfloat16",
        "--tensor-parallel-size": "8",
        "--max-model-len": "6145",
        "--max-num-batched-tokens": "16384",
    }
    assert command[-6:-4] == ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    spoken = dict(zip(command[-4::2], map(json.loads, command[-3::2]), strict=True))
    assert spoken["--speculative-config"] == {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [2, 24, 45, 48]}},
    }
    assert spoken["--kv-transfer-config"]["kv_connector"] == "ExampleHiddenStatesConnector"


def test_the_command_is_printed_as_a_shell_takes_it(
    tiny_folder: Path,
    tiny_target: Target,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = [f"target.path={tiny_folder}", f"run.root={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["vllm_launch", "tiny", *overrides])
    assert finish(vllm_launch.main) == 0
    assert shlex.split(capsys.readouterr().out) == launch_command(
        load("tiny", overrides), (1, 3, 4), 8, tiny_target.text
    )
    monkeypatch.setattr("sys.argv", ["vllm_launch"])
    assert finish(vllm_launch.main) == 2


def test_a_captured_last_layer_is_asked_for_once() -> None:
    assert layer_ids((1, 3, 7), 8) == [2, 4, 8]


@pytest.mark.parametrize("follow_ups", [("Why?",), ("Why?", "And " * 30, "Then?")])
@pytest.mark.parametrize("positions", [60, 110, 1000])
def test_the_longest_conversation_is_that_of_a_target_that_says_as_much_as_it_may(
    recipe: Settings, tiny_target: Target, tmp_path: Path, follow_ups: tuple[str, ...], positions: int
) -> None:
    settings = replace(recipe, run=replace(recipe.run, root=str(tmp_path), name="talk"))
    settings = replace(settings, prepare=replace(settings.prepare, max_prompt_tokens=10))
    asked = Conversation("it", "s", "train", [{"role": "user", "content": "Hello"}], follow_ups)
    (tmp_path / "talk" / "conversations").mkdir(parents=True)
    path = tmp_path / "talk" / "conversations" / "prompts.jsonl"
    path.write_text(json.dumps(asked._asdict()) + "\n")
    most, text = settings.regenerate.max_new_tokens, tiny_target.text._replace(max_positions=positions)
    dialogue = Dialogue(ask(settings, path, text)[0], text, most)
    while not dialogue.finish:  # it ends each turn at the last moment, so that it is asked on
        dialogue.say([*text.tokenizer("so" * most).input_ids[: most - 1], text.tokenizer.eos_token_id], ended=True)
    longest = longest_conversation(settings, text)
    assert 10 + most < len(dialogue.ids) <= longest <= positions
    if positions == 1000:  # the template's end of turn stands there already
        assert dialogue.finish == "stop" and longest - len(dialogue.ids) == len(follow_ups)
    options = launch_command(settings, (1, 3, 4), 8, text)
    assert options[options.index("--max-model-len") + 1] == str(min(longest + 1, positions))


def test_of_answers_that_are_there_the_longest_counts(finished: Path, recipe: Settings, tiny_target: Target) -> None:
    settings = replace(recipe, run=replace(recipe.run, root=str(finished.parent), name=finished.name))
    lengths = [len(answer.ids) for answer in read_answers(finished / "conversations" / "answers.jsonl")]
    assert longest_conversation(settings, tiny_target.text) == max(lengths) < 512
