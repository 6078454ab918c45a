"""Snapshots of a model, which show whether a function changed it."""

import torch


def snapshot(model):
    """Return a snapshot of a model: its weights, its modules, and the numbers of their hooks.

    The modules are given in order, each with its name, identity, training mode and attribute names.
    """
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
    )


def assert_unchanged(model, before):
    """Assert that a model equals `before`, an earlier `snapshot` of it."""
    weights, modules, hooks = snapshot(model)
    assert (modules, hooks) == before[1:]
    assert list(weights) == list(before[0])
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
