"""Lines of a replica's modules on their way into Serve's log."""

import logging
from collections.abc import Iterator

import pytest

from cluster.serve_log import leave_out_calls, log_into_serve


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.name} {record.getMessage()}")


@pytest.fixture
def serve_lines() -> Iterator[list[str]]:
    """What reaches a handler of Serve's own logger, whose level is Serve's default."""
    loggers = [logging.getLogger(name) for name in ("ray.serve", "cluster", "engine")]
    before = [
        (logger.level, logger.propagate, logger.parent, list(logger.handlers), list(logger.filters))
        for logger in loggers
    ]
    lines = Lines()
    loggers[0].handlers = [lines]
    loggers[0].propagate = False
    loggers[0].setLevel(logging.INFO)
    yield lines.texts
    for logger, (level, propagate, parent, handlers, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.parent = propagate, parent
        logger.handlers, logger.filters = handlers, filters


@pytest.mark.parametrize(
    ("level", "levels_shown"),
    [("debug", ["DEBUG", "INFO", "ERROR"]), ("info", ["INFO", "ERROR"]), ("error", ["ERROR"])],
)
def test_a_replica_logs_from_its_own_level_on(
    level: str, levels_shown: list[str], serve_lines: list[str]
) -> None:
    log_into_serve(level)
    log_into_serve(level)  # a second one in the same process says nothing twice
    for name in ("cluster.replica", "engine.core"):
        serve_lines.clear()
        logger = logging.getLogger(name)
        logger.debug("step %d", 1)
        logger.info("step %d", 2)
        logger.error("step %d", 3)
        steps = {"DEBUG": 1, "INFO": 2, "ERROR": 3}
        assert serve_lines == [f"{shown} {name} step {steps[shown]}" for shown in levels_shown]


def test_a_replica_without_a_level_of_its_own_follows_serves(serve_lines: list[str]) -> None:
    log_into_serve("error")
    log_into_serve(None)
    logger = logging.getLogger("cluster.replica")
    for level, expected in ((logging.WARNING, []), (logging.INFO, ["INFO cluster.replica hello"])):
        logging.getLogger("ray.serve").setLevel(level)  # as another logging_config does
        serve_lines.clear()
        logger.info("hello")
        assert serve_lines == expected


def test_serves_line_for_each_call_of_one_method_is_left_out(serve_lines: list[str]) -> None:
    leave_out_calls("describe")
    serve = logging.getLogger("ray.serve")
    serve.info("CALL describe OK 1.0ms", extra={"serve_access_log": True})
    serve.info("CALL generate OK 1.0ms", extra={"serve_access_log": True})
    serve.info("CALL describe is a call")
    assert serve_lines == [
        "INFO ray.serve CALL generate OK 1.0ms",
        "INFO ray.serve CALL describe is a call",
    ]
