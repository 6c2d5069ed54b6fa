"""A live engine, for which a small server stands in, is compared with our decoder token by token and count by count."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.eval.engines import AnyTarget, load_engine, next_logits
from eagle3.eval.live import Counters, connect
from eagle3.eval.serving import Served, ask, decode_all, differences
from eagle3.models.draft import Eagle3Draft
from eagle3.models.target import Target

PROMPTS = [[1, 5, 9], [1, 7, 3, 2]]
MOST, CHAIN = 6, 2


def counters(rounds: int, *by_position: int) -> Counters:
    return Counters.of_positions(rounds, list(by_position))


class Stub(ThreadingHTTPServer):
    """Speaks as the engine ``kind`` does, answers as ``answers`` says, and has counted ``after`` once it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind = "vllm"
        self.answers: dict[str, list[int]] = {}
        self.before, self.after = counters(3, 2, 1), counters(3, 2, 1)
        self.asked, self.ids = False, True
        self.told: list[dict[str, Any]] = []  # SGLang: of every request; TensorRT-LLM: of every iteration
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(json.dumps({"data": [{"id": "mine", "owned_by": self.server.kind}]}))
        elif self.server.kind == "tensorrt_llm":
            with self.server.lock:
                told, self.server.told = self.server.told, []
            self.reply(json.dumps(told))
        else:
            found = self.server.after if self.server.asked else self.server.before
            lines = [
                "# TYPE vllm:spec_decode_num_drafts_total counter",
                'vllm:spec_decode_num_drafts_created{a="b"} 1.7e9',
            ]
            lines.append(f'vllm:spec_decode_num_drafts_total{{engine="0",model_name="x"}} {float(found.rounds)}')
            for at, count in enumerate(found.by_position):
                labels = f'engine="0",model_name="x",position="{at}"'
                lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {float(count)}")
            self.reply("\n".join(lines))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked = True
        if asked != self.expected(asked):
            self.send_error(400, "not as it should ask")
            return
        ids = self.server.answers[str(asked.get("prompt") or asked["input_ids"])] if self.server.ids else None
        if self.server.kind == "sglang":
            with self.server.lock:
                self.reply(json.dumps({"text": "", "output_ids": ids, "meta_info": self.server.told.pop()}))
        else:
            self.reply(json.dumps({"choices": [{"text": "", "token_ids": ids}]}))

    def expected(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The request as this kind of engine takes it; unknown fields are refused."""
        if self.path == "/generate":
            return {
                "input_ids": asked["input_ids"],
                "sampling_params": {"temperature": 0, "max_new_tokens": MOST},
            }
        flag = {"return_token_ids": True} if self.server.kind == "vllm" else {"detokenize": False}
        return {"model": "mine", "prompt": asked["prompt"], "max_tokens": MOST, "temperature": 0} | flag

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module", params=["native", "transformers"])
def target(request: pytest.FixtureRequest, tiny_folder: Path, tiny_target: Target) -> AnyTarget:
    """The tiny target, by either engine."""
    return load_engine(TargetSettings(path=str(tiny_folder)), request.param, 64, lambda _: tiny_target)


@pytest.fixture(scope="module")
def ours(target: AnyTarget, new_draft: Callable[..., Eagle3Draft]) -> Served:
    return decode_all(target, new_draft().eval(), PROMPTS, CHAIN, MOST)


def test_counters_of_a_live_engine_are_what_was_added_while_it_was_asked(stub: Stub) -> None:
    stub.answers = {str(prompt): [number] for number, prompt in enumerate(PROMPTS)}
    stub.after = counters(13, 10, 4, 1)
    served = ask(connect(stub.url), PROMPTS, MOST)
    assert served == Served([[0], [1]], counters(10, 8, 3, 1))
    assert served.counters.acceptance_length == 2.2
    assert str(served.counters) == "acceptance length 2.200 (0.800 0.300 0.100 by position, 10 rounds)"


def test_sglang_tells_of_every_request_how_many_rounds_accepted_how_many(stub: Stub) -> None:
    stub.kind, stub.answers = "sglang", {str(prompt): [number] for number, prompt in enumerate(PROMPTS)}
    stub.told = [
        {"spec_verify_ct": 7, "spec_correct_drafts_histogram": [4, 2, 1]},
        {"spec_verify_ct": 3, "spec_accept_histogram": [1, 2]},  # 0.5.9's name; nothing reached the second position
    ]
    served = ask(connect(stub.url), PROMPTS, MOST)
    assert served == Served([[0], [1]], counters(10, 5, 1))


def test_sglang_without_a_head_has_drafted_nothing(stub: Stub) -> None:
    stub.kind, stub.answers = "sglang", {str(prompt): [1] for prompt in PROMPTS}
    stub.told = [{"completion_tokens": 1}, {"completion_tokens": 1}]
    assert ask(connect(stub.url), PROMPTS, MOST).counters.rounds == 0


def test_tensorrt_llm_lists_iterations_and_forgets_them(stub: Stub) -> None:
    stub.kind, stub.answers = "tensorrt_llm", {str(prompt): [number] for number, prompt in enumerate(PROMPTS)}
    engine = connect(stub.url)
    stub.told = [{"specDecodingStats": {"numRequestsWithDraftTokens": 9, "numAcceptedTokens": 9, "numDraftTokens": 45}}]
    engine.counters()  # those of others, before
    stub.told = [
        {"iter": 1, "specDecodingStats": {"numRequestsWithDraftTokens": 2, "numAcceptedTokens": 5}},
        {"iter": 2, "specDecodingStats": None},
        {"iter": 3, "specDecodingStats": {"numRequestsWithDraftTokens": 1, "numAcceptedTokens": 0}},
    ]
    answer = engine.greedy(PROMPTS[0], MOST)
    assert (answer, engine.counters()) == ([0], Counters(12, 14, []))


def test_another_kind_of_server_is_refused(stub: Stub) -> None:
    stub.kind = "llamacpp"
    with pytest.raises(UserError, match="it says that it is llamacpp; serve with one of vllm, sglang, tensorrt_llm"):
        connect(stub.url)


def test_our_decoder_counts_in_the_same_way(
    ours: Served, target: AnyTarget, new_draft: Callable[..., Eagle3Draft]
) -> None:
    plain = decode_all(target, None, PROMPTS, CHAIN, MOST)
    assert ours.answers == plain.answers
    assert plain.counters == counters(0, 0, 0)
    # A round emits what it accepts and one token more; the first token of an answer is of no round.
    emitted = sum(len(answer) - 1 for answer in ours.answers)
    assert ours.counters.rounds <= emitted <= ours.counters.rounds + sum(ours.counters.by_position)


def test_the_same_is_no_difference(ours: Served, target: AnyTarget) -> None:
    exact = ours._replace(counters=counters(1000, 500, 200))
    close = ours._replace(counters=counters(1010, 505, 198))
    assert differences(target, PROMPTS, exact, close) == []


@pytest.mark.parametrize(
    ("counted", "said"),
    [
        (counters(1000, 506, 200), ["position 1: it accepted 506 drafted tokens, and our decoder 500"]),
        (counters(1000, 500, 197), ["position 2: it accepted 197 drafted tokens, and our decoder 200"]),
        (counters(1011, 500, 200), ["it took 1,011 rounds, and our decoder 1,000"]),
        (counters(0), ["it has drafted nothing: it was started without the head, or counts under other names"]),
        (counters(1000, 500, 200, 50), ["it drafts 3 tokens a round, and 2 were compared"]),
    ],
)
def test_other_counts_are_told(ours: Served, target: AnyTarget, counted: Counters, said: list[str]) -> None:
    exact = ours._replace(counters=counters(1000, 500, 200))
    assert differences(target, PROMPTS, exact, exact._replace(counters=counted)) == said


def test_an_engine_without_figures_by_position_is_compared_in_all(ours: Served, target: AnyTarget) -> None:
    exact = ours._replace(counters=counters(1000, 500, 200))
    assert differences(target, PROMPTS, exact, exact._replace(counters=Counters(1000, 704, []))) == []
    found = differences(target, PROMPTS, exact, exact._replace(counters=Counters(1000, 650, [])))
    assert found == ["in all: it accepted 650 drafted tokens, and our decoder 700"]


def test_a_position_that_an_engine_never_reached_counts_as_nothing(ours: Served, target: AnyTarget) -> None:
    exact = ours._replace(counters=counters(1000, 500, 200))
    found = differences(target, PROMPTS, exact, exact._replace(counters=counters(1000, 500)))
    assert found == ["position 2: it accepted 0 drafted tokens, and our decoder 200"]


def test_an_end_token_may_be_left_out(ours: Served, target: AnyTarget) -> None:
    ended = ours._replace(answers=[[*ours.answers[0], target.info.eos_ids[0]], ours.answers[1]])
    assert differences(target, PROMPTS, ended, ours._replace(counters=ended.counters)) == []


def test_another_token_is_told_with_its_place(ours: Served, target: AnyTarget) -> None:
    wrong = list(ours.answers[1])
    wrong[1] = int(next_logits(target, PROMPTS[1] + wrong[:1]).argmin())
    found = differences(target, PROMPTS, ours, ours._replace(answers=[ours.answers[0], wrong]))
    assert len(found) >= 1
    assert found[0].startswith("prompt 2: it says something else from token 1 on, where the two best logits are")


def test_an_engine_that_cannot_be_asked(stub: Stub) -> None:
    for url in ("ftp://x", "http://", "http://x y"):
        with pytest.raises(UserError, match=f"--against = {url}: it is no address; give the engine's, as http://127"):
            connect(url)
    with pytest.raises(UserError, match=r"it says 400: .*; see its log"):
        ask(connect(stub.url), PROMPTS, MOST + 1)
    stub.ids = False
    with pytest.raises(UserError, match="it returns no token ids; serve with a newer version"):
        ask(connect(stub.url), PROMPTS, MOST)
    stub.shutdown()
    stub.server_close()
    with pytest.raises(
        UserError, match="it cannot be reached .*refused.*; start the engine first, as the head's README.md says"
    ):
        connect(stub.url)
