"""The public names of both packages and their signatures. A change of this list is a change of the interface."""

import inspect

import pytest

import fastentropy
import fastentropy_kernels

COLLECT = "*, average='dataset', channel_axis=None, mask='attention_mask', exclude=(), misfits='raise'"
FUSE = "tolerance=None, measure=True, dynamic_sizes=False, borders='exact', backend='eager', progress=None"
REPORT = "backend='eager', times=<factory>, notes=(), bound='', neurons=<factory>, multiplications=<factory>"
SIGNATURES = {
    "fastentropy": {
        "EntropyCollector": f"(model, {COLLECT})",
        "EntropyCollector.attach": "(self)",
        "EntropyCollector.compute": "(self)",
        "EntropyCollector.detach": "(self)",
        "EntropyCollector.load_state_dict": "(self, state)",
        "EntropyCollector.paused": "(self)",
        "EntropyCollector.reset": "(self)",
        "EntropyCollector.state_dict": "(self)",
        "EntropyCollector.sync": "(self)",
        "EntropyCollector.update": "(self, *args, **kwargs)",
        "EntropyMonitor": "(model, *, every=50, writers=(), **options)",
        "EntropyMonitor.begin_step": "(self, number)",
        "EntropyMonitor.cancel_step": "(self)",
        "EntropyMonitor.end_step": "(self)",
        "EntropyMonitor.huggingface_callback": "(self)",
        "EntropyMonitor.lightning_callback": "(self)",
        "EntropyMonitor.pause_step": "(self)",
        "EntropyMonitor.step": "(self, number=None)",
        "FusedModel": "(network, inputs, report, guards=(), signature=None)",
        "FusedModel.forward": "(self, *inputs, **keywords)",
        "FusedModel.graph_module": "property",
        "FusedModel.save": "(self, path)",
        "FusedModel.save_onnx": "(self, path, *, input_names=(), output_names=())",
        "FusedModel.save_package": "(self, path)",
        "FusedModel.train": "(self, mode=True)",
        "FusionReport": f"(chains, milliseconds, memory_formats, choice, max_relative_error, {REPORT})",
        "FusionReport.from_dict": "(values)",
        "FusionReport.speedup": "property",
        "FusionReport.to_dict": "(self)",
        "IdleNeurons": "(neurons, never_on, never_off)",
        "NeuronStates": "(activation, active, linear, constant)",
        "NeuronwiseActivation": "(activation, linear, constant, values=None, *, channel_axis)",
        "NeuronwiseActivation.active": "property",
        "NeuronwiseActivation.constant": "property",
        "NeuronwiseActivation.extra_repr": "(self)",
        "NeuronwiseActivation.forward": "(self, x)",
        "NeuronwiseActivation.linear": "property",
        "PruningResult": "(model, removed, steps, kept_step, example_inputs=())",
        "PruningResult.fuse": "(self, **options)",
        "ReplacedNeurons": "(neurons, linear, constant, channel_axis)",
        "ReplacedNeurons.from_masks": "(linear, constant, channel_axis)",
        "ReplacedNeurons.masks": "(self, device)",
        "Site": "(name, activation, neurons, channel_axis, axis_is_inferred=False)",
        "SiteStatistics": (
            "(activation, counts, nan=0, batch_entropies=None, batches=0, axis_is_inferred=False, neuron_batches=None, "
            "channel_axis=None)"
        ),
        "SiteStatistics.always_on": "property",
        "SiteStatistics.dead": "property",
        "SiteStatistics.entropy": "(self, zero='discard', average='dataset')",
        "SiteStatistics.neurons": "property",
        "SiteStatistics.observations": "property",
        "SiteStatistics.observed": "property",
        "Statistics": "(sites, notes=())",
        "Statistics.from_state_dict": "(state)",
        "Statistics.layer_entropy": "(self, zero='discard', average='dataset')",
        "Statistics.load": "(path)",
        "Statistics.plot": "(self, path=None, *, zero='discard', average='dataset')",
        "Statistics.save": "(self, path)",
        "Statistics.state_dict": "(self)",
        "Statistics.to_dict": "(self, zero='discard', average='dataset')",
        "Statistics.to_pandas": "(self, zero='discard', average='dataset')",
        "Step": "(removed, layer_entropy, score, metrics=<factory>, collapsed=(), neurons=<factory>)",
        "collect": f"(model, {COLLECT})",
        "find_idle_neurons": "(statistics)",
        "find_sites": "(model, example_inputs)",
        "fuse": f"(model, example_inputs, *, {FUSE})",
        "instrument": "(program, *, channel_axis=None, exclude=())",
        "isolate": "(model, example_inputs)",
        "json_lines_writer": "(path)",
        "linearize": "(model, names)",
        "linearize_neurons": "(model, statistics, *, max_entropy=0.0, min_observations=1000)",
        "load": "(path)",
        "prune": "(model, *, train, evaluate, calibrate, example_inputs, max_drop=0.01, max_removed=None, "
        "per_step=1, criterion='entropy', zeros_together=False, protect=(), target_speedup=None, "
        "max_latency_ms=None, collapse=None, zero='discard', average='dataset', statistics=None, checkpoint_dir=None, "
        "granularity='layer', measure=None, on_step=None, progress=None)",
        "register_activation": "(activation, name)",
        "statistics_of": "(counts)",
        "tensorboard_writer": "(target)",
        "wandb_writer": "(run=None)",
    },
    "fastentropy_kernels": {
        "ActivationPlan": "(x, counts, arranged, request, inplace)",
        "ActivationPlan.fits": "(self, x, mask=None, gate=None)",
        "ActivationPlan.adds_to": "(self, counts, offset)",
        "CountPlan": "(x, counts, arranged, request)",
        "CountPlan.fits": "(self, x, mask=None, gate=None)",
        "CountPlan.adds_to": "(self, counts, offset)",
        "MOST_MIDDLES": "128",
        "activation_states": "(x, counts, activation, *, channel_axis=1, mask=None, nan=None, "
        "states='sign', edges=None, weight=None, gate=None, inplace=False, impl='auto', "
        "**parameters)",
        "available_implementations": "(device)",
        "conv_bordered": "(x, weight, bias, tap_bias=None, *, stride=(1, 1), padding=(0, 0), "
        "dilation=(1, 1), groups=1, residual=None, activation='identity', "
        "counts=None, impl='auto')",
        "conv_pointwise": "(x, weight, bias, pointwise_weight, pointwise_bias, *, stride=(1, 1), "
        "padding=(0, 0), dilation=(1, 1), groups=1, residual=None, "
        "activation='identity', impl='auto')",
        "count_states": "(x, counts, *, channel_axis=1, mask=None, nan=None, edges=None, impl='auto')",
        "is_fused": "(activation, x)",
        "linear_pair": "(x, weight1, bias1, weight2, bias2, *, residual=None, activation='identity', impl='auto')",
        "linear_regions": "(activation, **parameters)",
        "plan_activation_states": "(x, counts, activation, *, channel_axis=1, mask=None, gate=None, "
        "inplace=False, **parameters)",
        "plan_count_states": "(x, counts, *, channel_axis=1, mask=None)",
    },
}


def bare(signature):
    """Return a signature without annotations."""
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def described(package):
    """Return every public name of a package, with the signatures of functions, classes and public methods."""
    found = {}
    for name in sorted(package.__all__):
        value = getattr(package, name)
        found[name] = bare(inspect.signature(value)) if callable(value) else repr(value)
        owners = [owner for owner in getattr(value, "__mro__", ()) if owner.__module__.startswith(package.__name__)]
        for attribute in sorted({attribute for owner in owners for attribute in vars(owner)}):
            member = inspect.getattr_static(value, attribute)
            if attribute.startswith("_"):
                continue
            function = getattr(value, attribute)
            if isinstance(member, property):
                found[f"{name}.{attribute}"] = "property"
            elif callable(function):
                found[f"{name}.{attribute}"] = bare(inspect.signature(function))
    return found


@pytest.mark.parametrize("package", [fastentropy, fastentropy_kernels], ids=lambda package: package.__name__)
def test_signatures(package):
    assert described(package) == SIGNATURES[package.__name__]
