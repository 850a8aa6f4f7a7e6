"""Where a Serve replica's lines go: into the log that Serve keeps for that replica.

Serve gives handlers to its own logger alone, so what any other logger of the process says at INFO
would be lost. Knows nothing of what is said.
"""

import logging

_SERVE = logging.getLogger("ray.serve")
_OWN_LOGGERS = ("cluster", "engine")


def log_into_serve(level: str) -> None:
    """Write what this project's modules log into this replica's file, from `level` upwards.

    Args:
        level: As `--log-level` has it, in any case.
    """
    for name in _OWN_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.propagate = False
        logger.handlers = [_ServeHandler()]


class _ServeHandler(logging.Handler):
    """Hands records on to Serve's logger, whatever handlers it has by then."""

    def emit(self, record: logging.LogRecord) -> None:
        # Not `log`: Serve's own level would drop what --log-level lets through.
        _SERVE.handle(record)
