"""GPU: two linear layers in one kernel."""

from __future__ import annotations

# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
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
    middles,
    outputs,
    x_row_stride,
    residual_row_stride,
    parameters,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_MIDDLES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """One program: BLOCK_ROWS whole rows of y. It makes their intermediate once, then y BLOCK_OUTPUTS at a time."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    middle = tl.arange(0, BLOCK_MIDDLES)
    made = tl.zeros((BLOCK_ROWS, BLOCK_MIDDLES), tl.float32)
    for first in range(0, inputs, BLOCK_INPUTS):
        input = first + tl.arange(0, BLOCK_INPUTS)
        x = load_tile(x_ptr, row * x_row_stride, inside, input, inputs, 1, True)
        made = dot(x, load_transposed(weight1_ptr, middle, middles, input, inputs), made)
    if bias1_ptr is not None:
        made += tl.load(bias1_ptr + middle, mask=middle < middles, other=0).to(tl.float32)[None, :]
    made = made.to(x_ptr.dtype.element_ty)
    for first in range(0, outputs, BLOCK_OUTPUTS):
        output = first + tl.arange(0, BLOCK_OUTPUTS)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        values = dot(made, load_transposed(weight2_ptr, output, outputs, middle, middles), sums)
        if bias2_ptr is not None:
            values += tl.load(bias2_ptr + output, mask=output < outputs, other=0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            residual = load_tile(residual_ptr, row * residual_row_stride, inside, output, outputs, 1, True)
            values += residual.to(tl.float32)
        y = activate(values, ACTIVATION, parameters, 0.0)
        written = inside[:, None] & (output < outputs)[None, :]
        tl.store(y_ptr + row[:, None] * outputs + output[None, :], y.to(y_ptr.dtype.element_ty), mask=written)
