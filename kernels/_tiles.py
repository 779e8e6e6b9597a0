"""Device helpers that every kernel shares: where a row is, what its coefficients are, which source comes next.

A *source* is a weight-shaped tensor: source 0 is the base, source k + 1 is delta k. Treating the base as one more
source is what lets a baked task (base coefficient 0) skip it, and a closed gate cost nothing, by the same rule.
"""

import triton
import triton.language as tl


@triton.jit
def pick(pointers, index, dtype: tl.constexpr, TABLE: tl.constexpr):
    """The pointer at ``index``, from a tuple of kernel arguments (TABLE 0) or from an int64 table in memory.

    Selecting among arguments keeps what Triton knows about their alignment, without which no load is 16 bytes
    wide and nothing is pipelined. A table loses it, so TABLE says it: every entry is a multiple of TABLE bytes.
    """
    if TABLE:
        found = at_address(tl.load(pointers + index), dtype, TABLE)
    else:
        found = pointers[0]
        for n in tl.static_range(1, len(pointers)):
            found = tl.where(index == n, pointers[n], found)
    return found


@triton.jit
def at_address(address, dtype: tl.constexpr, power: tl.constexpr):
    """The pointer to ``dtype`` at an int64 address, a multiple of ``power`` bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), power)


@triton.jit
def locate(position, ids_ptr, order_ptr, B, inner, rows_per_sample, MIXED: tl.constexpr, AGAIN: tl.constexpr = False):
    """(row, task) of each position in the grouped order, in which the rows of a task are neighbours.

    Positions run through samples in ``order``; the rows of one sample follow each other. With one weight for all
    rows, positions are rows and the task is 0. What is found AGAIN after a loop takes no registers in it.
    """
    if MIXED:
        sample = tl.load(order_ptr + position // rows_per_sample, volatile=AGAIN)
        within = position % rows_per_sample
        row = ((within // inner).to(tl.int64) * B + sample) * inner + within % inner
        task = tl.load(ids_ptr + sample, volatile=AGAIN).to(tl.int32)
    else:
        row = position.to(tl.int64)
        task = position * 0
    return row, task


@triton.jit
def group_range(group, offsets_ptr, rows_per_sample):
    """Positions [start, stop) of a group in the grouped order: group 0 is the base's, group t + 1 task t's."""
    start = tl.load(offsets_ptr + group) * rows_per_sample
    stop = tl.load(offsets_ptr + group + 1) * rows_per_sample
    return start.to(tl.int32), stop.to(tl.int32)


@triton.jit
def coefficient(source, task, coeffs_ptr, base_coeffs_ptr, K, BAKED: tl.constexpr):
    """float32: what multiplies ``source`` for ``task``, of any shapes that broadcast; task -1 is the base alone.

    Without a table, each task has the source of its own number, and no other.
    """
    if coeffs_ptr is None:
        c = tl.where(source == task, 1.0, 0.0)
    else:
        own = task >= 0
        place = tl.cast(task, tl.int64) * K + (source - 1)
        c = tl.load(coeffs_ptr + place, mask=own & (source > 0) & (source <= K), other=0.0)
        if BAKED:
            of_base = tl.load(base_coeffs_ptr + task + source * 0, mask=own & (source == 0), other=1.0)
        else:
            of_base = 1.0
        c = tl.where(source == 0, of_base, c)
    return c


@triton.jit
def next_source(wanted, sources, after):
    """The first of ``sources`` [N] beyond ``after`` that is ``wanted``; 2**30 if there is none."""
    return tl.min(tl.where(wanted & (sources > after), sources, 1 << 30), axis=0)


@triton.jit
def places(used):
    """[N]: how many are ``used`` (1 or 0) before each that is; -1 for the others."""
    return tl.where(used > 0, tl.cumsum(used, axis=0) - 1, -1)


@triton.jit
def source_at(place, n, candidates, sources, K, dtype: tl.constexpr, TABLE: tl.constexpr):
    """(source, its pointer): the one of ``candidates`` [N] whose ``place`` is n, by arithmetic on n alone.

    The table's addresses do not depend on n, and are read before the loop that this is called in.
    """
    mine = place == n
    source = tl.max(tl.where(mine, candidates, 0), axis=0)
    if TABLE:
        addresses = tl.load(sources + candidates, mask=candidates <= K, other=0)
        found = at_address(tl.max(tl.where(mine, addresses, 0), axis=0), dtype, TABLE)
    else:
        found = pick(sources, source, dtype, TABLE)
    return source, found


@triton.jit
def inside(index, size):
    """``index`` with positions past the end moved to 0: read twice, stored never, and no mask in the inner loop.

    Stating contiguity is what keeps the loads vectorised: a clamp hides it from the compiler.
    """
    return tl.max_contiguous(tl.multiple_of(tl.where(index < size, index, 0), index.shape[0]), index.shape[0])


@triton.jit
def weighted(coeffs, product):
    """coeffs · product, and exactly 0 where the coefficient is: another task's NaN stays its own."""
    return tl.where(coeffs != 0.0, coeffs * product, 0.0)


@triton.jit
def rounds(step, PRECISION: tl.constexpr, dtype: tl.constexpr):
    """Whether a product is added to the sum after this step though it goes on, as exact float32 is every eighth.

    One running sum of thousands of products loses more bits than the vendor's, which add up in parts.
    """
    return (step % 8 == 7) & (dtype == tl.float32 and PRECISION == "ieee")
