"""Answers from servers, for which small ones with troubles stand in: none is lost, none is asked for twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eagle3.cli import main
from eagle3.configs.errors import Incomplete, Interrupted, UserError
from eagle3.configs.loader import save
from eagle3.configs.settings import RunSettings, Settings
from eagle3.data import endpoints
from eagle3.data.answers import read_answers, read_failures, read_finished
from eagle3.data.chat import prompt_ids, tokenizer_hash
from eagle3.data.conversations import read_conversations
from eagle3.data.dialogue import Dialogue, Question
from eagle3.data.endpoints import Endpoint, Failed, Refused, Unavailable, backoff
from eagle3.data.questions import Questions
from eagle3.data.record import record
from eagle3.data.regenerate import regenerate, regenerated
from eagle3.data.store import Store
from eagle3.models.target import Target, load_text

ANSWERS, FAILED = Path("conversations/answers.jsonl"), Path("conversations/failed.jsonl")
SUMMARY = Path("conversations/answers.summary.json")

fork = multiprocessing.get_context("fork")
Serve = Callable[..., Any]
Through = Callable[..., Settings]


@pytest.fixture
def through(changed: Callable[..., Settings]) -> Through:
    """``through(stub, other, retries=2)``: the recipe, answered by these servers."""
    return lambda *stubs, **values: changed("regenerate", endpoints=tuple(stub.url for stub in stubs), **values)


class Once:
    """A trouble that each prompt has once."""

    def __init__(self, *troubles: Any) -> None:
        self.troubles, self.seen = troubles, Counter[str]()

    def __call__(self, request: dict[str, Any]) -> Any:
        self.seen[key := str(request["prompt"])] += 1
        return self.troubles[len(self.seen) % len(self.troubles)] if self.seen[key] == 1 else None


def prompt_of(row: str, run: Path, target: Target) -> list[int]:
    """The prompt of a conversation."""
    prompts = {prompt.id: prompt for prompt in read_conversations(run / "conversations" / "prompts.jsonl")}
    return prompt_ids(target.tokenizer, prompts[row])


# One endpoint.


def test_a_request_asks_for_what_the_target_itself_says(serve: Serve) -> None:
    stub = serve()
    endpoint = Endpoint(f"{stub.url}/v1/", 5.0)
    endpoint.find_model(None)
    reply = endpoint.complete([5, 6], 4, 0.7, 2**40 + 3)
    assert (len(reply.ids), reply.ended) == (4, False)
    assert stub.requests == [
        {
            "model": "mine", "prompt": [5, 6], "max_tokens": 4, "temperature": 0.7, "seed": 3, "return_token_ids": True,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        ((429, "slow down"), Unavailable, "says 429: slow down"),
        ((503, "loading"), Unavailable, "says 503: loading"),
        ((500, "out of\n memory"), Failed, "says 500: out of memory"),
        ((408, "too slow"), Failed, "says 408"),
        ((400, "x" * 999), Refused, f"says 400: {'x' * 200}$"),
        ((404, "no such model"), UserError, "regenerate.endpoints = .*: it says 404: no such model; check address"),
        ((401, "who?"), UserError, "it says 401: who.; check address, served_model and OPENAI_API_KEY"),
        ((200, "pardon?"), Failed, "answers with no JSON"),
        ((200, '{"choices": []}'), Failed, "answers with no completion"),
        ((200, "[]"), Failed, "answers with no completion"),
        ((200, '{"choices": [{"text": "", "finish_reason": "abort"}]}'), Failed, r"for no good reason \(abort\)"),
        (
            (200, '{"choices": [{"text": "", "finish_reason": "stop", "prompt_token_ids": [1, 5, 6]}]}'),
            Refused,
            "answered another prompt than it was given",
        ),
        ("drop", Failed, "broke off"),
    ],
)
def test_what_a_servers_troubles_mean(serve: Serve, trouble: Any, kind: type[Exception], words: str) -> None:
    stub = serve()
    stub.trouble = lambda request: trouble
    with pytest.raises(kind, match=words):
        Endpoint(stub.url, 5.0).complete([5, 6], 4, 0.0, 0)


def test_time_outs_and_absent_servers(serve: Serve) -> None:
    stub = serve()
    stub.trouble = lambda request: time.sleep(0.3)
    with pytest.raises(Failed, match="did not answer within 0.05 s"):
        Endpoint(stub.url, 0.05).complete([5, 6], 4, 0.0, 0)
    stub.stop()
    with pytest.raises(Unavailable, match="cannot be reached .*refused"):
        Endpoint(stub.url, 5.0).complete([5, 6], 4, 0.0, 0)


def test_a_server_that_has_answered_is_no_mistake_later(serve: Serve) -> None:
    stub = serve()
    endpoint = Endpoint(stub.url, 5.0)
    endpoint.complete([5, 6], 4, 0.0, 0)
    stub.trouble = lambda request: (404, "the gateway finds nothing")
    with pytest.raises(Failed, match="404: the gateway finds nothing"):
        endpoint.complete([5, 6], 4, 0.0, 0)


def test_a_server_says_how_long_it_is_busy(serve: Serve) -> None:
    stub = serve()
    stub.trouble = lambda request: (429, "busy", {"Retry-After": "2"})
    with pytest.raises(Unavailable) as caught:
        Endpoint(stub.url, 5.0).complete([5, 6], 4, 0.0, 0)
    assert caught.value.pause_s == endpoints.LONGEST_PAUSE_S  # here less than it says, and never for ever


def test_pauses_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    assert [backoff(attempt) for attempt in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    monkeypatch.undo()
    assert len({backoff(3) for _ in range(9)}) > 1
    assert all(2.0 <= backoff(3) <= 4.0 for _ in range(99))


def test_a_server_that_knows_openais_parameters_alone(serve: Serve) -> None:
    stub, rest = serve(), ("return_token_ids", "top_k", "min_p", "repetition_penalty")
    stub.trouble = lambda request: (422, "extra inputs") if any(name in request for name in rest) else None
    endpoint = Endpoint(stub.url, 5.0)
    for prompt in ([5, 6], [7, 8]):
        endpoint.complete(prompt, 4, 0.0, 0)
    assert endpoint.strict
    assert [request["prompt"] for request in stub.requests] == [[5, 6], [5, 6], [7, 8]]
    assert stub.requests[-1] == {
        "model": "", "prompt": [7, 8], "max_tokens": 4, "temperature": 0.0, "seed": 0, "top_p": 1.0
    }  # fmt: skip


def test_what_is_refused_either_way_makes_no_server_strict(serve: Serve) -> None:
    stub = serve()
    stub.trouble = lambda request: (400, "too long") if request["prompt"] == [5] else None
    endpoint = Endpoint(stub.url, 5.0)
    with pytest.raises(Refused, match="too long"):
        endpoint.complete([5], 4, 0.0, 0)
    endpoint.complete([6], 4, 0.0, 0)
    with pytest.raises(Refused, match="too long"):
        endpoint.complete([5], 4, 0.0, 0)
    assert not endpoint.strict
    assert ["top_k" in request for request in stub.requests] == [True, False, True, True]


# The stage.


def test_servers_say_what_the_target_says_in_process(
    asked: Path, finished: Path, through: Through, serve: Serve, tiny_target: Target
) -> None:
    one, two = serve(), serve()
    for stub in (one, two):
        stub.trouble = lambda request: time.sleep(0.01)
    settings = through(one, two, concurrency=3)
    regenerate(settings, asked, tiny_target.text)
    assert regenerated(settings, asked)
    mine, theirs = ({answer.id: answer for answer in read_answers(run / ANSWERS)} for run in (finished, asked))
    assert {name for name, answer in theirs.items() if answer == mine[name]} >= {
        name for name, answer in mine.items() if answer.temperature == 0.0
    }
    assert {name: answer[1:4] for name, answer in theirs.items()} == {
        name: answer[1:4] for name, answer in mine.items()
    }
    assert len(one.requests) + len(two.requests) == 24
    assert min(len(one.requests), len(two.requests)) > 3
    assert max(one.most_at_once, two.most_at_once) == 3
    assert len({request["seed"] for stub in (one, two) for request in stub.requests}) == 24
    assert not (asked / FAILED).exists()


def test_a_question_is_made_when_a_worker_takes_it(
    asked: Path, through: Through, serve: Serve, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no more conversations are held than are asked at once."""
    stub, made, real = serve(), [], Questions.__getitem__

    def watched(questions: Questions, index: int) -> Question:
        made.append((index, len(stub.answered)))
        return real(questions, index)

    monkeypatch.setattr(Questions, "__getitem__", watched)
    regenerate(through(stub, concurrency=2), asked, tiny_target.text)
    assert [index for index, _ in sorted(made)] == list(range(24))
    assert max(index - answered for index, answered in made) < 3


def test_the_order_of_completion_is_not_recorded(
    asked: Path, through: Through, serve: Serve, tiny_target: Target, tmp_path: Path, files_of
) -> None:
    stores = []
    for name, delay in (("first", 0.0), ("second", 0.02)):
        run = Path(shutil.copytree(asked, tmp_path / name))
        stub = serve()
        stub.trouble = lambda request, delay=delay: time.sleep(delay * (len(request["prompt"]) % 3))
        settings = through(stub, concurrency=8)
        regenerate(settings, run, tiny_target.text)
        record(settings, run, tiny_target)
        files = files_of(run / "store")
        stores.append((read_answers(run / ANSWERS), files))
    (first, files), (second, others) = stores
    assert first != second
    assert sorted(first) == sorted(second)
    assert files == others


@pytest.mark.usefixtures("brief")
def test_servers_are_asked_turn_by_turn(
    talking: Path, recipe: Settings, through: Through, serve: Serve, tiny_target: Target, tmp_path: Path
) -> None:
    here = Path(shutil.copytree(talking, tmp_path / "here"))
    regenerate(recipe, here, tiny_target)
    stub = serve()
    stub.trouble = Once((500, "not now"))
    regenerate(through(stub, retries=1), talking, tiny_target.text)  # for each turn
    mine, theirs = (
        {answer.id: answer for answer in read_answers(run / ANSWERS) if answer.temperature == 0.0}
        for run in (here, talking)
    )
    assert theirs == mine
    assert max(len(answer.turns) for answer in theirs.values()) == 3
    # A conversation that fails at a turn goes on with that turn.
    assert max(Counter(str(prompt) for prompt in stub.answered).values()) == 1


def test_what_fails_once_is_asked_again(
    asked: Path, through: Through, serve: Serve, tiny_target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = serve()
    stub.trouble = Once((429, "busy", {"Retry-After": "0"}), (500, "oh"), "drop", (200, "pardon?"), (502, "gone"))
    regenerate(through(stub, retries=1, concurrency=4), asked, tiny_target.text)
    assert len(read_answers(asked / ANSWERS)) == 24
    assert len(stub.requests) == 48
    assert not (asked / FAILED).exists()


def test_what_is_refused_is_listed_and_asked_again_the_next_time(
    asked: Path, through: Through, serve: Serve, tiny_target: Target
) -> None:
    stub = serve()
    bad = [prompt_of(row, asked, tiny_target) for row in ("train-4", "test-1")]
    stub.trouble = lambda request: (400, "no such luck") if request["prompt"] in bad else None
    settings = through(stub, concurrency=1)
    said = (
        r"2 of 24 conversations have no answer, the first (train-4|test-1) \(http://.* says 400: no such luck\); "
        r".*failed.jsonl lists them: run eagle3 regenerate again to try them again, or raise "
        r"regenerate.allowed_failures"
    )
    with pytest.raises(Incomplete, match=said) as caught:
        regenerate(settings, asked, tiny_target.text)
    assert caught.value.exit_code == 3
    failures = read_failures(asked / FAILED)
    assert sorted(failure[:2] for failure in failures) == [("test-1", 1), ("train-4", 1)]
    assert all("says 400: no such luck" in failure.reason for failure in failures)
    assert len(stub.requests) == 24  # it was refused, not asked again
    assert len(read_answers(asked / ANSWERS)) == 22
    assert not regenerated(settings, asked)
    with pytest.raises(UserError, match="2 of 24 answers are missing; run eagle3 regenerate"):
        record(settings, asked, tiny_target)
    stub.trouble = lambda request: None
    regenerate(settings, asked, tiny_target.text)
    assert stub.requests[24:] == [request for request in stub.requests[24:] if request["prompt"] in bad]
    assert len(stub.requests) == 26
    assert len(read_answers(asked / ANSWERS)) == 24
    assert regenerated(settings, asked)
    assert not (asked / FAILED).exists()


def test_some_failures_may_be_allowed(asked: Path, through: Through, serve: Serve, tiny_target: Target) -> None:
    stub = serve()
    bad = prompt_of("train-3", asked, tiny_target)
    stub.trouble = lambda request: (422, "no") if request["prompt"] == bad else None
    with pytest.raises(Incomplete, match="1 of 24 conversations have no answer"):
        regenerate(through(stub, allowed_failures=0.04), asked, tiny_target.text)
    settings = through(stub, allowed_failures=0.05)
    regenerate(settings, asked, tiny_target.text)
    assert regenerated(settings, asked)
    assert not regenerated(through(stub, allowed_failures=0.04), asked)
    summary = json.loads((asked / SUMMARY).read_bytes())
    assert (summary["answers"], summary["failed"], summary["tokenised_again"]) == (23, 1, 0)
    record(settings, asked, tiny_target)
    store = Store(asked / "store")
    prompts = [json.loads(line)["id"] for line in (asked / "conversations" / "prompts.jsonl").open()]
    assert sorted(store[at].id for at in range(len(store))) == sorted(set(prompts) - {"train-3"})


def test_retries_come_to_an_end(asked: Path, through: Through, serve: Serve, tiny_target: Target) -> None:
    stub = serve()
    bad = prompt_of("train-3", asked, tiny_target)
    stub.trouble = lambda request: (500, "poison") if request["prompt"] == bad else None
    with pytest.raises(Incomplete, match=r"1 of 24 .* train-3 \(.* says 500: poison\)"):
        regenerate(through(stub, retries=2), asked, tiny_target.text)
    assert sum(request["prompt"] == bad for request in stub.requests) == 3
    assert len(read_answers(asked / ANSWERS)) == 23


def test_text_alone_is_tokenised_again_and_told(
    asked: Path,
    through: Through,
    serve: Serve,
    tiny_target: Target,
    brief: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = serve()
    stub.ids = False
    stub.trouble = lambda request: (400, "what is top_k?") if "top_k" in request else None
    regenerate(through(stub), asked, tiny_target.text)
    answers, tokenizer = read_answers(asked / ANSWERS), tiny_target.tokenizer
    assert not any(answer.exact for answer in answers)
    assert json.loads((asked / SUMMARY).read_bytes())["tokenised_again"] == 24
    for answer in answers:
        assert answer.said[-1] == tokenizer.eos_token_id
        assert answer.finish == "stop"
        start = answer.turns[0][0]
        if answer.temperature == 0.0:
            said = tiny_target.generate([answer.ids[:start]], [0.0], 8, [0])[0].ids
            assert tokenizer.decode(answer.said[:-1]) == tokenizer.decode(said, skip_special_tokens=True)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(stub.url)]
    assert sorted(told) == [
        f"{stub.url} returns text and no token ids: it is tokenised again, and marked as not exact",
        f"{stub.url} takes no parameters but OpenAI's own: see that it cuts no tokens off by itself",
    ]


def test_the_model_of_the_servers(asked: Path, through: Through, serve: Serve, tiny_target: Target) -> None:
    one, two = serve(), serve()
    one.models = two.models = ["first", "other"]
    with pytest.raises(
        UserError, match="regenerate.served_model = third: .* has no such model; choose one of first, other"
    ):
        regenerate(through(one, two, served_model="third"), asked, tiny_target.text)
    assert one.requests + two.requests == []
    regenerate(through(one, two, served_model="other"), asked, tiny_target.text)
    assert {request["model"] for stub in (one, two) for request in stub.requests} == {"other"}
    one.models = []
    (asked / ANSWERS).unlink()
    with pytest.raises(UserError, match="it lists no models; give the address of an OpenAI-compatible server"):
        regenerate(through(one), asked, tiny_target.text)


def test_an_endpoint_goes_and_another_comes_back(
    asked: Path,
    through: Through,
    serve: Serve,
    tiny_target: Target,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One dies in the middle of its requests; the other works on, and waits for its return."""
    one, two, back = serve(), serve(), threading.Event()
    revived: list[Any] = []
    gone = threading.Thread(target=one.stop)

    def dying(request: dict[str, Any]) -> Any:
        if len(one.requests) < 4:
            return None
        if len(one.requests) == 4:
            gone.start()
        return "drop"

    def waiting(request: dict[str, Any]) -> Any:
        if len(two.answered) == 12 and not revived:
            gone.join()
            time.sleep(0.2)  # the keeper of the dead one looks for it in vain
            revived.append(serve(one))
            revived[0].trouble = lambda request: back.set()
        if len(two.answered) >= 12:
            back.wait(5)
            time.sleep(0.01)

    one.trouble, two.trouble = dying, waiting
    regenerate(through(one, two, concurrency=1, retries=3), asked, tiny_target.text)
    assert len(read_answers(asked / ANSWERS)) == 24
    assert back.is_set()
    assert len(one.answered) == 3
    assert len(two.answered) >= 12
    assert len(one.answered) + len(two.answered) + len(revived[0].answered) == 24
    said = capsys.readouterr().err
    assert f"{one.url} cannot be reached" in said
    assert f"{one.url} answers again" in said


def test_when_nobody_answers_any_more(asked: Path, through: Through, serve: Serve, tiny_target: Target) -> None:
    stub = serve()
    gone = threading.Thread(target=stub.stop)

    def dying(request: dict[str, Any]) -> Any:
        if len(stub.requests) == 4:
            gone.start()
        return "drop" if len(stub.requests) >= 4 else None

    stub.trouble = dying
    settings = through(stub, concurrency=1, timeout_s=0.4)
    said = "no endpoint has answered for 0.4 s .*cannot be reached.*; 3 of the 24 conversations .* are done: run eagle3"
    with pytest.raises(Incomplete, match=said) as caught:
        regenerate(settings, asked, tiny_target.text)
    assert caught.value.exit_code == 3
    assert len(read_answers(asked / ANSWERS)) == 3
    assert len(read_failures(asked / FAILED)) == 1  # the one that broke off
    again = serve()  # elsewhere: that is no other recipe
    regenerate(through(again), asked, tiny_target.text)
    assert len(again.requests) == 21
    assert len(read_answers(asked / ANSWERS)) == 24


def test_a_busy_server_costs_no_retries(asked: Path, through: Through, serve: Serve, tiny_target: Target) -> None:
    stub, seen = serve(), Counter[str]()

    def busy(request: dict[str, Any]) -> Any:
        seen[str(request["prompt"])] += 1
        return (429, "busy") if seen[str(request["prompt"])] <= 3 else None

    stub.trouble = busy
    regenerate(through(stub, retries=0, concurrency=4), asked, tiny_target.text)
    assert len(read_answers(asked / ANSWERS)) == 24


def test_a_signal_does_not_wait_for_requests_in_flight(
    asked: Path, through: Through, serve: Serve, tiny_target: Target
) -> None:
    stub, end = serve(), threading.Event()

    def slow(request: dict[str, Any]) -> None:
        if len(stub.requests) > 5:
            os.kill(os.getpid(), signal.SIGTERM)
            end.wait(20)

    stub.trouble = slow
    started = time.monotonic()
    with pytest.raises(Interrupted, match=r"\d of 24 answers are written; resume with: eagle3 regenerate"):
        regenerate(through(stub, concurrency=1), asked, tiny_target.text)
    end.set()
    assert time.monotonic() - started < 10
    stub.trouble = lambda request: None
    regenerate(through(stub), asked, tiny_target.text)
    assert len(read_answers(asked / ANSWERS)) == 24


def test_killed_again_and_again(
    asked: Path, finished: Path, through: Through, serve: Serve, tiny_target: Target
) -> None:
    stub = serve()
    stub.trouble = lambda request: time.sleep(0.01)
    settings, kept = through(stub, concurrency=2), [0]
    for requests in (4, 8, 13):
        process = fork.Process(target=regenerate, args=(settings, asked, tiny_target.text))
        process.start()
        until = len(stub.requests) + requests
        while len(stub.requests) < until:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kept.append((asked / ANSWERS).read_bytes().count(b"\n"))
    assert 0 < kept[1] < kept[2] < kept[3] < 24
    regenerate(settings, asked, tiny_target.text)
    answers = read_finished(asked / "conversations", 1000)
    assert len(read_answers(asked / ANSWERS)) == len(answers) == 24
    greedy = {answer.id: answer for answer in read_answers(finished / ANSWERS) if answer.temperature == 0.0}
    assert {answer.id: answer for answer in answers if answer.id in greedy} == greedy


def test_servers_do_not_go_on_with_what_was_begun_in_process(
    asked: Path, recipe: Settings, through: Through, serve: Serve, tiny_target: Target
) -> None:
    regenerate(recipe, asked, tiny_target)
    with pytest.raises(UserError, match='regenerate.endpoints = "servers": .* was made with "none"; set it back'):
        regenerate(through(serve()), asked, tiny_target.text)


def test_the_command_loads_no_weights_and_says_what_failed(
    through: Through,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = serve()
    stub.trouble = lambda request: (400, "too hard") if len(stub.requests) == 5 else None
    save(replace(through(stub, concurrency=1), run=RunSettings(name="it", root=str(tmp_path))), tmp_path / "it.yaml")
    monkeypatch.setattr("eagle3.models.target.load_target", None)
    assert main(["prepare", str(tmp_path / "it.yaml")]) == 0
    assert main(["regenerate", str(tmp_path / "it.yaml"), "regenerate.retries=0"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: 1 of 24 conversations have no answer, the first ")
    assert said[-2].startswith("regenerate 24/24 conversations, 1 failed, ")
    assert main(["regenerate", str(tmp_path / "it.yaml")]) == 0
    assert main(["regenerate", str(tmp_path / "it.yaml"), "regenerate.endpoints=http://127.0.0.1:1"]) == 0
    assert len(stub.requests) == 25


def test_a_bug_in_a_thread_is_one_of_the_command(
    asked: Path, through: Through, serve: Serve, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = Dialogue.say, [2, 1, 0]
    monkeypatch.setattr(Dialogue, "say", lambda *arguments: 1 / left.pop(0) and real(*arguments))
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    with pytest.raises(ZeroDivisionError):
        regenerate(through(serve(), concurrency=1), asked, tiny_target.text)
    assert len(read_answers(asked / ANSWERS)) == 2  # what came before it is kept


def test_a_targets_text_needs_no_weights(recipe: Settings, tiny_target: Target, tmp_path: Path) -> None:
    assert load_text(recipe.target)[1:] == tiny_target.text[1:]
    bare = shutil.copytree(recipe.target.path, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (bare / "generation_config.json").unlink(missing_ok=True)
    found = load_text(recipe.target.__class__(path=str(bare)))
    assert found[1:] == tiny_target.text[1:]
    assert tokenizer_hash(found.tokenizer) == tokenizer_hash(tiny_target.tokenizer)
