"""One vLLM server that runs the target over token ids, and hands over its hidden states in a file.

The answer to a request names the file. The server writes it under an exclusive lock on ``<file>.lock``, which is there
before the answer is.

Shapes: T tokens, S captured states (the layers' and the last, which is before the final norm), H hidden, V vocabulary.
"""

from __future__ import annotations

import fcntl
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..configs.errors import UserError
from ..models.target_files import TargetEnds
from .client import Client, Trouble

POLL_S = 0.005  # between looks at a lock
GRACE_S = 10.0  # until a file that another machine has made must be seen here
PREFIX_CACHING = re.compile(r'^vllm:cache_config_info\{.*enable_prefix_caching="True"', re.MULTILINE)
GREETING = 64  # tokens of the first sequence on which a server must prove itself
LOGPROB_TOLERANCE = 0.2  # mean difference; bfloat16 rounds logits of 32 to 0.125, and another layer's are off by more


class Unavailable(Exception):
    """A server failed, and may be well again later, or another server instead of it."""


@dataclass(frozen=True)
class Capture:
    """What is asked of every server.

    ``name``: under which it serves. ``states``: S. ``folder``: where its files are found. ``command()`` starts it; to say
    how takes a look at all conversations.
    """

    ends: TargetEnds
    name: str
    states: int
    folder: Path
    patience_s: float
    command: Callable[[], str]


class VllmServer:
    """The server at ``url``; any number of threads may ask it at once."""

    def __init__(self, url: str, capture: Capture) -> None:
        self._client, self._capture = Client(url, capture.patience_s, self._meaning), capture
        self.url = self._client.url
        self._longest = 0  # how many tokens it takes, once it has proved itself
        self._lost = False

    def states(self, ids: np.ndarray, request: str) -> Tensor:
        """``[T, S, H]`` over ``ids`` ``[T]``, as vLLM captures them; ``request`` is a part of the file's name.

        Raises:
            Unavailable: it does not answer, or ended while it did.
            UserError: it is not such a server, or its states are not what was asked for.
        """
        longest = self._longest or self._greet(ids[:GREETING], f"{request}-greeting")
        if len(ids) >= longest:
            problem = f"it takes {longest - 1:,} tokens, and a conversation has {len(ids):,}"
            raise self.refused(problem, "start it with a larger --max-model-len, or record shorter conversations")
        return self._read(self._complete(ids, request), ids)

    def lost(self, failure: Unavailable) -> None:
        """Note that it failed, and say so the first time; it must prove itself anew."""
        self._longest = 0
        if not self._lost:
            self._lost = True
            print(f"record: {self.url}: {failure}; trying again", file=sys.stderr, flush=True)

    def _greet(self, ids: np.ndarray, request: str) -> int:
        """Refuse a server with other layers, another model or another last state; the rest shows in every answer.

        Returns:
            How many tokens it takes, its own answer of one included.
        """
        served: dict[str, Any] = {model["id"]: model.get("max_model_len") for model in self._client.models()}
        if not any(served.values()):
            raise self.refused("it is no vLLM server")
        if self._capture.name not in served:
            raise self.refused(f"it serves {', '.join(served)} and not {self._capture.name}")
        if PREFIX_CACHING.search(self._client.text("/metrics")):
            raise self.refused("it caches prefixes, and states of cached tokens may be missing")
        answer = self._complete(ids, request, prompt_logprobs=0)
        logits_TV = self._capture.ends.logits(self._capture.ends.norm(self._read(answer, ids)[:-1, -1]))
        ours = logits_TV.float().log_softmax(-1).gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0]
        said = answer["choices"][0]["prompt_logprobs"][1:]
        theirs = torch.tensor([at[str(token)]["logprob"] for at, token in zip(said, ids[1:].tolist(), strict=True)])
        difference = (ours - theirs).abs().mean().item() if len(said) else 0.0
        if not difference <= LOGPROB_TOLERANCE:
            problem = f"log-probabilities from its last state differ from its own by {difference:.2g} in the mean"
            raise self.refused(f"{problem}: it runs another model, or its last state is another layer's")
        self._longest, self._lost = served[self._capture.name], False
        return int(served[self._capture.name])

    def _complete(self, ids: np.ndarray, request: str, **more: int) -> Any:
        """The answer to ``ids``, which it must repeat, with the name of a file in it."""
        body = {"model": self._capture.name, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0}
        answer = self._client.json("/v1/completions", body | {"return_token_ids": True} | more, request)
        if not (answer.get("kv_transfer_params") or {}).get("hidden_states_path"):
            raise self.refused("it answers without hidden states: it was started without their connector")
        if answer["choices"][0].get("prompt_token_ids") != ids.tolist():
            raise self.refused("it does not repeat the token ids that it was given", "take vLLM 0.32 or later")
        return answer

    def _read(self, answer: Any, ids: np.ndarray) -> Tensor:
        """The states ``[T, S, H]`` in the file that ``answer`` names, which is then gone."""
        named = answer["kv_transfer_params"]["hidden_states_path"]
        path = self._capture.folder / Path(named).name
        lock = path.with_name(f"{path.name}.lock")
        try:
            try:
                self._await_lock(lock, named)
                with path.open("rb"):  # the reader says of any file that it cannot open that there is none
                    tensors = load_file(path)  # mapped, so that it outlives its name
            finally:
                path.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        except (FileNotFoundError, SafetensorError) as error:
            raise Unavailable("it ended before its states were written") from error
        except PermissionError as error:
            remedy = "run recorder and servers as the same user"
            raise UserError("record.states_folder", self._capture.folder, str(error), remedy) from error
        return self._checked(tensors, ids)

    def _await_lock(self, lock: Path, named: str) -> None:
        """Wait until the server lets go of the lock, which it does when it has written, and when it ends."""
        start = time.monotonic()
        while not lock.exists():
            if time.monotonic() - start > GRACE_S:
                problem = f"the states that {self.url} says are in {Path(named).parent} are not there"
                remedy = "give that folder as it is seen from here, on a file system that both share"
                raise UserError("record.states_folder", self._capture.folder, problem, remedy)
            time.sleep(POLL_S)
        with lock.open() as file:
            while True:
                try:
                    return fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() - start > self._capture.patience_s:
                        raise Unavailable("it does not finish writing its states") from None
                    time.sleep(POLL_S)

    def _checked(self, tensors: dict[str, Tensor], ids: np.ndarray) -> Tensor:
        """Refuse states of other tokens, of another shape or dtype, and those that were never computed."""
        states_TSH, ends = tensors["hidden_states"], self._capture.ends
        expected = (len(ids), self._capture.states, ends.info.hidden_size)
        dtype = ends.head.norm_weight.dtype
        if tensors["token_ids"].tolist() != ids.tolist():
            raise self.refused("its states are those of other tokens")
        if states_TSH.shape != expected:
            raise self.refused(f"its states are {tuple(states_TSH.shape)} and not {expected} (tokens, layers, width)")
        if states_TSH.dtype != dtype:
            raise self.refused(f"its states are {states_TSH.dtype} and not {dtype}")
        largest_TS = states_TSH.abs().amax(-1)
        if not largest_TS.isfinite().all():
            raise self.refused("its states are not finite", "check its dtype and its quantisation")
        if (largest_TS == 0).any():
            raise self.refused("its states are zero for some tokens, as they are for those that it has cached")
        return states_TSH

    def _meaning(self, trouble: Trouble) -> Exception:
        return Unavailable(f"it {trouble}") if trouble.transient else self.refused(f"it {trouble}", "see its log")

    def refused(self, problem: str, remedy: str | None = None) -> UserError:
        """What the user is told; the remedy is to start it as the recipe needs it, unless another is given."""
        return UserError("record.endpoints", self.url, problem, remedy or f"start it as: {self._capture.command()}")
