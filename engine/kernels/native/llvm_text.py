"""Functions in LLVM's language, written step by step with names and labels made up on the way."""

from collections.abc import Callable, Sequence

Value = str
"""A name, or a constant: what may stand where LLVM wants a value."""


def vector(element: str, lanes: int) -> str:
    """The type of a vector."""
    return f"<{lanes} x {element}>"


def splat(element: str, value: object, lanes: int) -> Value:
    """A constant vector of one value."""
    return "<" + ", ".join([f"{element} {value}"] * lanes) + ">"


class Function:
    """One function's text, appended to in the order of execution.

    Args:
        signature: As in "void @add(ptr %x, i64 %n)".
        is_internal: Whether only this module's functions call it.
    """

    def __init__(self, signature: str, *, is_internal: bool = True) -> None:
        self._lines = [f"define {'internal ' if is_internal else ''}{signature} {{", "entry:"]
        self._num_names = 0
        self.label = "entry"
        """The block that is being written: where values of a loop come from."""

    def text(self) -> str:
        return "\n".join([*self._lines, "}", ""])

    def op(self, instruction: str) -> Value:
        """An instruction with a result."""
        name = f"%{self._name()}"
        self._lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """An instruction without one, or several lines of text."""
        self._lines.append(f"  {instruction}")

    def at(self, pointer: Value, offset: Value | int) -> Value:
        """The pointer that many bytes behind another."""
        return self.op(f"getelementptr i8, ptr {pointer}, i64 {offset}")

    def load(self, kind: str, pointer: Value, offset: Value | int = 0, *, align: int = 4) -> Value:
        return self.op(f"load {kind}, ptr {self.at(pointer, offset)}, align {align}")

    def store(
        self, kind: str, value: Value, pointer: Value, offset: Value | int = 0, *, align: int = 4
    ) -> None:
        self.do(f"store {kind} {value}, ptr {self.at(pointer, offset)}, align {align}")

    def add(self, left: Value | int, right: Value | int) -> Value:
        return self.op(f"add i64 {left}, {right}")

    def sub(self, left: Value | int, right: Value | int) -> Value:
        return self.op(f"sub i64 {left}, {right}")

    def mul(self, left: Value | int, right: Value | int) -> Value:
        return self.op(f"mul i64 {left}, {right}")

    def div(self, left: Value | int, right: Value | int) -> Value:
        return self.op(f"udiv i64 {left}, {right}")

    def rem(self, left: Value | int, right: Value | int) -> Value:
        return self.op(f"urem i64 {left}, {right}")

    def smaller(self, left: Value | int, right: Value | int) -> Value:
        return self.op(f"call i64 @llvm.smin.i64(i64 {left}, i64 {right})")

    def larger(self, left: Value | int, right: Value | int) -> Value:
        return self.op(f"call i64 @llvm.smax.i64(i64 {left}, i64 {right})")

    def broadcast(self, element: str, value: Value, lanes: int) -> Value:
        """A vector of one value."""
        kind = vector(element, lanes)
        first = self.op(f"insertelement {kind} poison, {element} {value}, i32 0")
        return self.op(
            f"shufflevector {kind} {first}, {kind} poison, {vector('i32', lanes)} zeroinitializer"
        )

    def new_label(self) -> str:
        return self._name()

    def start(self, label: str) -> None:
        """Begin a block."""
        self._lines.append(f"{label}:")
        self.label = label

    def branch(self, label: str) -> None:
        self.do(f"br label %{label}")

    def branch_if(self, condition: Value, then: str, otherwise: str) -> None:
        self.do(f"br i1 {condition}, label %{then}, label %{otherwise}")

    def loop(
        self,
        start: Value | int,
        stop: Value | int,
        step: Value | int = 1,
        carried: Sequence[tuple[str, Value]] = (),
    ) -> "Loop":
        """Begin a loop over i64; write its body, then call `Loop.end`.

        Args:
            start: The first index.
            stop: Where it ends, itself left out.
            step: From one index to the next.
            carried: Type and first value of what the body computes anew in each turn.
        """
        return Loop(self, start, stop, step, carried)

    def for_groups(
        self, first: Value | int, count: Value | int, most: int, call: Callable[[int, Value], None]
    ) -> None:
        """Do something for `count` things from `first` on, `most` at a time, then for the rest.

        Args:
            call: Writes it for so many things from that one on.
        """
        whole = self.mul(self.div(count, most), most)
        stop = self.add(first, whole)
        loop = self.loop(first, stop, most)
        call(most, loop.index)
        loop.end()
        behind = self.new_label()
        labels = {size: self.new_label() for size in range(1, most)}
        cases = " ".join(f"i64 {size}, label %{label}" for size, label in labels.items())
        self.do(f"switch i64 {self.sub(count, whole)}, label %{behind} [ {cases} ]")
        for size, label in labels.items():
            self.start(label)
            call(size, stop)
            self.branch(behind)
        self.start(behind)

    def _name(self) -> str:
        self._num_names += 1
        return f"v{self._num_names}"


class Loop:
    """A loop that is being written.

    Attributes:
        index: This turn's.
        values: What the turn before computed; behind the loop, what the last one did.
    """

    def __init__(
        self,
        function: Function,
        start: Value | int,
        stop: Value | int,
        step: Value | int,
        carried: Sequence[tuple[str, Value]],
    ) -> None:
        self._function = function
        self._step = step
        before = function.label
        self._head, body, self._behind = (function.new_label() for _ in range(3))
        function.branch(self._head)
        function.start(self._head)
        # Filled in by `end`: the second pair of each is known only then.
        self._phis = []
        self.index = self._phi("i64", str(start), before)
        self.values = [self._phi(kind, value, before) for kind, value in carried]
        is_more = function.op(f"icmp slt i64 {self.index}, {stop}")
        function.branch_if(is_more, body, self._behind)
        function.start(body)

    def end(self, *values: Value) -> list[Value]:
        """End the body with the values for the next turn; returns what the loop leaves."""
        function = self._function
        following = [function.add(self.index, self._step), *values]
        for line, value in zip(self._phis, following, strict=True):
            function._lines[line] += f", [{value}, %{function.label}]"
        function.branch(self._head)
        function.start(self._behind)
        return self.values

    def _phi(self, kind: str, value: Value, label: str) -> Value:
        name = self._function.op(f"phi {kind} [{value}, %{label}]")
        self._phis.append(len(self._function._lines) - 1)
        return name
