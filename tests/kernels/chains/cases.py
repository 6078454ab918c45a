"""Random layers of awkward sizes for the tests of the fused chains."""

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def convolutions(draw):
    """Draw the shapes of x and weight and the arguments of a convolution. A kernel may be larger than its unpadded image."""
    inputs = draw(st.sampled_from([1, 3, 20, 37]))
    depthwise = draw(st.booleans()) and inputs > 1
    outputs = inputs if depthwise else draw(st.sampled_from([1, 5, 37]))
    size = [draw(st.sampled_from([1, 2, 7, 11])) for _ in range(2)]
    kernel = [draw(st.sampled_from([1, 2, 3, 5])) for _ in range(2)]
    stride = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2)]
    dilation = [draw(st.sampled_from([1, 1, 2])) for _ in range(2)]
    missing = [max(0, -(-(d * (k - 1) + 1 - s) // 2)) for d, k, s in zip(dilation, kernel, size, strict=True)]
    padding = [least + draw(st.sampled_from([0, 0, 1, 3])) for least in missing]
    batch = draw(st.sampled_from([1, 2, 3]))
    return {
        "x": (batch, inputs, *size),
        "weight": (outputs, 1 if depthwise else inputs, *kernel),
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": inputs if depthwise else 1,
    }


def output_size(layer):
    """Return height and width by counting the positions at which the kernel lies within the padded image."""
    sizes = []
    for axis in range(2):
        size, kernel = layer["x"][axis + 2], layer["weight"][axis + 2]
        reach = layer["dilation"][axis] * (kernel - 1)
        starts = range(-layer["padding"][axis], size + layer["padding"][axis] - reach, layer["stride"][axis])
        sizes.append(len(starts))
    return tuple(sizes)


def random_tensor(shape, dtype, channels_last=False, gap=0):
    """Return standard normal values. A gap makes a view with unused memory before each pixel, or else before each row."""
    if channels_last:
        batch, channels, height, width = shape
        return random_tensor((batch, height, width, channels), dtype, gap=gap).movedim(-1, 1)
    if not gap:
        return torch.randn(shape).to(dtype)
    return torch.randn(*shape[:-1], gap + shape[-1]).to(dtype)[..., gap:]


def small_integers(shape, dtype, channels_last=False):
    """Return integers from -2 to 2: sums of their products have no rounding error."""
    return random_tensor(shape, torch.float32, channels_last).round().clamp(-2, 2).to(dtype)
