"""Where a Serve replica's lines go: into the log that Serve keeps for that replica.

Serve gives handlers to its own logger alone, so what any other logger of the process says at INFO
would be lost. Knows nothing of what is said.
"""

import logging

_SERVE = logging.getLogger("ray.serve")
_OWN_LOGGERS = ("cluster", "engine")


def log_into_serve(level: str | None) -> None:
    """Write what this project's modules log into this replica's file.

    Args:
        level: From which level upwards, as `--log-level` has it, in any case; None for Serve's own
            level, which `logging_config` sets.
    """
    for name in _OWN_LOGGERS:
        logger = logging.getLogger(name)
        # Below Serve's logger, whatever handlers and level it has by the time of a line. Its level
        # does not hold for lines that come from below: --log-level may let more through.
        logger.parent = _SERVE
        logger.propagate = True
        logger.setLevel(level.upper() if level else logging.NOTSET)


def leave_out_calls(method: str) -> None:
    """Keep Serve's line for each call of a method out of this replica's access log."""
    start = f"CALL {method} "
    _SERVE.addFilter(
        lambda record: (
            # Serve's mark of such lines.
            not getattr(record, "serve_access_log", False)
            or not record.getMessage().startswith(start)
        )
    )
