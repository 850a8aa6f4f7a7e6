"""What a terminal shows: steps, each on a line rewritten in place, and text wrapped as it comes."""

import shutil
import time
from typing import TextIO

NAME_WIDTH = 12
MIN_PERIOD_S = 10.0
"""Where lines cannot be rewritten (a log file), a step under way is shown again this seldom."""


class StepLines:
    """Shows named steps, one at a time. On a terminal in colour; in a file as plain lines.

    Args:
        stream: Where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._name = ""
        self._note = ""
        self._end_note = ""
        self._start_s = 0.0
        self._shown_s = 0.0

    def show(self, name: str, note: str = "", end_note: str = "") -> None:
        """Say what is under way; a new name ends the step before.

        Args:
            name: The step.
            note: How far it has come.
            end_note: What to say in place of the note when it has ended.
        """
        if name != self._name:
            self.done()
            self._name, self._note, self._start_s = name, "", time.monotonic()
            self._shown_s = self._start_s
        self._note = note or self._note
        self._end_note = end_note or self._note
        now_s = time.monotonic()
        if self._is_terminal:
            self._rewrite("…", self._seconds(), "\033[33m")
        elif now_s - self._shown_s >= MIN_PERIOD_S:
            self._stream.write(f"  … {name:<{NAME_WIDTH}}{self._note}\n")
            self._stream.flush()
            self._shown_s = now_s

    def done(self) -> None:
        """End the step under way, if there is one."""
        self._note = self._end_note
        self._end("✓", "\033[32m")

    def failed(self) -> None:
        """End the step under way as one that went wrong."""
        self._end("✗", "\033[31m")

    def _end(self, mark: str, colour: str) -> None:
        if not self._name:
            return
        if self._is_terminal:
            self._rewrite(mark, self._seconds(), colour)
            self._stream.write("\n")
        else:
            line = f"  {mark} {self._name:<{NAME_WIDTH}}{self._note:<48} {self._seconds()}"
            self._stream.write(line + "\n")
        self._stream.flush()
        self._name = ""

    def _rewrite(self, mark: str, seconds: str, colour: str) -> None:
        # Longer notes would wrap, and a wrapped line cannot be rewritten.
        note = self._note if len(self._note) <= 48 else self._note[:47] + "…"
        self._stream.write(
            f"\r\033[K  {colour}{mark}\033[0m {self._name:<{NAME_WIDTH}}{note:<48} "
            f"\033[2m{seconds}\033[0m"
        )
        self._stream.flush()

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._start_s:6.1f} s"


class WrappedText:
    """Writes text that arrives in pieces, broken between words and indented.

    Args:
        stream: Where to write.
        indent: Columns that every line after the first is moved right, and that are taken already
            on the first.
    """

    def __init__(self, stream: TextIO, indent: int) -> None:
        self._stream = stream
        self._indent = indent
        self._width = shutil.get_terminal_size().columns
        self._column = indent
        self._word = ""

    def write(self, text: str) -> None:
        """Show all words of the text so far that are known to be whole."""
        for character in text:
            if character.isspace():
                self._end_word()
                if character == "\n":
                    self._end_line()
                else:
                    self._space()
            else:
                self._word += character
        self._stream.flush()

    def close(self) -> None:
        """Show the last word, and end the line."""
        self._end_word()
        self._stream.write("\n")
        self._stream.flush()

    def _end_word(self) -> None:
        if self._column + len(self._word) >= self._width and self._column > self._indent:
            self._end_line()
        self._stream.write(self._word)
        self._column += len(self._word)
        self._word = ""

    def _end_line(self) -> None:
        self._stream.write("\n" + " " * self._indent)
        self._column = self._indent

    def _space(self) -> None:
        if self._column > self._indent:
            self._stream.write(" ")
            self._column += 1
