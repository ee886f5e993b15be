"""The one error a user of qpipe is meant to read.

A message says what was asked for, what was found and what to do about it. Several problems found at once are
reported at once. The command line turns a `QpipeError` into one message on stderr and exit code 2; any other
exception is a defect and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence


class QpipeError(ValueError):
    """The user's input is wrong: a study, a file, a name or an option.

    Parameters
    ----------
    problems
        One message, or several that were found together.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
