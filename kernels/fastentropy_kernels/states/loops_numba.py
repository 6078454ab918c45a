"""CPU: loops that count the states of values, and compute identity, relu or relu6, or a product with a gate, in the same pass.

A function reads its values either as floats or as the bits of floats in signed integers. The elements of `x` and `y` and every
`value` have the same type.

float32 is read as floats, and its states are three comparisons. The 16-bit formats are read as bits. Without the sign bit, the
pattern 0 is zero, the patterns from 1 to that of infinity are the other numbers, and the larger patterns are NaN. The counters
are then as narrow as the values, which gives the widest vectors. float32 is also read as bits in a thread that flushes
subnormals to zero, because a comparison of floats would count subnormals as zero there.

An activation is written as bits, too. relu clears the bits of a value that is off. relu6 replaces all patterns from that of 6
to that of infinity by that of 6.

`limit` selects the type: it is None for floats. For bits it is the least integer plus the bits of infinity, and is used as
follows. Whether bits lie in a range of patterns takes one addition and one comparison. The addition wraps around and maps the
first pattern of the range to the least integer. The comparison with the mapped end of the range is signed. (Before AVX-512,
x86 has no unsigned comparison of vectors and needs two instructions for one.)
"""

# Functions that Numba compiles have no types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import njit

# How many values may be counted before a 16-bit counter could overflow.
LONGEST_RUN = 1 << 14
# How many values may be counted in one byte. Rows are read in the order of memory, and each pair of rows updates the counters
# of all their columns. As bytes, these counters stay in the first-level cache up to 4,096 channels. Processing the channels in
# blocks would keep more counters there, but it would interrupt the prefetched stream of values.
_LONGEST_BYTE_SUM = 254


@njit(nogil=True)
def count_strip(
    x,
    x_row_stride,
    y,
    y_row_stride,
    gate,
    gate_row_stride,
    mask,
    rows,
    width,
    tile,
    inner,
    limit,
    floor,
    ceiling,
    inplace,
    ready,
):
    """Add the states of a strip of rows to `tile`, and write their activation.

    A row holds `inner` adjacent values of each channel. A row that consists of several folded rows repeats this sequence.

    Args:
        x: flat array of values, starting at the first row of the strip. The activation is written over it if `inplace`.
        x_row_stride: distance between two rows of x, in values.
        y: flat array that receives the activation, or None.
        y_row_stride: distance between two rows of y, in values.
        gate: flat array by which the activation is multiplied, or None. Bits are never multiplied.
        gate_row_stride: distance between two rows of the gate, in values.
        mask: [rows] bool. Rows at which it is false are not counted. None to count all.
        rows: number of rows in the strip.
        width: number of values in a row.
        tile: int64 [3, channels]; the counts of off, zero and on are added to it.
        inner: number of adjacent values of each channel.
        limit: None for floats, or the constant for bits at the head of this file.
        floor: the lower bound of the activation, as for `_activated`.
        ceiling: the upper bound of the activation, as for `_activated`.
        inplace: whether the activation is written over `x`.
        ready: whether y holds the activation already, so that it is only multiplied by the gate.
    """
    sums = np.zeros((3, width), np.uint8)
    uncounted = sums if mask is None else np.zeros((3, width), np.uint8)
    row = summed = 0
    while row < rows:
        x0 = x[row * x_row_stride : row * x_row_stride + width]
        y0 = None if y is None else y[row * y_row_stride : row * y_row_stride + width]
        gate0 = None if gate is None else gate[row * gate_row_stride : row * gate_row_stride + width]
        if mask is None and row + 1 < rows:
            x1 = x[(row + 1) * x_row_stride : (row + 1) * x_row_stride + width]
            y1 = None if y is None else y[(row + 1) * y_row_stride : (row + 1) * y_row_stride + width]
            gate1 = None if gate is None else gate[(row + 1) * gate_row_stride : (row + 1) * gate_row_stride + width]
            _count_two_rows(x0, x1, y0, y1, gate0, gate1, sums, limit, floor, ceiling, inplace, ready)
            row += 2
        else:
            counted = mask is None or mask[row]
            if counted or y is not None or inplace:
                _count_row(x0, y0, gate0, sums if counted else uncounted, limit, floor, ceiling, inplace, ready)
            row += 1
        summed += 2
        if summed == _LONGEST_BYTE_SUM:
            _add_sums(sums, tile, inner)
            summed = 0
    _add_sums(sums, tile, inner)


@njit(nogil=True)
def _count_two_rows(x0, x1, y0, y1, gate0, gate1, sums, limit, floor, ceiling, inplace, ready):
    """Add the states of two rows to their common counters, and write their activation.

    Each counter is read and written once for both rows.

    Args:
        x0: [width] values of the first row.
        x1: [width] values of the second row.
        y0: [width] receives the activation of the first row, or None.
        y1: [width] receives the activation of the second row, or None.
        gate0: [width] the gate of the first row, or None.
        gate1: [width] the gate of the second row, or None.
        sums: uint8 [3, width], the counters of off, zero and on for each column.
        limit: None for floats, or the constant for bits at the head of this file.
        floor: the lower bound of the activation, as for `_activated`.
        ceiling: the upper bound of the activation, as for `_activated`.
        inplace: whether the activation is written over `x0` and `x1`.
        ready: as for `count_strip`.
    """
    off, zero, on = sums[0], sums[1], sums[2]
    for i in range(x0.size):
        a, b = x0[i], x1[i]
        off_a, off_b = _is_off(a, limit), _is_off(b, limit)
        if inplace:
            x0[i] = _activated(a, off_a, limit, floor, ceiling)
            x1[i] = _activated(b, off_b, limit, floor, ceiling)
        elif gate0 is not None:
            y0[i] = (y0[i] if ready else _activated(a, off_a, limit, floor, ceiling)) * gate0[i]
            y1[i] = (y1[i] if ready else _activated(b, off_b, limit, floor, ceiling)) * gate1[i]
        elif y0 is not None:
            y0[i] = _activated(a, off_a, limit, floor, ceiling)
            y1[i] = _activated(b, off_b, limit, floor, ceiling)
        off[i] += np.uint8(off_a + off_b)
        zero[i] += np.uint8(_is_zero(a, limit) + _is_zero(b, limit))
        on[i] += np.uint8(_is_on(a, limit) + _is_on(b, limit))


@njit(nogil=True)
def _count_row(x, y, gate, sums, limit, floor, ceiling, inplace, ready):
    """Add the states of one row to the counters of its columns, and write its activation.

    Args:
        x: [width] values of the row.
        y: [width] receives the activation, or None.
        gate: [width] by which the activation is multiplied, or None.
        sums: uint8 [3, width], the counters of off, zero and on for each column.
        limit: None for floats, or the constant for bits at the head of this file.
        floor: the lower bound of the activation, as for `_activated`.
        ceiling: the upper bound of the activation, as for `_activated`.
        inplace: whether the activation is written over `x`.
        ready: as for `count_strip`.
    """
    off, zero, on = sums[0], sums[1], sums[2]
    for i in range(x.size):
        value = x[i]
        is_off = _is_off(value, limit)
        if inplace:
            x[i] = _activated(value, is_off, limit, floor, ceiling)
        elif gate is not None:
            y[i] = (y[i] if ready else _activated(value, is_off, limit, floor, ceiling)) * gate[i]
        elif y is not None:
            y[i] = _activated(value, is_off, limit, floor, ceiling)
        off[i] += np.uint8(is_off)
        zero[i] += np.uint8(_is_zero(value, limit))
        on[i] += np.uint8(_is_on(value, limit))


@njit(nogil=True)
def _add_sums(sums, tile, inner):
    """Add the counters of columns to the counters of channels, and set the counters of columns to zero.

    Args:
        sums: uint8 `[3, rows * channels * inner]`, the counts of off, zero and on for each column of a row. The row consists
            of `rows` folded rows, each with `inner` adjacent values of each channel.
        tile: int64 `[3, channels]`; the counts are added to it.
        inner: number of adjacent values of each channel.
    """
    channels = tile.shape[1]
    for state in range(3):
        for start in range(0, sums.shape[1], channels * inner):
            row = sums[state, start : start + channels * inner]
            if inner == 1:
                for channel in range(channels):
                    tile[state, channel] += row[channel]
            else:
                for channel in range(channels):
                    plane = row[channel * inner : (channel + 1) * inner]
                    total = 0
                    for i in range(plane.size):
                        total += plane[i]
                    tile[state, channel] += total
    sums[:] = 0


@njit(nogil=True)
def count_run(x, y, gate, mask, limit, floor, ceiling, inplace, ready):
    """Count the states of a run of at most LONGEST_RUN values, and write their activation.

    Args:
        x: [values], contiguous. The activation is written over it if `inplace`.
        y: [values], receives the activation, or None.
        gate: [values], by which the activation is multiplied, or None.
        mask: [values] bool. Values at which it is false are not counted. None to count all.
        limit: None for floats, or the constant for bits at the head of this file.
        floor: the lower bound of the activation, as for `_activated`.
        ceiling: the upper bound of the activation, as for `_activated`.
        inplace: whether the activation is written over `x`.
        ready: as for `count_strip`.

    Returns:
        How many values are off, zero and on.
    """
    off = zero = on = _is_off(x.dtype.type(0), limit)
    narrow = type(off)
    for i in range(x.size):
        value = x[i]
        is_off, is_zero, is_on = _is_off(value, limit), _is_zero(value, limit), _is_on(value, limit)
        if inplace:
            x[i] = _activated(value, is_off, limit, floor, ceiling)
        elif gate is not None:
            y[i] = (y[i] if ready else _activated(value, is_off, limit, floor, ceiling)) * gate[i]
        elif y is not None:
            y[i] = _activated(value, is_off, limit, floor, ceiling)
        if mask is not None:
            is_off, is_zero, is_on = is_off & mask[i], is_zero & mask[i], is_on & mask[i]
        off, zero, on = narrow(off + is_off), narrow(zero + is_zero), narrow(on + is_on)
    return off, zero, on


@njit(nogil=True)
def _activated(value, is_off, limit, floor, ceiling):
    """Return the activation of a value.

    Args:
        value: a float, or the bits of a float.
        is_off: 1 if the value is below zero, else 0. It is used for bits only.
        limit: None for floats, or the constant for bits at the head of this file.
        floor: for floats, the lower bound. For bits, 0 to replace a value that is off by 0, and -1 (all bits set) to keep it.
        ceiling: the upper bound, as a float or as the bits of a float. None for no upper bound.
    """
    kind = type(value)
    if limit is None:
        return _within(value, floor, ceiling)
    kept = kind(value & kind(floor | kind(is_off - kind(1))))
    if ceiling is None:
        return kept
    return ceiling if _is_above(value, ceiling, limit) else kept


@njit(nogil=True)
def _within(value, floor, ceiling):
    """Return a float limited to the interval from `floor` to `ceiling`. NaN stays NaN.

    A ceiling of None means no upper bound.
    """
    raised = floor if value < floor else value
    if ceiling is None:
        return raised
    return ceiling if raised > ceiling else raised


@njit(nogil=True)
def _is_off(value, limit):
    """Return 1 if a value is a number below zero, else 0.

    `limit` is None for a float, and the constant at the head of this file for bits.
    """
    kind = type(value)
    if limit is None:
        return np.int32(value < kind(0))
    return kind(kind(value - kind(1)) < limit)


@njit(nogil=True)
def _is_zero(value, limit):
    """Return 1 if a value is zero of either sign, else 0.

    `limit` is None for a float. For bits, the addition of the value to itself shifts out the sign bit.
    """
    kind = type(value)
    if limit is None:
        return np.int32(value == kind(0))
    return kind(kind(value + value) == 0)


@njit(nogil=True)
def _is_on(value, limit):
    """Return 1 if a value is a number above zero, else 0.

    `limit` is None for a float, and the constant at the head of this file for bits.
    """
    kind = type(value)
    if limit is None:
        return np.int32(value > kind(0))
    return _is_above(value, kind(0), limit)


@njit(nogil=True)
def _is_above(bits, floor, limit):
    """Return 1 if a number is above another one, else 0. NaN is above none.

    Args:
        bits: the bits of the number, as a signed integer.
        floor: the bits of the other number, which is not negative.
        limit: the constant for bits at the head of this file.
    """
    signed = type(bits)
    return signed(signed(bits + signed(np.iinfo(bits).max - floor)) < signed(limit - floor))


@njit(nogil=True)
def ordered(bits, positive):
    """Return an integer for the bits of a float, such that the integers are in the order of the floats.

    -0 becomes -1, just below 0. NaN lies outside the range from -infinity to infinity.

    Args:
        bits: the bits as a signed integer.
        positive: the integer with all bits set but the sign.
    """
    return bits if bits >= 0 else bits ^ positive
