"""LLVM text of ragged paged attention over packed pages: flash-style, decodes and chunks alike.

A chunk of work is one kv head for a few tokens; a head's chunks follow each other, so that threads
which work side by side read the same keys. Consecutive tokens of one sequence are a run, whose
query rows (tokens times the heads that share the kv head) go over the sequence's keys together, in
blocks at fixed absolute boundaries. What a row computes does not depend on the rows beside it, and
a block of which it sees nothing leaves its sums untouched to the last bit: so a token's result is
the same in a decode, in a chunk, and in any batch.

Scores are a product with the block's keys as a panel, sums one with its values: see `packed_pages`
for how both lie. Scores are kept in powers of two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.kernels.native.arithmetic import (
    InstructionSet,
    add_products,
    declarations,
    exp2,
    float_constant,
    operand,
    to_bfloat16,
)
from engine.kernels.native.llvm_text import Function, Value, splat, vector
from engine.kernels.native.xla_handler import load_buffer

TOKENS_PER_CHUNK = 8
_SOFTENED_ROWS = 4
# Below every real score, but finite: its difference with itself is 0, not not-a-number.
_LOWEST = -1e30


@dataclass(frozen=True, slots=True)
class PageShape:
    """What a kernel is specialised for.

    Attributes:
        head_dim: H, a multiple of the instruction set's lanes.
        page_size: Tokens in a page, a multiple of the lanes, too.
    """

    head_dim: int
    page_size: int


def attention_source(isa: InstructionSet, shape: PageShape) -> str:
    """Text of @count and @chunk over the buffers

    q            bfloat16 [T, N, H]
    k, v         uint16, packed pages of all layers
    layer        int32 []
    position     int32 [T]; -1 = padding
    row          int32 [T]: whose pages
    pages        int32 [R, pages per sequence]
    window       int32 []: positions seen, one's own included
    scale        float32 []: factor on the scores, times log2(e)
    out          bfloat16 [T, N, H], zeros for padding
    """
    rows = range(1, isa.panel_rows + 1)
    parts = [declarations(isa)]
    parts += [_scores(isa, shape, num_rows) for num_rows in rows]
    parts += [_sums(isa, shape, num_rows) for num_rows in rows]
    parts += [_soften(isa, num_rows) for num_rows in range(1, _SOFTENED_ROWS + 1)]
    parts += [_run(isa, shape), _count(), _chunk(shape)]
    return "".join(parts)


def _block(isa: InstructionSet) -> int:
    """Keys in a block."""
    return isa.panel_outputs


def _scores(isa: InstructionSet, shape: PageShape, num_rows: int) -> str:
    """@scoresN: of N query rows with a block's keys, float32 [N, block].

    %keys are pointers, one per vector of keys, to the first word of each.
    """
    f = Function(f"void @scores{num_rows}(ptr noalias %q, ptr noalias %keys, ptr noalias %out)")
    vectors, rows = range(isa.panel_vectors), range(num_rows)
    keys = [f.load("ptr", "%keys", 8 * number, align=8) for number in vectors]
    zeros = [(isa.floats, "zeroinitializer")] * (num_rows * isa.panel_vectors)
    loop = f.loop(0, shape.head_dim // 2, carried=zeros)
    key_offset = f.mul(loop.index, 4 * shape.page_size)
    weights = [operand(f, isa, "float32", f.load(isa.words, key, key_offset)) for key in keys]
    offset = f.mul(loop.index, 4)
    sums = []
    for row in rows:
        word = f.load("i32", f.at("%q", offset), 2 * shape.head_dim * row)
        x = operand(f, isa, "float32", f.broadcast("i32", word, isa.lanes))
        for number in vectors:
            before = loop.values[row * isa.panel_vectors + number]
            sums.append(add_products(f, isa, "float32", before, weights[number], x))
    for place, total in enumerate(loop.end(*sums)):
        f.store(isa.floats, total, "%out", 4 * isa.lanes * place)
    f.do("ret void")
    return f.text()


def _sums(isa: InstructionSet, shape: PageShape, num_rows: int) -> str:
    """@sumsN: of N rows, float32 [N, H], times their decay, plus weights [N, block] times values.

    %values are pointers, one per vector of keys, to the first pair of each; %valid is how many of
    the block's keys exist: what lies behind them may be anything.
    """
    f = Function(
        f"void @sums{num_rows}(ptr noalias %weights, ptr noalias %values, ptr noalias %decays, "
        "ptr noalias %sums, i64 %valid)"
    )
    rows = range(num_rows)
    num_vectors = math.gcd(shape.head_dim // isa.lanes, isa.panel_vectors)
    vectors = range(num_vectors)
    part = f.loop(0, 4 * shape.head_dim, 4 * isa.lanes * num_vectors)
    starts = []
    for row in rows:
        decay = f.broadcast("float", f.load("float", "%decays", 4 * row), isa.lanes)
        at = f.at("%sums", f.add(part.index, 4 * shape.head_dim * row))
        for number in vectors:
            total = f.load(isa.floats, at, 4 * isa.lanes * number)
            starts.append(f.op(f"fmul {isa.floats} {total}, {decay}"))

    def add_pairs(
        first: Value | int, stop: Value, before: list[Value], mask: int | None
    ) -> list[Value]:
        """Add the products of some pairs of values, of which a mask keeps the first only."""
        pair = f.loop(first, stop, carried=[(isa.floats, value) for value in before])
        per_vector = isa.lanes // 2
        pointer_offset = f.mul(f.div(pair.index, per_vector), 8)
        values = f.op(f"load ptr, ptr {f.at('%values', pointer_offset)}, align 8")
        offset = f.mul(f.rem(pair.index, per_vector), 4 * shape.head_dim)
        at = f.at(values, f.add(offset, part.index))
        weights = []
        for number in vectors:
            words = f.load(isa.words, at, 4 * isa.lanes * number)
            if mask is not None:
                words = f.op(f"and {isa.words} {words}, {splat('i32', mask, isa.lanes)}")
            weights.append(operand(f, isa, "float32", words))
        sums = []
        for row in rows:
            at = f.at("%weights", f.mul(pair.index, 4))
            word = f.load("i32", at, 2 * _block(isa) * row)
            x = operand(f, isa, "float32", f.broadcast("i32", word, isa.lanes))
            for number in vectors:
                total = pair.values[row * num_vectors + number]
                sums.append(add_products(f, isa, "float32", total, weights[number], x))
        return pair.end(*sums)

    whole, pairs = f.div("%valid", 2), f.div(f.add("%valid", 1), 2)
    totals = add_pairs(0, whole, starts, None)
    # The second of the last pair may be beyond what exists.
    totals = add_pairs(whole, pairs, totals, 0xFFFF)
    for row in rows:
        at = f.at("%sums", f.add(part.index, 4 * shape.head_dim * row))
        for number in vectors:
            f.store(isa.floats, totals[row * num_vectors + number], at, 4 * isa.lanes * number)
    part.end()
    f.do("ret void")
    return f.text()


def _soften(isa: InstructionSet, num_rows: int) -> str:
    """@softenN: N rows' scores of a block, float32 [N, block], into weights, bfloat16.

    %bounds are int32 [N, 2]: the first key that a row sees, counted from the block's first, and the
    one behind its last. %best and %total are the rows' highest score so far and the sum of their
    weights. %decays gets the factor on what was summed before this block.
    """
    f = Function(
        f"void @soften{num_rows}(ptr noalias %scores, ptr noalias %weights, ptr noalias %best, "
        "ptr noalias %total, ptr noalias %decays, ptr noalias %bounds, float %scale)"
    )
    bounds = [[f.load("i32", "%bounds", 8 * row + at) for at in (0, 4)] for row in range(num_rows)]
    # Masks cost a sixth of the time, and most blocks are seen whole.
    sees_all = "true"
    for first, stop in bounds:
        starts_before = f.op(f"icmp sle i32 {first}, 0")
        ends_behind = f.op(f"icmp sge i32 {stop}, {_block(isa)}")
        sees_all = f.op(f"and i1 {sees_all}, {f.op(f'and i1 {starts_before}, {ends_behind}')}")
    whole, part = f.new_label(), f.new_label()
    f.branch_if(sees_all, whole, part)
    f.start(whole)
    _soften_seen(f, isa, [[None] * isa.panel_vectors] * num_rows)
    f.start(part)
    _soften_seen(f, isa, [_seen(f, isa, first, stop) for first, stop in bounds])
    return f.text()


def _seen(f: Function, isa: InstructionSet, first: Value, stop: Value) -> list[Value]:
    """Masks, one per vector of a block's keys."""
    starts, stops = (f.broadcast("i32", bound, isa.lanes) for bound in (first, stop))
    masks = []
    for number in range(isa.panel_vectors):
        keys = ", ".join(f"i32 {isa.lanes * number + lane}" for lane in range(isa.lanes))
        is_late = f.op(f"icmp sge {isa.words} <{keys}>, {starts}")
        is_early = f.op(f"icmp slt {isa.words} <{keys}>, {stops}")
        masks.append(f.op(f"and {vector('i1', isa.lanes)} {is_late}, {is_early}"))
    return masks


def _soften_seen(f: Function, isa: InstructionSet, seen: Sequence[Sequence[Value | None]]) -> None:
    """The rest of @softenN, with a mask for each vector of each row's keys, None where all count.

    Rows go through each stage together: alone a row would mostly wait for its own last result.
    """
    lanes, floats, block = isa.lanes, isa.floats, _block(isa)
    rows = range(len(seen))

    def keep(mask: Value | None, value: Value, otherwise: Value) -> Value:
        if mask is None:
            return value
        return f.op(f"select {vector('i1', lanes)} {mask}, {floats} {value}, {floats} {otherwise}")

    scale = f.broadcast("float", "%scale", lanes)
    nothing = splat("float", "0xFFF0000000000000", lanes)
    scores: list[list[Value]] = []
    for row in rows:
        at = f.at("%scores", 4 * block * row)
        scores.append([])
        for number, mask in enumerate(seen[row]):
            score = f.load(floats, at, 4 * lanes * number)
            scores[row].append(keep(mask, f.op(f"fmul {floats} {score}, {scale}"), nothing))
    highest = [scores[row][0] for row in rows]
    for number in range(1, isa.panel_vectors):
        for row in rows:
            highest[row] = f.op(
                f"call {floats} @llvm.maxnum.v{lanes}f32({floats} {highest[row]}, "
                f"{floats} {scores[row][number]})"
            )
    bests = []
    for row in rows:
        in_block = f.op(f"call float @llvm.vector.reduce.fmax.v{lanes}f32({floats} {highest[row]})")
        before = f.load("float", "%best", 4 * row)
        best = f.op(f"call float @llvm.maxnum.f32(float {before}, float {in_block})")
        f.store("float", best, "%best", 4 * row)
        fall = f.broadcast("float", f.op(f"fsub float {before}, {best}"), lanes)
        decay = f.op(f"extractelement {floats} {exp2(f, isa, fall)}, i32 0")
        f.store("float", decay, "%decays", 4 * row)
        kept = f.op(f"fmul float {f.load('float', '%total', 4 * row)}, {decay}")
        f.store("float", kept, "%total", 4 * row)
        bests.append(f.broadcast("float", best, lanes))
    totals: list[Value] = []
    for number in range(isa.panel_vectors):
        for row in rows:
            weight = exp2(f, isa, f.op(f"fsub {floats} {scores[row][number]}, {bests[row]}"))
            weight = keep(seen[row][number], weight, "zeroinitializer")
            place = 2 * block * row + 2 * lanes * number
            f.store(vector("i16", lanes), to_bfloat16(f, isa, weight), "%weights", place)
            if number == 0:
                totals.append(weight)
            else:
                totals[row] = f.op(f"fadd {floats} {totals[row]}, {weight}")
    for row in rows:
        reduced = f"call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32"
        added = f.op(f"{reduced}(float 0.0, {floats} {totals[row]})")
        kept = f.load("float", "%total", 4 * row)
        f.store("float", f.op(f"fadd float {kept}, {added}"), "%total", 4 * row)
    f.do("ret void")


def _run(isa: InstructionSet, shape: PageShape) -> str:
    """@run: consecutive tokens of one sequence, for one kv head.

    %q and %out are the first token's first head of the group; %token is the bytes from one token to
    the next, %group the heads. %keys and %values are the kv head in the layer's page 0, %page the
    bytes from one page to the next.
    """
    f = Function(
        "void @run(ptr %q, ptr %out, i64 %token, i64 %group, i64 %tokens, i64 %position, "
        "ptr %keys, ptr %values, i64 %page, ptr %pages, i64 %window, float %scale)"
    )
    H, block, lanes = shape.head_dim, _block(isa), isa.lanes
    num_rows = f.mul("%tokens", "%group")

    def array(size: int) -> Value:
        return f.op(f"alloca i8, i64 {f.mul(num_rows, size)}, align 64")

    query, scores, weights = array(2 * H), array(4 * block), array(2 * block)
    sums, best, total, decays, bounds = array(4 * H), array(4), array(4), array(4), array(8)
    key_pointers = f.op(f"alloca [{isa.panel_vectors} x ptr], align 64")
    value_pointers = f.op(f"alloca [{isa.panel_vectors} x ptr], align 64")

    token = f.loop(0, "%tokens")
    bytes_ = f.mul("%group", 2 * H)
    source = f.at("%q", f.mul(token.index, "%token"))
    target = f.at(query, f.mul(token.index, bytes_))
    f.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {source}, i64 {bytes_}, i1 false)")
    token.end()
    row = f.loop(0, num_rows)
    f.store("float", float_constant(_LOWEST), best, f.mul(row.index, 4))
    f.store("float", "0.0", total, f.mul(row.index, 4))
    at = f.at(sums, f.mul(row.index, 4 * H))
    for offset in range(0, 4 * H, 4 * lanes):
        f.store(isa.floats, "zeroinitializer", at, offset)
    row.end()

    stop = f.add("%position", "%tokens")
    oldest = f.larger(f.sub(f.add("%position", 1), "%window"), 0)
    first_block = f.mul(f.div(oldest, block), block)
    key = f.loop(first_block, stop, block)
    valid = f.smaller(f.sub(stop, key.index), block)
    for number in range(isa.panel_vectors):
        # Of a vector without any key that exists, the block's first stands in.
        wanted = f.add(key.index, lanes * number)
        exists = f.op(f"icmp slt i64 {wanted}, {stop}")
        place = f.op(f"select i1 {exists}, i64 {wanted}, i64 {key.index}")
        entry, inside = f.div(place, shape.page_size), f.rem(place, shape.page_size)
        page = f.op(f"sext i32 {f.load('i32', '%pages', f.mul(entry, 4))} to i64")
        page_offset = f.mul(page, "%page")
        f.store(
            "ptr", f.at("%keys", f.add(page_offset, f.mul(inside, 4))), key_pointers, 8 * number
        )
        value_offset = f.add(page_offset, f.mul(inside, 2 * H))
        f.store("ptr", f.at("%values", value_offset), value_pointers, 8 * number)

    def for_rows(
        call: str, *arguments: tuple[Value, int], more: str = "", most: int = isa.panel_rows
    ) -> None:
        """Call a function for as many rows at a time as there is one for."""

        def call_at(count: int, index: Value) -> None:
            given = [
                f"ptr {f.at(pointer, f.mul(index, size)) if size else pointer}"
                for pointer, size in arguments
            ]
            f.do(f"call void @{call}{count}({', '.join(given)}{more})")

        f.for_groups(0, num_rows, most, call_at)

    for_rows("scores", (query, 2 * H), (key_pointers, 0), (scores, 4 * block))
    row = f.loop(0, num_rows)
    position = f.add("%position", f.div(row.index, "%group"))
    seen_stop = f.sub(f.add(position, 1), key.index)
    seen_first = f.sub(seen_stop, "%window")
    for place, bound in enumerate((seen_first, seen_stop)):
        inside = f.op(f"trunc i64 {f.larger(f.smaller(bound, block), 0)} to i32")
        f.store("i32", inside, bounds, f.add(f.mul(row.index, 8), 4 * place))
    row.end()
    for_rows(
        "soften",
        (scores, 4 * block),
        (weights, 2 * block),
        (best, 4),
        (total, 4),
        (decays, 4),
        (bounds, 8),
        more=", float %scale",
        most=_SOFTENED_ROWS,
    )
    for_rows(
        "sums",
        (weights, 2 * block),
        (value_pointers, 0),
        (decays, 4),
        (sums, 4 * H),
        more=f", i64 {valid}",
    )
    key.end()

    row = f.loop(0, num_rows)
    reciprocal = f.op(f"fdiv float 1.0, {f.load('float', total, f.mul(row.index, 4))}")
    factor = f.broadcast("float", reciprocal, lanes)
    source = f.at(sums, f.mul(row.index, 4 * H))
    target = f.at("%out", f.mul(f.div(row.index, "%group"), "%token"))
    target = f.at(target, f.mul(f.rem(row.index, "%group"), 2 * H))
    for offset in range(0, H, lanes):
        value = f.op(f"fmul {isa.floats} {f.load(isa.floats, source, 4 * offset)}, {factor}")
        f.store(vector("i16", lanes), to_bfloat16(f, isa, value), target, 2 * offset, align=2)
    row.end()
    f.do("ret void")
    return f.text()


def _count() -> str:
    f = Function("i64 @count(ptr %buffers)")
    f.do(load_buffer("q", 0, 1))
    f.do(load_buffer("k", 1, 3))
    f.do(f"ret i64 {f.mul(_num_tiles(f), '%k.2')}")
    return f.text()


def _num_tiles(f: Function) -> Value:
    return f.div(f.add("%q.0", TOKENS_PER_CHUNK - 1), TOKENS_PER_CHUNK)


def _chunk(shape: PageShape) -> str:
    f = Function("void @chunk(ptr %buffers, i64 %index)")
    names = ("q", "k", "v", "layer", "position", "row", "pages", "window", "scale", "out")
    num_dims = {"q": 2, "k": 3, "pages": 2}
    for index, name in enumerate(names):
        f.do(load_buffer(name, index, num_dims.get(name, 0)))
    H = shape.head_dim
    group = f.div("%q.1", "%k.2")
    tiles = _num_tiles(f)
    head, tile = f.div("%index", tiles), f.rem("%index", tiles)
    token_bytes = f.mul("%q.1", 2 * H)
    head_offset = f.mul(f.mul(head, group), 2 * H)
    head_bytes = 2 * H * shape.page_size
    page_bytes = f.mul("%k.2", head_bytes)
    layer = f.op(f"sext i32 {f.load('i32', '%layer')} to i64")
    base = f.add(f.mul(f.mul(layer, "%k.1"), page_bytes), f.mul(head, head_bytes))
    keys, values = f.at("%k", base), f.at("%v", base)
    window = f.op(f"sext i32 {f.load('i32', '%window')} to i64")
    scale = f.load("float", "%scale")
    first = f.mul(tile, TOKENS_PER_CHUNK)
    stop = f.smaller(f.add(first, TOKENS_PER_CHUNK), "%q.0")

    # Runs: of each token, how many that follow belong to the same row.
    look, run, padding, done, next_, out = (f.new_label() for _ in range(6))
    before = f.label
    f.branch(look)
    f.start(look)
    token = f.op(f"phi i64 [{first}, %{before}], [%token.next, %{next_}]")
    is_more = f.op(f"icmp slt i64 {token}, {stop}")
    f.branch_if(is_more, done, out)
    f.start(done)
    position = f.op(f"sext i32 {f.load('i32', '%position', f.mul(token, 4))} to i64")
    row = f.load("i32", "%row", f.mul(token, 4))
    at = f.add(f.mul(token, token_bytes), head_offset)
    target = f.at("%out", at)
    is_padding = f.op(f"icmp slt i64 {position}, 0")
    f.branch_if(is_padding, padding, run)
    f.start(padding)
    f.do(f"call void @llvm.memset.p0.i64(ptr {target}, i8 0, i64 {f.mul(group, 2 * H)}, i1 false)")
    after_padding = f.add(token, 1)
    f.branch(next_)
    f.start(run)
    following = f.add(token, 1)
    seek, check, is_same, found = (f.new_label() for _ in range(4))
    f.branch(seek)
    f.start(seek)
    end = f.op(f"phi i64 [{following}, %{run}], [%end.next, %{is_same}]")
    in_tile = f.op(f"icmp slt i64 {end}, {stop}")
    f.branch_if(in_tile, check, found)
    f.start(check)
    other = f.load("i32", "%row", f.mul(end, 4))
    other_position = f.load("i32", "%position", f.mul(end, 4))
    same_row = f.op(f"icmp eq i32 {other}, {row}")
    is_token = f.op(f"icmp sge i32 {other_position}, 0")
    both = f.op(f"and i1 {same_row}, {is_token}")
    f.branch_if(both, is_same, found)
    f.start(is_same)
    f.do(f"%end.next = add i64 {end}, 1")
    f.branch(seek)
    f.start(found)
    pages = f.at("%pages", f.mul(f.op(f"sext i32 {row} to i64"), f.mul("%pages.1", 4)))
    f.do(
        f"call void @run(ptr {f.at('%q', at)}, ptr {target}, i64 {token_bytes}, i64 {group}, "
        f"i64 {f.sub(end, token)}, i64 {position}, ptr {keys}, ptr {values}, i64 {page_bytes}, "
        f"ptr {pages}, i64 {window}, float {scale})"
    )
    f.branch(next_)
    f.start(next_)
    f.do(f"%token.next = phi i64 [{after_padding}, %{padding}], [{end}, %{found}]")
    f.branch(look)
    f.start(out)
    f.do("ret void")
    return f.text()
