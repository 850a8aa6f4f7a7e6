"""What the text of a compiled TPU program says of its cost: cycles and collectives.

XLA:TPU writes an estimate of its cycles beside each operation, save for collectives, copies that
run beside the computation, and kernels that it did not write. Counted is what runs when no feature
is asked for: of each condition the branch that is not taken to be true, and no turn of a loop whose
number of turns is read from data.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_NO_ESTIMATE = 2**60
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_COPY = re.compile(r" (?:copy|slice)-(start|done)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_FIRST_BRANCH = re.compile(r" conditional\(.*branch_computations=\{%?([\w.\-]+)")
_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ENTRY = ""
_ATTENTION = "/jit(_attend)/"
"""Of the names of operations in `engine.kernels.attention_pallas`."""


@dataclass(slots=True)
class ProgramCost:
    """Of one program, on one device.

    Attributes:
        cycles: Sum of the operations' estimates.
        attention_cycles: Of these, what lays queries, keys and outputs out for attention's kernels.
        collectives: How many of each kind.
        collective_bytes: Results of those that the computation waits for.
        sent_bytes: What a device sends for these, around a ring of many: of an all-reduce twice its
            result, of others once.
        idle_bytes: Of `collective_bytes`, those beside which no copy is in flight: while it waits
            for the others the memory works, on the next products' weights.
        num_kernels: Calls of kernels, whose cycles are not among `cycles`.
    """

    cycles: int = 0
    attention_cycles: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    collective_bytes: int = 0
    sent_bytes: int = 0
    idle_bytes: int = 0
    num_kernels: int = 0

    def add(self, other: "ProgramCost", times: int = 1) -> None:
        """Add what another computation costs, that many times."""
        self.cycles += times * other.cycles
        self.attention_cycles += times * other.attention_cycles
        for kind, count in other.collectives.items():
            self.collectives[kind] += times * count
        self.collective_bytes += times * other.collective_bytes
        self.sent_bytes += times * other.sent_bytes
        self.idle_bytes += times * other.idle_bytes
        self.num_kernels += times * other.num_kernels


def program_cost(text: str) -> ProgramCost:
    """Read the cost of a program from `jax.stages.Compiled.as_text()`."""
    return _cost_of(_ENTRY, dict(_computations(text)))


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, lines = _ENTRY if found[1] else found[2], []
        elif line == "}" and name is not None:
            yield name, lines
            name = None
        else:
            lines.append(line)


def _cost_of(name: str, computations: dict[str, list[str]]) -> ProgramCost:
    cost = ProgramCost()
    num_in_flight = 0
    for line in computations.get(name, []):
        if (found := _CYCLES.search(line)) and int(found[1]) < _NO_ESTIMATE:
            cost.cycles += int(found[1])
            cost.attention_cycles += int(found[1]) if _ATTENTION in line else 0
        if 'custom_call_target="tpu_custom_call"' in line:
            cost.num_kernels += 1
        if found := _COLLECTIVE.search(line):
            cost.collectives[found[2]] += 1
            if not found[3]:
                num_bytes = _num_bytes(found[1])
                cost.collective_bytes += num_bytes
                cost.sent_bytes += num_bytes * (2 if found[2] == "all-reduce" else 1)
                cost.idle_bytes += 0 if num_in_flight else num_bytes
        elif found := _COPY.search(line):
            num_in_flight += 1 if found[1] == "start" else -1
        if found := _FIRST_BRANCH.search(line):
            cost.add(_cost_of(found[1], computations))
        if (found := _BODY.search(line)) and (turns := _TURNS.search(line)):
            cost.add(_cost_of(found[1], computations), int(turns[1]))
    return cost


def _num_bytes(shapes: str) -> int:
    total = 0
    for kind, bits, sizes in _ARRAY.findall(shapes):
        num_bytes = 1 if kind == "pred" else int(bits) // 8
        for size in filter(None, sizes.split(",")):
            num_bytes *= int(size)
        total += num_bytes
    return total
