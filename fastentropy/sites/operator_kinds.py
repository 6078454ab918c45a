"""Sort the operators of PyTorch by what they do with the axes of their inputs.

Operators are known by name, because some exist only in some releases of PyTorch.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fastentropy._compat import composite_kernel, operator_schema

#: Operators that make a channel axis, axis 1 of their output.
CONVOLUTIONS = frozenset({
    "convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution",
    "cudnn_convolution_relu", "cudnn_convolution_transpose", "miopen_convolution", "_slow_conv2d_forward", "conv_depthwise3d",
    "_conv_depthwise2d", "deform_conv2d", "conv1d", "conv2d", "conv3d", "conv1d_relu", "conv2d_relu", "conv3d_relu",
})  # fmt: skip
CHANNEL_NORMS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_with_update",
    "_native_batch_norm_legit_functional", "_batch_norm_with_update_functional", "cudnn_batch_norm", "miopen_batch_norm",
    "batch_norm", "native_group_norm",
})  # fmt: skip
#: Operators that keep a known channel axis, and otherwise make the last axis the channel axis.
LAST_NORMS = frozenset({"native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"})
#: Operators that make a channel axis, the last axis of their output.
LAST = frozenset({
    "embedding", "_embedding_bag", "_embedding_bag_forward_only", "_trilinear", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    "mkldnn_linear", "_mkl_linear", "_linear_pointwise", "linear_dynamic", "linear_relu", "linear_relu_dynamic",
    "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm", "_dyn_quant_matmul_4bit",
    "_mixed_dtypes_linear", "_sparse_semi_structured_linear", "_wrapped_quantized_linear_prepacked",
})  # fmt: skip
#: Matrix products, with the index of their left factor; the right one follows.
PRODUCTS = {
    "mm": 0, "bmm": 0, "mv": 0, "matmul": 0, "linear": 0, "_int_mm": 0, "_scaled_mm": 0, "_grouped_mm": 0, "_sparse_mm": 0,
    "smm": 0, "addmm": 1, "addmv": 1, "baddbmm": 1, "_addmm_activation": 1, "_sparse_addmm": 1, "sspaddmm": 1,
}  # fmt: skip
ATTENTIONS = frozenset({
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable", "flex_attention",
})  # fmt: skip
RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "flatten", "unflatten", "resize"})
# After these operators all ranks hold the same values.
COLLECTIVES = frozenset({"all_reduce", "all_reduce_", "allreduce_", "all_gather_into_tensor", "_allgather_base_"})
#: Operators whose output has the shape, but not the values, of an input.
LIKE = frozenset({
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
})  # fmt: skip
#: Elementwise operators without the tag for them, and others that leave each entry at its place; and operators that cut or
#: extend axes, which shows in their sizes.
ALIGNED = frozenset({
    "copy", "_to_copy", "detach", "alias", "lift", "lift_fresh", "contiguous", "clone", "_conj", "_conj_physical",
    "_neg_view", "resolve_conj", "resolve_neg", "native_dropout", "_fused_dropout", "_masked_scale", "bernoulli", "_softmax",
    "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin",
    "masked_fill", "masked_scatter", "prelu", "_prelu_kernel", "rrelu_with_noise", "hardswish", "log_sigmoid_forward",
    "complex", "polar", "tril", "triu", "fill", "zero", "normal", "uniform", "exponential", "dequantize", "quantize_per_tensor",
    "quantize_per_tensor_dynamic", "quantize_per_channel", "fake_quantize_per_tensor_affine_cachemask",
    "fake_quantize_per_channel_affine_cachemask", "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine", "_fake_quantize_learnable_per_channel_affine", "renorm", "expand",
    "broadcast_to", "repeat", "glu", "leaky_relu",
    # cut or extended
    "slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_split_with_sizes",
    "unsafe_chunk", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d",
    "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_avg_pool1d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d",
    "fractional_max_pool3d", "max_unpool2d", "max_unpool3d", "mkldnn_max_pool2d", "mkldnn_adaptive_avg_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa", "slice_scatter", "select_scatter",
    "wait_tensor",
})  # fmt: skip
#: Operators that move entries along the axes that an argument names.
ALONG = frozenset({
    "cat", "concat", "_cat", "flip", "roll", "rot90", "sort", "msort", "topk", "gather", "take_along_dim", "index_select",
    "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce", "index_fill", "_fft_r2c", "_fft_c2r",
    "_fft_c2c", "fft_fftshift",
})  # fmt: skip
#: Operators with a rule of their own.
OTHERS = frozenset({
    "transpose", "t", "permute", "select", "unbind", "squeeze", "unsqueeze", "stack", "index", "unfold", "view_as_real",
    "view_as_complex", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler", "roi_align", "roi_pool", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "im2col", "col2im",
})  # fmt: skip
REDUCTIONS = frozenset({
    "sum", "mean", "amax", "amin", "max", "min", "any", "all", "argmax", "argmin", "prod", "std", "var", "var_mean", "std_mean",
    "norm", "linalg_vector_norm", "logsumexp", "median", "nanmedian", "mode", "kthvalue", "nansum", "count_nonzero", "aminmax",
})  # fmt: skip


#: Operators of which it is known where the axes of their inputs go.
FOLLOWED = frozenset[str]().union(
    CONVOLUTIONS, CHANNEL_NORMS, LAST_NORMS, LAST, PRODUCTS, ATTENTIONS, RESHAPES, LIKE, ALIGNED, ALONG, REDUCTIONS, OTHERS
)


class Operator:
    """What is known about an operator, whatever its arguments."""

    def __init__(self, func: Any) -> None:
        """Describe an operator as `__torch_dispatch__` receives it."""
        name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        schema = operator_schema(func)
        arguments = list(schema.arguments) if schema is not None else []
        tags = getattr(func, "tags", ())
        self.is_known = schema is not None or name in ATTENTIONS
        self.composed = composite_kernel(func)
        self.places = {argument.name: place for place, argument in enumerate(arguments)}
        self.defaults = {argument.name: argument.default_value for argument in arguments}
        written = [argument for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]
        self.changes_view = torch.Tag.inplace_view in tags
        self.written = [(argument.name, self.places[argument.name]) for argument in written]
        self.writes_only = frozenset(argument.name for argument in written if argument.kwarg_only)
        self.name = _base_name(name)
        self.is_pointwise = torch.Tag.pointwise in tags or _has_pointwise_variant(func, self.name)
        self.is_view_of_dtype = self.name == "view" and getattr(func, "_overloadname", "") == "dtype"
        self.is_reshape = self.name in RESHAPES and not self.is_view_of_dtype
        self.is_followed = self.is_pointwise or self.name in FOLLOWED
        self.is_copy = self.name == "copy"


def _has_pointwise_variant(func: Any, name: str) -> bool:
    """Return whether another variant of an ATen operator has the tag for elementwise ones, which PyTorch does not give to all.

    In-place variants, for example, often lack it, more of them in older releases. For operators that are followed by name the
    answer is no, because `max` of two tensors is elementwise and `max` along an axis is not.

    Args:
        func: the operator.
        name: its name without what marks variants.
    """
    if getattr(func, "namespace", "") != "aten" or name in FOLLOWED:
        return False
    packet = getattr(torch.ops.aten, name, None)
    variants = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in variant.tags for variant in variants)


@lru_cache(4096)
def describe(func: Any) -> Operator:
    """Return what is known about an operator."""
    return Operator(func)


class Call(NamedTuple):
    """One call of an operator."""

    operator: Operator
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def argument(self, name: str) -> Any:
        """Return the argument with the given name in the operator's schema; None if there is no such argument.

        If the call does not give the argument, its default is returned.
        """
        place = self.operator.places.get(name)
        if place is not None and place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name, self.operator.defaults.get(name))

    def factors(self) -> tuple[Any, Any]:
        """Return the two tensors that a matrix product multiplies."""
        first = PRODUCTS[self.operator.name]
        left, right = self.args[first : first + 2]
        return left, right


def _base_name(name: str) -> str:
    """Return the name of an operator without what marks variants that work in place or copy instead of viewing."""
    if name.endswith("_") and not name.endswith("__") and name not in COLLECTIVES:
        name = name[:-1]
    if name.endswith("_copy") and name.removesuffix("_copy") in FOLLOWED:
        name = name.removesuffix("_copy")
    return name
