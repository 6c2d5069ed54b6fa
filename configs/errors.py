"""How a command of this project ends when it does not end well.

=========  ===========================================================================
exit code  meaning
=========  ===========================================================================
0          done
2          a user's mistake: one line, ``error: <setting> = <value>: <what is wrong>; <what to do>``
3          finished, but incomplete, or a requested check failed
75         interrupted and resumable (``EX_TEMPFAIL``, which Slurm's requeue understands)
=========  ===========================================================================
"""

from __future__ import annotations


class Eagle3Error(Exception):
    """An end that is not a bug: printed as one line, without a traceback, with its own exit code."""

    exit_code: int


class UserError(Eagle3Error):
    """Something the user gave is wrong.

    Args:
        setting: the dotted name of the setting, or what the user would call the thing.
        value: its value, shown as it was given.
        problem: what is wrong with it.
        remedy: what to do about it, in the imperative.
    """

    exit_code = 2

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        self.problem = problem
        super().__init__(" ".join(f"{setting} = {value}: {problem}; {remedy}".split()))


class Incomplete(Eagle3Error):
    """The command finished, but not all of it succeeded, or a check that was asked for failed."""

    exit_code = 3


class Told(Eagle3Error):
    """Another process, which works together with this one, says why both end; this one has only its exit code.

    Args:
        exit_code: of both.
    """

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("another process has said why")


class Interrupted(Eagle3Error):
    """A signal ended the command after the current unit was saved; the message says how to resume."""

    exit_code = 75
