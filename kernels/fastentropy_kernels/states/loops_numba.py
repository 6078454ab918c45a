"""CPU: loops over values that count their states, with identity, relu or relu6 in the same pass.

The states of float32 are three comparisons. Those of the 16-bit formats are read from the bits, as signed integers. Without
the sign bit, the patterns from 1 to that of infinity are numbers, those above are NaN, and 0 is zero. So the sums are as
narrow as the values, which gives the widest vectors. An activation is written as bits, too: relu clears the bits of what is
off, and relu6 replaces all patterns from that of 6 up to that of infinity by that of 6.

Whether bits lie in such a range is one addition and one comparison: the addition wraps and takes the first pattern of the
range to the least integer. The comparison is signed, because x86 had no unsigned one before AVX-512 and needs two
instructions instead. Where subnormals are flushed, float32 is read from its bits as well, so that flushing changes no count.

In all functions `value` and the elements of `x` and `y` are floats or the bits of floats. `limit` is None for floats. For
bits it is the least integer plus the bits of infinity.
"""

# Functions that Numba compiles have no types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from numba import njit

# How many values are summed before a 16-bit sum could overflow.
LONGEST_RUN = 1 << 14
# How many values are added to a byte. Rows are read in the order of memory, and the sums of all their channels are visited
# once for every two rows. As bytes these sums stay in the first-level cache up to 4,096 channels. Blocks of channels would keep
# more of them there, but break the prefetched stream.
_LONGEST_BYTE_SUM = 254


@njit(nogil=True)
def count_strip(x, x_row_stride, y, y_row_stride, mask, rows, width, tile, inner, limit, floor, ceiling, inplace):
    """Add the states of `rows` rows of `width` values each to `tile`, int64 [state, channel], and write their activation.

    A row holds `inner` values of each channel, channel by channel. Where several rows are read as one, it holds several such
    sequences. `x` and `y` are flat, with rows `x_row_stride` and `y_row_stride` values apart. `mask` is bool [rows] or None.
    For the others see `count_run`.
    """
    sums = np.zeros((3, width), np.uint8)
    uncounted = sums if mask is None else np.zeros((3, width), np.uint8)
    row = summed = 0
    while row < rows:
        x0 = x[row * x_row_stride : row * x_row_stride + width]
        y0 = None if y is None else y[row * y_row_stride : row * y_row_stride + width]
        if mask is None and row + 1 < rows:
            x1 = x[(row + 1) * x_row_stride : (row + 1) * x_row_stride + width]
            y1 = None if y is None else y[(row + 1) * y_row_stride : (row + 1) * y_row_stride + width]
            _count_two_rows(x0, x1, y0, y1, sums, limit, floor, ceiling, inplace)
            row += 2
        else:
            counted = mask is None or mask[row]
            if counted or y is not None or inplace:
                _count_row(x0, y0, sums if counted else uncounted, limit, floor, ceiling, inplace)
            row += 1
        summed += 2
        if summed == _LONGEST_BYTE_SUM:
            _add_sums(sums, tile, inner)
            summed = 0
    _add_sums(sums, tile, inner)


@njit(nogil=True)
def _count_two_rows(x0, x1, y0, y1, sums, limit, floor, ceiling, inplace):
    """Add the states of two rows to the byte sums [state, position] in one visit, and write their activation."""
    off, zero, on = sums[0], sums[1], sums[2]
    for i in range(x0.size):
        a, b = x0[i], x1[i]
        off_a, off_b = _is_off(a, limit), _is_off(b, limit)
        if inplace:
            x0[i] = _activated(a, off_a, limit, floor, ceiling)
            x1[i] = _activated(b, off_b, limit, floor, ceiling)
        elif y0 is not None:
            y0[i] = _activated(a, off_a, limit, floor, ceiling)
            y1[i] = _activated(b, off_b, limit, floor, ceiling)
        off[i] += np.uint8(off_a + off_b)
        zero[i] += np.uint8(_is_zero(a, limit) + _is_zero(b, limit))
        on[i] += np.uint8(_is_on(a, limit) + _is_on(b, limit))


@njit(nogil=True)
def _count_row(x, y, sums, limit, floor, ceiling, inplace):
    """Do for one row what `_count_two_rows` does for two."""
    off, zero, on = sums[0], sums[1], sums[2]
    for i in range(x.size):
        value = x[i]
        is_off = _is_off(value, limit)
        if inplace:
            x[i] = _activated(value, is_off, limit, floor, ceiling)
        elif y is not None:
            y[i] = _activated(value, is_off, limit, floor, ceiling)
        off[i] += np.uint8(is_off)
        zero[i] += np.uint8(_is_zero(value, limit))
        on[i] += np.uint8(_is_on(value, limit))


@njit(nogil=True)
def _add_sums(sums, tile, inner):
    """Add `sums` [state, (row, channel, position of a plane)] to `tile` [state, channel], and clear them."""
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
def count_run(x, y, mask, limit, floor, ceiling, inplace):
    """Return how many of at most LONGEST_RUN values are off, zero and on, and write their activation.

    Args:
        x: [values], contiguous. The activation is written over it if `inplace`.
        y: [values] that receives the activation, or None.
        mask: [values] bool that says which values are counted, or None.
        limit: see the module.
        floor: see `_activated`.
        ceiling: see `_activated`.
        inplace: whether the activation is written over `x`.
    """
    off = zero = on = _is_off(x.dtype.type(0), limit)
    narrow = type(off)
    for i in range(x.size):
        value = x[i]
        is_off, is_zero, is_on = _is_off(value, limit), _is_zero(value, limit), _is_on(value, limit)
        if inplace:
            x[i] = _activated(value, is_off, limit, floor, ceiling)
        elif y is not None:
            y[i] = _activated(value, is_off, limit, floor, ceiling)
        if mask is not None:
            is_off, is_zero, is_on = is_off & mask[i], is_zero & mask[i], is_on & mask[i]
        off, zero, on = narrow(off + is_off), narrow(zero + is_zero), narrow(on + is_on)
    return off, zero, on


@njit(nogil=True)
def _activated(value, is_off, limit, floor, ceiling):
    """Return the activation of a value.

    Floats are clipped to `floor` and `ceiling`. Bits become 0 where the value is off, unless all bits of `floor` are set, and
    `ceiling` where the number is above it. A ceiling of None clips nothing.
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
    """Return a float clipped to the floor and, unless it is None, to the ceiling. NaN stays NaN."""
    raised = floor if value < floor else value
    if ceiling is None:
        return raised
    return ceiling if raised > ceiling else raised


@njit(nogil=True)
def _is_off(value, limit):
    """Return 1 for a number below zero, else 0."""
    kind = type(value)
    if limit is None:
        return np.int32(value < kind(0))
    return kind(kind(value - kind(1)) < limit)


@njit(nogil=True)
def _is_zero(value, limit):
    """Return 1 for zero of either sign, else 0."""
    kind = type(value)
    if limit is None:
        return np.int32(value == kind(0))
    return kind(kind(value + value) == 0)


@njit(nogil=True)
def _is_on(value, limit):
    """Return 1 for a number above zero, else 0."""
    kind = type(value)
    if limit is None:
        return np.int32(value > kind(0))
    return _is_above(value, kind(0), limit)


@njit(nogil=True)
def _is_above(bits, floor, limit):
    """Return 1 for the bits of a number above that with the bits `floor`, which is not negative, else 0."""
    signed = type(bits)
    return signed(signed(bits + signed(np.iinfo(bits).max - floor)) < signed(limit - floor))


@njit(nogil=True)
def ordered(bits, positive):
    """Return the bits of a number as a signed integer in the order of the numbers. -0 is -1, and NaN is beyond infinity."""
    return bits if bits >= 0 else bits ^ positive
