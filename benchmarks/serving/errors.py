"""What ends a benchmark before it has measured anything."""


class BenchmarkError(Exception):
    """A flag, a file or a server that cannot work; the message says what to change."""
