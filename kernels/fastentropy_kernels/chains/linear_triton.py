"""GPU: two linear layers in one kernel. The values between them stay in registers."""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from fastentropy_kernels.activations_triton import activate
from fastentropy_kernels.chains.tiles_triton import dot, load_tile, load_transposed


@triton.jit
def linear_pair_kernel(
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    residual_ptr,
    y_ptr,
    rows,
    inputs,
    hidden,
    outputs,
    x_row_stride,
    residual_row_stride,
    parameters,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Write activation(linear2(linear1(x)) + residual) to y.

    One program computes BLOCK_ROWS whole rows of y. It first computes all hidden values of these rows and rounds them to the
    dtype of x, in which the second product takes them. It then computes y in blocks of BLOCK_OUTPUTS columns.

    Args:
        x_ptr: `[rows, inputs]`, float32, bfloat16 or float16, with row stride `x_row_stride` and column stride 1. All other
            tensors have its dtype.
        weight1_ptr: `[hidden, inputs]`, contiguous.
        bias1_ptr: `[hidden]`, contiguous, or None.
        weight2_ptr: `[outputs, hidden]`, contiguous.
        bias2_ptr: `[outputs]`, contiguous, or None.
        residual_ptr: `[rows, outputs]`, with row stride `residual_row_stride` and column stride 1, or None.
        y_ptr: `[rows, outputs]`, contiguous.
        rows: number of rows of x, of the residual and of y.
        inputs: number of columns of x.
        hidden: number of hidden values of a row, at most BLOCK_HIDDEN.
        outputs: number of columns of y.
        x_row_stride: distance between two rows of x, in values.
        residual_row_stride: distance between two rows of the residual, in values; 0 without a residual.
        parameters: tuple of the activation's parameters.
        ACTIVATION: name of the activation.
        BLOCK_ROWS: number of rows of a program.
        BLOCK_OUTPUTS: number of columns of y that are computed at a time.
        BLOCK_HIDDEN: number of hidden values of a row, rounded up to a power of two.
        BLOCK_INPUTS: number of columns of x that are summed over at a time.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    unit = tl.arange(0, BLOCK_HIDDEN)
    between = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for first in range(0, inputs, BLOCK_INPUTS):
        input = first + tl.arange(0, BLOCK_INPUTS)
        x = load_tile(x_ptr, row * x_row_stride, inside, input, inputs, 1, True)
        between = dot(x, load_transposed(weight1_ptr, unit, hidden, input, inputs), between)
    if bias1_ptr is not None:
        between += tl.load(bias1_ptr + unit, mask=unit < hidden, other=0).to(tl.float32)[None, :]
    between = between.to(x_ptr.dtype.element_ty)
    for first in range(0, outputs, BLOCK_OUTPUTS):
        output = first + tl.arange(0, BLOCK_OUTPUTS)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        values = dot(between, load_transposed(weight2_ptr, output, outputs, unit, hidden), sums)
        if bias2_ptr is not None:
            values += tl.load(bias2_ptr + output, mask=output < outputs, other=0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            residual = load_tile(residual_ptr, row * residual_row_stride, inside, output, outputs, 1, True)
            values += residual.to(tl.float32)
        y = activate(values, ACTIVATION, parameters, 0.0)
        written = inside[:, None] & (output < outputs)[None, :]
        tl.store(y_ptr + row[:, None] * outputs + output[None, :], y.to(y_ptr.dtype.element_ty), mask=written)
