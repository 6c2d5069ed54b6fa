"""A live engine, for which a small server stands in, is compared with our decoder token by token and count by count."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.eval.serving import Counters, LiveEngine, Served, ask, decode_all, differences
from eagle3.models.draft import Eagle3Draft
from eagle3.models.target import Target

PROMPTS = [[1, 5, 9], [1, 7, 3, 2]]
MOST, CHAIN = 6, 2


class Stub(ThreadingHTTPServer):
    """Answers as ``answers`` says, and counts ``after`` once it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[int]] = {}
        self.before, self.after = Counters(3, [2, 1]), Counters(3, [2, 1])
        self.asked, self.ids = False, True
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(json.dumps({"data": [{"id": "mine"}]}))
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
        if asked["model"] != "mine" or asked["temperature"] != 0 or asked["max_tokens"] != MOST:
            self.send_error(400, "not as it should ask")
            return
        ids = self.server.answers[str(asked["prompt"])] if self.server.ids else None
        self.reply(json.dumps({"choices": [{"text": "", "token_ids": ids}]}))

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


@pytest.fixture(scope="module")
def ours(tiny_target: Target, new_draft: Callable[..., Eagle3Draft]) -> Served:
    return decode_all(tiny_target, new_draft().eval(), PROMPTS, CHAIN, MOST)


def test_counters_of_a_live_engine_are_what_was_added_while_it_was_asked(stub: Stub) -> None:
    stub.answers = {str(prompt): [number] for number, prompt in enumerate(PROMPTS)}
    stub.after = Counters(13, [10, 4, 1])
    served = ask(LiveEngine(stub.url), PROMPTS, MOST)
    assert served == Served([[0], [1]], Counters(10, [8, 3, 1]))
    assert served.counters.acceptance_length == 2.2
    assert str(served.counters) == "acceptance length 2.200 (0.800 0.300 0.100 by position, 10 rounds)"


def test_our_decoder_counts_in_the_same_way(
    ours: Served, tiny_target: Target, new_draft: Callable[..., Eagle3Draft]
) -> None:
    plain = decode_all(tiny_target, None, PROMPTS, CHAIN, MOST)
    assert ours.answers == plain.answers
    assert plain.counters == Counters(0, [0, 0])
    # A round emits what it accepts and one token more; the first token of an answer is of no round.
    emitted = sum(len(answer) - 1 for answer in ours.answers)
    assert ours.counters.rounds <= emitted <= ours.counters.rounds + sum(ours.counters.by_position)


def test_the_same_is_no_difference(ours: Served, tiny_target: Target) -> None:
    exact = ours._replace(counters=Counters(1000, [500, 200]))
    close = ours._replace(counters=Counters(1010, [505, 198]))
    assert differences(tiny_target, PROMPTS, exact, close) == []


@pytest.mark.parametrize(
    ("counters", "said"),
    [
        (Counters(1000, [506, 200]), ["position 1: it accepted 506 drafted tokens, and our decoder 500"]),
        (Counters(1000, [500, 197]), ["position 2: it accepted 197 drafted tokens, and our decoder 200"]),
        (Counters(1011, [500, 200]), ["it took 1,011 rounds, and our decoder 1,000"]),
        (Counters(0, []), ["it has drafted nothing: it was started without the head, or counts under other names"]),
        (Counters(1000, [500, 200, 50]), ["it drafts 3 tokens a round, and 2 were compared"]),
    ],
)
def test_other_counts_are_told(ours: Served, tiny_target: Target, counters: Counters, said: list[str]) -> None:
    exact = ours._replace(counters=Counters(1000, [500, 200]))
    assert differences(tiny_target, PROMPTS, exact, exact._replace(counters=counters)) == said


def test_another_token_is_told_with_its_place(ours: Served, tiny_target: Target) -> None:
    wrong = list(ours.answers[1])
    logits = tiny_target.logits(tiny_target.forward(torch.tensor([PROMPTS[1] + wrong[:1]])).last_hidden[0, -1])
    wrong[1] = int(logits.argmin())
    found = differences(tiny_target, PROMPTS, ours, ours._replace(answers=[ours.answers[0], wrong]))
    assert len(found) >= 1
    assert found[0].startswith("prompt 2: it says something else from token 1 on, where the two best logits are")


def test_an_engine_that_cannot_be_asked(stub: Stub) -> None:
    with pytest.raises(
        UserError, match="--against = ftp://x: it is no address; give the engine's, as http://127.0.0.1"
    ):
        LiveEngine("ftp://x")
    with pytest.raises(UserError, match=r"it refuses \(400: .*\); see its log"):
        ask(LiveEngine(stub.url), PROMPTS, MOST + 1)
    stub.ids = False
    with pytest.raises(UserError, match="it returns no token ids; serve with vLLM 0.32 or later"):
        ask(LiveEngine(stub.url), PROMPTS, MOST)
    stub.shutdown()
    stub.server_close()
    with pytest.raises(UserError, match="it does not answer .*; start the engine first, as the head's README.md says"):
        LiveEngine(stub.url).model()
