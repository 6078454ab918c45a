"""Create a collector for a model."""

from collections.abc import Collection, Mapping

from torch import nn

from fastentropy.collector.collector import EntropyCollector
from fastentropy.collector.site_statistics import Average
from fastentropy.sites.padding import Mask
from fastentropy.sites.registry import Misfits


def collect(
    model: nn.Module,
    *,
    average: Average = "dataset",
    channel_axis: Mapping[str, int] | None = None,
    mask: Mask = "attention_mask",
    exclude: Collection[str] = (),
    misfits: Misfits = "raise",
) -> EntropyCollector:
    """Create a collector for all activations of a model, to be used as `with fe.collect(model) as collector:`.

    After the block the model is as it was before, even if the block raises. Models and parts of models that were compiled with
    torch.compile are counted inside of their graphs: their first pass runs eagerly, and the second compiles graphs that count.
    PyTorch keeps these beside the graphs that do not count, so a later collector compiles nothing.

    In a gated MLP (SwiGLU, GeGLU) the site (call of an activation) is the activation of the gate, and the counted state (off,
    zero or on) is the sign of the gate's pre-activation. Such an MLP multiplies gate and value, so it is not linear even if
    the gate never changes its state.

    Args:
        model: any module.
        average: "dataset" keeps only counts. "batch" also computes the neuron entropies of each batch (forward pass), so their
            mean over batches is available. The counts are exact with both.
        channel_axis: the axis of the activation's input whose entries are the neurons, by name of the site. Give it for sites
            where the axis should not be inferred from the operator before the activation.
        mask: the name of the argument, of the model or of a part of it, that holds the padding mask: a tensor [batch, tokens]
            that is 0 at padding. Padding is not counted. Instead of a name, `mask` may be a function that returns the mask for
            the (args, kwargs) of a call, or None for no mask.
        exclude: names of sites that are run without being counted, or patterns of names such as "encoder.*" (see `fnmatch`).
        misfits: what happens to a site of which an input has another number of neurons than before, so that no axis fits. With
            "raise" the pass raises RuntimeError. With "skip" the site is left out, and a note of the statistics says so.

    Returns:
        A collector that is not attached yet.

    Raises:
        TypeError: `model` is not a module, `channel_axis` is no mapping, or `exclude` is a string.
        ValueError: `average` or `misfits` has another value.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> with fe.collect(model) as collector:
        ...     for _ in range(10):
        ...         y = model(torch.randn(5, 3))
        >>> statistics = collector.compute()
        >>> statistics["1"].neurons, statistics["1"].observations
        (4, 200)
    """
    return EntropyCollector(model, average=average, channel_axis=channel_axis, mask=mask, exclude=exclude, misfits=misfits)
