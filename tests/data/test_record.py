"""Recording: what is in the store is what the target computes, whoever was killed or interrupted on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from eagle3.configs.errors import Incomplete, Interrupted, UserError
from eagle3.configs.limits import check
from eagle3.configs.settings import Settings
from eagle3.data.answers import read_answers, read_finished
from eagle3.data.planning import plan
from eagle3.data.record import record, recorded
from eagle3.data.recorders import TransformersRecorder
from eagle3.data.store import Store
from eagle3.models.native.loading import load_recorded
from eagle3.models.target import Target, TargetOutput, load_target
from eagle3.models.target_files import TargetEnds, load_ends

fork = multiprocessing.get_context("fork")


def test_every_sample_holds_what_the_target_computes(finished: Path, tiny_target: Target) -> None:
    store = Store(finished / "store")
    answers = {answer.id: answer for answer in read_answers(finished / "conversations" / "answers.jsonl")}
    assert sorted(sample.id for sample in store) == sorted(answers)
    for i in range(len(store)):
        sample = store[i]
        said = answers[sample.id]
        ((start, end),) = said.turns
        assert sample.input_ids.tolist() == said.ids
        assert sample.loss_mask.tolist() == [False] * start + [True] * (end - start)
        assert sample[1:4] == (said.source, said.split, said.temperature)
        alone = tiny_target.forward(sample.input_ids[None].long())
        torch.testing.assert_close(sample.features.float(), alone.features[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(sample.last_hidden.float(), alone.last_hidden[0], rtol=1e-2, atol=1e-2)


def test_the_manifest_says_what_the_contract_lists(finished: Path, recipe: Settings, tiny_target: Target) -> None:
    manifest = Store(finished / "store").manifest
    assert manifest.schema == 2
    assert manifest.target["weights_sha256"] == tiny_target.info.weights_sha256
    assert (manifest.target["name"], manifest.target["dtype"]) == (recipe.target.path, "float32")
    assert manifest.target["layers"] == [1, 3, 4]
    assert manifest.last_hidden == "after the final norm"
    assert len(manifest.tokenizer_sha256) == len(manifest.chat_template_sha256) == 64
    assert manifest.dtypes["features"] == manifest.dtypes["last_hidden"] == "bfloat16"
    answers = read_answers(finished / "conversations" / "answers.jsonl")
    assert manifest.samples == len(answers)
    assert manifest.tokens == sum(len(a.ids) for a in answers)
    assert manifest.supervised_tokens == sum(len(a.said) for a in answers)
    assert manifest.greedy_tokens == sum(len(a.said) for a in answers if a.temperature == 0.0)
    assert manifest.disagreeing == 0
    assert len(manifest.shards) > 2


def test_float32_storage_is_exact(answered: Path, recipe: Settings, tiny_target: Target, changed) -> None:
    record(changed("record", features_dtype="float32", last_hidden_dtype="float32"), answered, tiny_target)
    sample = Store(answered / "store")[0]
    alone = tiny_target.forward(sample.input_ids[None].long())
    torch.testing.assert_close(sample.features, alone.features[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last_hidden", ["float8_e4m3fn", "float32"])
def test_fp8_storage_is_the_states_quantised(
    answered: Path, recipe: Settings, tiny_target: Target, changed, last_hidden: str
) -> None:
    chosen = changed("record", features_dtype="float8_e4m3fn", last_hidden_dtype=last_hidden)
    record(chosen, answered, tiny_target)
    store = Store(answered / "store")
    store.check(chosen)
    assert store.verify() == []
    assert store.manifest.dtypes["features"] == "float8_e4m3fn"
    assert store.manifest.dtypes["features_scale"] == "float32"
    assert ("last_hidden_scale" in store.manifest.dtypes) == (last_hidden != "float32")
    for sample in store:
        alone = tiny_target.forward(sample.input_ids[None].long())
        for found, exact in ((sample.features, alone.features[0]), (sample.last_hidden, alone.last_hidden[0])):
            assert found.shape == exact.shape
            assert (
                (found.float() - exact).abs() <= exact.abs() * 0.07 + exact.abs().amax(-1, keepdim=True) * 1e-4
            ).all()


def test_killed_again_and_again(
    answered: Path, finished: Path, recipe: Settings, tiny_target: Target, files_of
) -> None:
    (answered / "store").mkdir()
    for left in (".shard-00001.safetensors.99999.tmp", ".head.safetensors.99999.tmp"):
        (answered / "store" / left).touch()
    killed = 0
    for seconds in (0.005, 0.02, 0.035, 0.05, 0.065, 0.08, 0.04, 0.025, 60):
        process = fork.Process(target=record, args=(recipe, answered, tiny_target))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed > 1
    assert files_of(answered / "store") == files_of(finished / "store")
    assert not list((answered / "store").rglob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_current_shard(
    answered: Path,
    finished: Path,
    recipe: Settings,
    tiny_target: Target,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    files_of,
) -> None:
    real = tiny_target.forward

    def signalled(input_ids: torch.Tensor) -> TargetOutput:
        monkeypatch.undo()  # a second signal would end the process
        os.kill(os.getpid(), number)
        return real(input_ids)

    left = answered / "store" / ".shard-00000.safetensors.99999.tmp"
    left.parent.mkdir()
    left.touch()
    monkeypatch.setattr(tiny_target, "forward", signalled)
    said = r"1 of \d+ shards are recorded; resume with: eagle3 record .*config\.yaml"
    with pytest.raises(Interrupted, match=said) as caught:
        record(recipe, answered, tiny_target)
    assert caught.value.exit_code == 75
    assert len(list((answered / "store").glob("shard-*.safetensors"))) == 1
    assert not left.exists()
    record(recipe, answered, tiny_target)
    assert files_of(answered / "store") == files_of(finished / "store")


def test_resuming_records_only_what_is_missing(
    run_dir: Path, finished: Path, recipe: Settings, tiny_target: Target, monkeypatch: pytest.MonkeyPatch, files_of
) -> None:
    (run_dir / "store" / "shard-00001.safetensors").unlink()
    kept = (run_dir / "store" / "shard-00000.safetensors").stat().st_ino
    assert not recorded(recipe, run_dir)
    record(recipe, run_dir, tiny_target)
    assert (run_dir / "store" / "shard-00000.safetensors").stat().st_ino == kept
    assert files_of(run_dir / "store") == files_of(finished / "store")
    monkeypatch.setattr(tiny_target, "forward", None)  # a complete store is not touched again
    record(recipe, run_dir, tiny_target)
    assert recorded(recipe, run_dir)


def _rank(rank: int, port: int, recipe: Settings, run_dir: Path, target: Target) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    PartialState._reset_state()
    PartialState(cpu=True)  # the ranks meet here
    real, batches = target.forward, []
    target.forward = lambda ids: batches.append(ids) or real(ids)  # type: ignore[method-assign]
    time.sleep(0.2 * rank)  # so that the ranks see different shards missing
    record(recipe, run_dir, target)
    (run_dir / f"rank-{rank}").write_text(f"{len(batches)} of {PartialState().num_processes}")


def test_two_ranks_make_the_same_store(
    answered: Path, finished: Path, recipe: Settings, tiny_target: Target, files_of
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork.Process(target=_rank, args=(r, port, recipe, answered, tiny_target)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        process.kill()
    answers = read_finished(answered / "conversations", tiny_target.info.vocab_size)
    shards = plan([len(answer.ids) for answer in answers], recipe.record)
    shares = [sum(len(batches) for batches in shards[rank::2]) for rank in range(2)]
    assert min(shares) > 0
    assert [(answered / f"rank-{rank}").read_text() for rank in range(2)] == [f"{share} of 2" for share in shares]
    assert files_of(answered / "store") == files_of(finished / "store")


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda out: out._replace(last_hidden=out.last_hidden * float("nan")), "last_hidden .* not finite"),
        (lambda out: out._replace(captured=tuple(c * 0 for c in out.captured)), "features .* are zero"),
        (lambda out: out._replace(captured=out.captured[:2]), "features .* are .*; the capture is at fault"),
        (lambda out: out._replace(last_hidden=out.last_hidden.roll(1, 1)), "predict other tokens for"),
    ],
)
def test_wrong_states_are_refused(
    answered: Path, recipe: Settings, tiny_target: Target, monkeypatch: pytest.MonkeyPatch, harm, complaint: str
) -> None:
    real = tiny_target.forward
    monkeypatch.setattr(tiny_target, "forward", lambda ids: harm(real(ids)))
    with pytest.raises(Incomplete, match=complaint):
        record(recipe, answered, tiny_target)
    assert not list((answered / "store").glob("shard-*"))


def test_answers_of_another_model_are_refused(answered: Path, recipe: Settings, tiny_target: Target) -> None:
    path = answered / "conversations" / "answers.jsonl"
    (answered / "conversations" / "regenerate.stage.json").unlink()  # as if another tool had written them
    rows = [json.loads(line) for line in path.open()]
    for row in rows:
        start = row["turns"][0][0]
        row["ids"][start:] = [(token + 1) % tiny_target.info.vocab_size for token in row["ids"][start:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(Incomplete, match="the answers are another target's"):
        record(recipe, answered, tiny_target)


def test_another_target_or_recipe_is_refused(
    run_dir: Path, recipe: Settings, tiny_target: Target, monkeypatch: pytest.MonkeyPatch, changed
) -> None:
    with pytest.raises(UserError, match="record.shard_tokens = 99: .* was made with 320; set it back"):
        record(changed("record", shard_tokens=99), run_dir, tiny_target)
    with pytest.raises(UserError, match='record.features_dtype = "float32": .* was made with "bfloat16"'):
        record(changed("record", features_dtype="float32"), run_dir, tiny_target)
    other = tiny_target.info.__class__(**{**tiny_target.info.__dict__, "weights_sha256": "beef"})
    monkeypatch.setattr(tiny_target, "info", other)
    with pytest.raises(UserError, match=f'weights of the target = "beef": .* "{"[0-9a-f]" * 64}"'):
        record(recipe, run_dir, tiny_target)
    shutil.rmtree(run_dir / "store")
    with pytest.raises(UserError, match='weights of the target = "beef": .*conversations was made with'):
        record(recipe, run_dir, tiny_target)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"batch_tokens": 0}, "record.batch_tokens = 0"),
        ({"shard_tokens": -1}, "record.shard_tokens = -1"),
        (
            {"features_dtype": "int8"},
            "record.features_dtype = int8: not supported; choose one of float32, bfloat16, float8",
        ),
        ({"last_hidden_dtype": "fp8"}, "record.last_hidden_dtype = fp8: not supported"),
    ],
)
def test_senseless_settings(values: dict[str, object], complaint: str, changed) -> None:
    with pytest.raises(UserError, match=complaint):
        check(changed("record", **values))


def test_unfinished_answers(answered: Path, recipe: Settings, tiny_target: Target) -> None:
    path = answered / "conversations" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))
    with pytest.raises(UserError, match="3 of 24 answers are missing; run eagle3 regenerate"):
        record(recipe, answered, tiny_target)
    path.unlink()
    with pytest.raises(UserError, match="it holds no answers; run eagle3 regenerate first"):
        record(recipe, answered, tiny_target)


def test_a_truncated_shard_is_not_hidden_by_recording_again(
    run_dir: Path, recipe: Settings, tiny_target: Target
) -> None:
    (run_dir / "store" / "manifest.json").unlink()
    shard = run_dir / "store" / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match="shard-00001.safetensors: it has .* bytes and not"):
        record(recipe, run_dir, tiny_target)


def test_the_targets_ends_are_all_that_recording_needs_beside_a_recorder(
    answered: Path, finished: Path, recipe: Settings, tiny_target: Target, files_of
) -> None:
    record(recipe, answered, load_ends(recipe.target), TransformersRecorder(tiny_target))
    assert files_of(answered / "store") == files_of(finished / "store")


def test_servers_record_where_only_the_ends_are_here(
    answered: Path, tiny_target: Target, changed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Stub(TransformersRecorder):
        def __init__(self, settings: Settings, ends: TargetEnds) -> None:
            super().__init__(tiny_target)
            asked.append((settings.record.endpoints, type(ends)))

    monkeypatch.setattr("eagle3.data.record.VllmRecorder", Stub)
    chosen = changed("record", endpoints=("http://127.0.0.1:1",))
    record(chosen, answered, load_ends(chosen.target))
    assert asked == [(("http://127.0.0.1:1",), TargetEnds)]
    assert Store(answered / "store").verify() == []


MEMBERS = 2  # of each of two groups


def _member(rank: int, port: int, recipe: Settings, run_dir: Path, first_signals: bool) -> None:
    """One of four processes as a launcher starts them; a signal reaches all of them while the first batch is run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    target: Any = (load_recorded if recipe.record.engine == "native" else load_target)(recipe.target, MEMBERS)
    name = "prefill" if recipe.record.engine == "native" else "forward"
    real, batches = getattr(target, name), []

    def run(input_ids: torch.Tensor, *lengths: list[int]) -> TargetOutput:
        batches.append([input_ids.tolist(), *lengths])
        if first_signals and len(batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        found: TargetOutput = real(input_ids, *lengths)
        return found

    setattr(target, name, run)
    code = 0
    try:
        record(recipe, run_dir, target)
    except Interrupted as end:
        code = end.exit_code
    (run_dir / f"rank-{rank}").write_text(json.dumps([code, batches]))


def _together(recipe: Settings, run_dir: Path, port: int, first_signals: bool = False) -> list[tuple[int, list]]:
    """Record in two groups of two processes, which meet at ``port``; returns how each ended and what it ran."""
    given = (port, recipe, run_dir, first_signals)
    processes = [fork.Process(target=_member, args=(rank, *given)) for rank in range(2 * MEMBERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    return [tuple(json.loads((run_dir / f"rank-{rank}").read_text())) for rank in range(4)]


@pytest.mark.parametrize("engine", ["transformers", "native"])
def test_processes_that_hold_the_target_together_record_it(
    answered: Path, tiny_target: Target, changed: Callable[..., Settings], meeting: Callable[[], int], engine: str
) -> None:
    stored = {"features_dtype": "float32", "last_hidden_dtype": "float32"}
    chosen = changed("record", **stored, tensor_parallel=MEMBERS, engine=engine)
    ended = _together(chosen, answered, meeting(), first_signals=True)
    assert [code for code, _ in ended] == [75] * 4
    kept = {path.name: path.stat().st_ino for path in (answered / "store").glob("shard-*.safetensors")}
    assert len(kept) == 2 and not (answered / "store" / "manifest.json").exists()

    ended = _together(chosen, answered, meeting())
    for rank in (0, 2):
        assert ended[rank] == ended[rank + 1]  # the same batches
    assert ended[0][1] != ended[2][1]
    for name, inode in kept.items():
        assert (answered / "store" / name).stat().st_ino == inode
    store = Store(answered / "store")
    assert store.verify() == [] and len(store) == 24
    for sample in store:
        alone = tiny_target.forward(sample.input_ids[None].long())
        for found, exact in ((sample.features, alone.features[0]), (sample.last_hidden, alone.last_hidden[0])):
            assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()

    (answered / "store" / "manifest.json").unlink()  # what is whole but for it computes nothing
    assert [len(batches) for _, batches in _together(chosen, answered, meeting())] == [0] * 4
    assert recorded(chosen, answered)


def test_a_mistake_ends_all_who_hold_the_target(
    answered: Path, changed: Callable[..., Settings], meeting: Callable[[], int]
) -> None:
    """What only the first of a group looks at, here that the answers are whole, lets the others go."""
    path = answered / "conversations" / "answers.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
    chosen = changed("record", tensor_parallel=MEMBERS)
    port = meeting()
    processes = [fork.Process(target=_member, args=(rank, port, chosen, answered, False)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [1, 0, 1, 0]


def test_servers_are_no_processes_that_hold_the_target(changed: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match="record.tensor_parallel = 2: servers record .*; leave one of the two out"):
        check(changed("record", tensor_parallel=2, endpoints=("http://127.0.0.1:1",)))
