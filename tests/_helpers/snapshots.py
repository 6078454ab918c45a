"""What a user could see of a model, before and after."""

import torch


def snapshot(model):
    """All that a user could see of a model: weights, modules and their order, modes, hooks and attributes."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
    )


def assert_unchanged(model, before):
    """Raise where `snapshot(model)` is not what it was."""
    weights, modules, hooks = snapshot(model)
    assert (modules, hooks) == before[1:]
    assert list(weights) == list(before[0])
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
