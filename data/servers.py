"""Several servers of the target, kept busy with conversations, while some of them fail, go away and come back.

    servers = Servers(settings.regenerate, text, say=print)
    for found in servers.answer(questions):    # lists of Answer and Failure, in the order in which they are there
        ...

Each endpoint has a keeper, a thread that finds out whether it is there, and ``concurrency`` workers, which take
conversations from one queue while it is. Trouble sends the endpoint back to its keeper, who looks again after a pause
that doubles until the next success, and the conversation back to the queue, where it keeps the turns that it has. What
is the endpoint's trouble alone (it is away, or busy) costs the conversation none of its retries.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from ..configs.errors import Incomplete, UserError
from ..configs.settings import RegenerateSettings
from ..models.target import TargetText
from .answers import Answer, Failure
from .chat import end_of_turn
from .dialogue import Dialogue, Question
from .endpoints import Endpoint, Failed, Refused, Unavailable, backoff

POLL_S = 0.2  # between looks for answers


@dataclass(eq=False)
class Job:
    """A conversation on its way: how often it failed at its present turn, and why the last time."""

    dialogue: Dialogue
    failed: int = 0
    reason: str = ""

    def failure(self) -> Failure:
        return Failure(self.dialogue.question.conversation.id, len(self.dialogue.turns) + 1, self.reason)


@dataclass(eq=False)
class Standing:
    """How an endpoint is doing: whether its workers may ask it, its troubles since the last success, the words of the last
    one, and when its keeper looks for it again."""

    endpoint: Endpoint
    there: bool = False
    troubles: int = 0
    words: str = ""
    look_at: float = field(default_factory=time.monotonic)


class Servers:
    """The endpoints of a recipe.

    Args:
        settings: the endpoints, and how they are asked.
        text: the target's tokenizer, ends and positions.
        say: told, in a line, when an endpoint is away, or gives text alone.
    """

    def __init__(self, settings: RegenerateSettings, text: TargetText, say: Callable[[str], None]) -> None:
        self._settings, self._text, self._say = settings, text, say
        self._end_of_turn = end_of_turn(text.tokenizer, text.eos_ids)
        self._standings = [Standing(Endpoint(url, settings.timeout_s)) for url in settings.endpoints]
        self._changed = threading.Condition()  # guards what follows
        self._questions: Sequence[Question] = ()
        self._taken = 0  # of the questions, in their order; what comes back goes into the queue
        self._queue: list[tuple[float, int, Job]] = []  # a heap: not before this time, then in turn
        self._number = itertools.count()
        self._unfinished = self._in_flight = 0
        self._success_at = time.monotonic()
        self._closed = self._told_of_text = self._told_of_strictness = False
        self._results: SimpleQueue[Answer | Failure | BaseException] = SimpleQueue()

    def answer(self, questions: Sequence[Question]) -> Generator[list[Answer | Failure], None, None]:
        """Yield what has been answered or given up, several times a second, be it nothing.

        A question is looked at when a worker takes it. Closing the iterator abandons what is in flight.

        Raises:
            UserError: an endpoint is not what the recipe says.
            Incomplete: no endpoint has answered for ``timeout_s``; conversations that had failed are yielded before.
        """
        self._questions = questions
        self._unfinished = left = len(questions)
        self._success_at = time.monotonic()
        for standing in self._standings:
            for work in (self._keep, *[self._work] * min(self._settings.concurrency, left)):
                # Daemons, since a request may take minutes, and an interrupted command ends now.
                threading.Thread(target=self._run, args=(work, standing), daemon=True).start()
        try:
            while left:
                found = self._found()
                left -= len(found)
                yield found
                if not found and self._deserted():
                    yield self._half_done()
                    raise Incomplete(self._farewell(len(questions) - left, len(questions)))
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _found(self) -> list[Answer | Failure]:
        """What has come since the last look; waits a little for the first."""
        found: list[Answer | Failure] = []
        try:
            while True:
                result = self._results.get(timeout=0 if found else POLL_S)
                if isinstance(result, BaseException):
                    if not found:
                        raise result
                    self._results.put(result)  # for the next look: what was found is kept
                    return found
                found.append(result)
        except Empty:
            return found

    def _deserted(self) -> bool:
        with self._changed:
            return not self._in_flight and time.monotonic() - self._success_at > self._settings.timeout_s

    def _half_done(self) -> list[Answer | Failure]:
        """The conversations that have failed, if not yet for good."""
        with self._changed:
            return [job.failure() for _, _, job in self._queue if job.failed]

    def _farewell(self, done: int, asked: int) -> str:
        words = "; ".join(standing.words for standing in self._standings)
        return (
            f"no endpoint has answered for {self._settings.timeout_s:g} s ({words}); {done:,} of the {asked:,} "
            "conversations that were to be answered are done: run eagle3 regenerate again when one is there"
        )

    def _run(self, work: Callable[[Standing], None], standing: Standing) -> None:
        """``work`` in a thread of its own, whose end by an exception is the end of all."""
        try:
            work(standing)
        except UserError as mistake:
            self._results.put(mistake)
        except BaseException as bug:
            self._results.put(bug)
            raise

    # The keeper of an endpoint.

    def _keep(self, standing: Standing) -> None:
        """Look for the endpoint whenever it is not there, after its pause."""
        while self._wait_until_lost(standing):
            try:
                standing.endpoint.find_model(self._settings.served_model)
            except (Unavailable, Failed, Refused) as trouble:
                self._pause(standing, trouble)
            else:
                with self._changed:
                    standing.there = True
                    self._changed.notify_all()

    def _wait_until_lost(self, standing: Standing) -> bool:
        """Wait until it is time to look for the endpoint; False once all is done."""
        with self._changed:
            while not self._over():
                pause = standing.look_at - time.monotonic()
                if not standing.there and pause <= 0:
                    return True
                self._changed.wait(None if standing.there else pause)
            return False

    def _pause(self, standing: Standing, trouble: Exception) -> None:
        """Leave the endpoint alone for a while."""
        with self._changed:
            if standing.there or standing.look_at <= time.monotonic():  # else others had the same trouble a moment ago
                standing.there = False
                standing.troubles, standing.words = standing.troubles + 1, str(trouble)
                pause = backoff(standing.troubles)
                if isinstance(trouble, Unavailable):
                    pause = max(pause, trouble.pause_s)
                standing.look_at = time.monotonic() + pause
                if standing.troubles > 1:  # the first may be a hiccup
                    self._say(f"{trouble}; it is left alone for {pause:.1f} s")
            self._changed.notify_all()

    # The workers of an endpoint.

    def _work(self, standing: Standing) -> None:
        """Answer conversations, one after another, while the endpoint is there."""
        while (job := self._take(standing)) is not None:
            try:
                while not job.dialogue.finish:
                    self._turn(standing, job)
                self._finish(job.dialogue.answer())
            except Refused as refusal:
                job.reason = str(refusal)
                self._finish(job.failure())
            except (Unavailable, Failed) as trouble:
                self._pause(standing, trouble)
                self._put_back(job, trouble)

    def _turn(self, standing: Standing, job: Job) -> None:
        dialogue = job.dialogue
        most, heat = self._settings.max_new_tokens, dialogue.question.temperature
        reply = standing.endpoint.complete(dialogue.ids, most, heat, dialogue.seed)
        ids, exact = reply.ids, reply.ids is not None
        if ids is None:
            ids = self._text.tokenizer(reply.text, add_special_tokens=False).input_ids
            self._tell_of_text(standing.endpoint)
        if standing.endpoint.strict:
            self._tell_of_strictness(standing.endpoint)
        if reply.ended and (not ids or ids[-1] not in self._text.eos_ids):
            ids, exact = [*ids, self._end_of_turn], False
        if not ids:
            raise Failed(f"{standing.endpoint.url} answered nothing")
        dialogue.say(ids, reply.ended, exact)
        job.failed = 0
        with self._changed:
            if standing.troubles > 1:
                self._say(f"{standing.endpoint.url} answers again")
            standing.troubles, self._success_at = 0, time.monotonic()

    def _take(self, standing: Standing) -> Job | None:
        """The next conversation whose time has come, once the endpoint is there; None when all is done.

        One that was not asked yet comes before all that have failed.
        """
        with self._changed:
            while not self._over():
                pause = self._pause_of_next()
                if standing.there and pause is not None and pause <= 0:
                    self._in_flight += 1
                    if self._taken == len(self._questions):
                        return heapq.heappop(self._queue)[2]
                    row, self._taken = self._taken, self._taken + 1
                    break
                self._changed.wait(pause if standing.there else None)
            else:
                return None
        # Read and tokenised while others take theirs.
        return Job(Dialogue(self._questions[row], self._text, self._settings.max_new_tokens))

    def _pause_of_next(self) -> float | None:
        """Seconds until a conversation may be taken; None where all are in flight."""
        if self._taken < len(self._questions):
            return 0.0
        return self._queue[0][0] - time.monotonic() if self._queue else None

    def _put_back(self, job: Job, trouble: Exception) -> None:
        """Try the conversation again later, elsewhere maybe, if it has retries left."""
        job.reason = str(trouble)
        job.failed += isinstance(trouble, Failed)
        if job.failed > self._settings.retries:
            self._finish(job.failure())
            return
        with self._changed:
            self._in_flight -= 1
            ready_at = time.monotonic() + (backoff(job.failed) if job.failed else 0.0)
            heapq.heappush(self._queue, (ready_at, next(self._number), job))
            self._changed.notify_all()

    def _finish(self, result: Answer | Failure) -> None:
        self._results.put(result)
        with self._changed:
            self._in_flight -= 1
            self._unfinished -= 1
            self._changed.notify_all()

    def _over(self) -> bool:
        return self._closed or not self._unfinished

    def _tell_of_text(self, endpoint: Endpoint) -> None:
        with self._changed:
            told, self._told_of_text = self._told_of_text, True
        if not told:
            self._say(f"{endpoint.url} returns text and no token ids: it is tokenised again, and marked as not exact")

    def _tell_of_strictness(self, endpoint: Endpoint) -> None:
        with self._changed:
            told, self._told_of_strictness = self._told_of_strictness, True
        if not told:
            self._say(f"{endpoint.url} takes no parameters but OpenAI's own: see that it cuts no tokens off by itself")
