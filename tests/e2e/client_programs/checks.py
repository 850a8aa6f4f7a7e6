"""What the clients' programs share: named checks of one server, each told in a line of JSON.

Runs in a client's own environment, so it needs nothing but Python.
"""

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_ERROR_CHARS = 2000


@dataclass(frozen=True)
class Server:
    """Where the server is.

    Attributes:
        url: As clients want it, ending in /v1.
        model: What the server calls the model.
        tokenizer: Directory of the model, for clients that count tokens.
    """

    url: str
    model: str
    tokenizer: str


@dataclass
class Checks:
    """The checks of one program, in the order in which they stand in it."""

    functions: list[Callable[[Server], object]] = field(default_factory=list)

    def __call__(self, function: Callable[[Server], object]) -> Callable[[Server], object]:
        """Take a function for a check: it fails by raising, and what it returns is a note."""
        self.functions.append(function)
        return function

    def main(self) -> int:
        """Run all checks against the server that the arguments name; 1 if one failed."""
        server = Server(*sys.argv[1:])
        has_failed = False
        for function in self.functions:
            name = function.__name__.replace("_", " ")
            try:
                note, error = function(server), None
            except Exception:
                note, error = None, traceback.format_exc()[-MAX_ERROR_CHARS:]
                has_failed = True
            print(json.dumps({"check": name, "error": error, "note": note}), flush=True)
        return int(has_failed)
