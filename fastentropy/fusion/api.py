"""Fuse the chains of a network: trace it, make its forms, time them, and return the fastest form that is verified.

A chain is a stretch of linear operators. A form is one way to compute the same network, such as the network with batch norm
folded.
"""

import dataclasses
import functools

import torch
from torch import nn
from torch.fx import GraphModule

from fastentropy.fusion.backends import Backend
from fastentropy.fusion.binding import Signature
from fastentropy.fusion.chains.finding import overwritten_constants
from fastentropy.fusion.chains.merging import Borders
from fastentropy.fusion.checks import check_options, copy_that_runs, default_tolerance
from fastentropy.fusion.choosing import first_equal, further_backends, race
from fastentropy.fusion.explanations import why_nothing_is_fused
from fastentropy.fusion.finishing import finish
from fastentropy.fusion.forms import make_forms
from fastentropy.fusion.fused_model import FusedModel, make_trainable
from fastentropy.fusion.guards import Conditions, guards_of
from fastentropy.fusion.inputs import Inputs, outputs_of
from fastentropy.fusion.neurons.taking_apart import take_apart
from fastentropy.fusion.path_choice import split_linear_paths
from fastentropy.fusion.planner import plan_chain, shared_prices
from fastentropy.fusion.progress import shown
from fastentropy.fusion.report import FusionReport
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import export, own_constants, prepared_module, rewrite
from fastentropy.fusion.verification import EquivalenceCheck
from fastentropy.sites.inputs import ExampleInputs, check_inputs, check_model


@torch.inference_mode(False)
@torch.no_grad()
def fuse(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    tolerance: float | None = None,
    measure: bool = True,
    dynamic_sizes: bool = False,
    borders: Borders = "exact",
    backend: Backend = "eager",
    progress: bool | None = None,
) -> FusedModel:
    """Return a copy of a network in which each chain (stretch of linear operators) has the form that runs fastest.

    Batch norm is folded into the operator next to it. A chain is merged into one operator if that is faster. Zero padding
    inside a chain makes one operator wrong near the border of an image, so the outputs there are corrected. The result is
    compared with the model on the example inputs and on random inputs, at three batch sizes if the model allows them. The
    model is not changed, and shares no memory with the result.

    Args:
        model: any module in eval mode that `torch.export` can trace.
        example_inputs: a tuple of the positional inputs of one call, or a mapping of its keyword inputs. Axis 0 of each tensor
            is the batch, if it has the size of the outputs' axis 0. The result is the fastest for their sizes and their device.
        tolerance: the largest relative error allowed. The default depends on the dtype of most weights: 1e-10 in float64,
            1e-5 in float32, 1e-2 in float16 and 5e-2 in bfloat16.
        measure: choose the forms by measured times. False chooses them by counted multiplications and bytes, which suits a
            result for another machine.
        dynamic_sizes: leave the sizes of images and sequences free as well as the batch size, as far as the model allows it.
            Fewer chains can be merged then.
        borders: "exact" or "train". "train" moves all zero padding to the front of each merged chain. Outputs near the border
            then differ from the model by the error in the report, and the weights of the result are parameters, so that it
            can be trained afterwards.
        backend: what runs the result. "eager" is PyTorch without compilation. "inductor" is torch.compile, with frozen weights
            on a CPU and CUDA graphs on a GPU: it compiles here and again for other batch sizes, for a minute or more, needs a
            C++ compiler on a CPU, and gives no gradients. "onnxruntime" is an ONNX Runtime session, for CPUs. "auto" measures
            all of them (ONNX Runtime where it is installed), and returns the fastest one.
        progress: whether to show the phase, and how many chains are planned, on a line of the standard error. By default, only
            a terminal shows it.

    Returns:
        The fused network, for any batch size that the model allows. What is returned is what was timed, and it is not slower
        than the model: where nothing is faster, it runs a copy of the model itself. Its `report` says what was tried and
        chosen.

    Raises:
        TypeError: `model` is not a module, or `example_inputs` are of another kind, such as a single tensor.
        ValueError: an argument is invalid, or the model is in training mode, does not run on the example inputs, cannot be
            copied, traced or run by `backend`, or updates buffers when it runs.
        ImportError: a package that `backend` needs is missing.
        RuntimeError: the model gives other outputs in each call, or this release of PyTorch does not tell for which input sizes
            a trace is correct.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Identity(), torch.nn.Linear(32, 8)).eval()
        >>> fused = fe.fuse(model, (torch.randn(4, 8),), measure=False)
        >>> [(chain.names, chain.choice) for chain in fused.report.chains]
        [(('0', '2'), 'merge')]
        >>> x = torch.randn(16, 8)
        >>> torch.allclose(fused(x), model(x), atol=1e-5)
        True
    """
    check_model(model)
    check_options(tolerance, borders, backend, measure)
    with shown(progress) as show:
        show("trace", 0, 0)
        original, inputs = copy_that_runs(model, Inputs.of(check_inputs(example_inputs, "fe.fuse(model, {})")))
        program = own_constants(export(original, inputs, dynamic_sizes))
        traced = prepared_module(program)
        if updated := overwritten_constants(traced):
            raise ValueError(
                f"the model updates {', '.join(updated)} as it runs: its outputs do not depend on its inputs alone"
            )
        tolerance = default_tolerance(model) if tolerance is None else tolerance
        signature, traced_inputs = Signature.of(original), TracedInputs.of(program)
        guards = guards_of(program, original, inputs)
        conditions = Conditions(traced_inputs, guards)
        check = EquivalenceCheck(original, inputs, lambda given: not conditions.refusal(given.leaves), tolerance)
        guards += _smallest_sizes(traced_inputs, check, traced, inputs)
        plan = functools.partial(
            plan_chain, tolerance=tolerance, measure=measure, borders=borders, prices=shared_prices(measure)
        )
        apart = take_apart(traced, functools.partial(split_linear_paths, inputs=inputs, plan=plan, measure=measure))
        apart = apart if apart and check.judge(apart.network).holds else None

        def make(form: nn.Module, runs_in: str) -> FusedModel:
            return FusedModel(form, traced_inputs, FusionReport((), {}, {}, "", 0.0, runs_in), guards, signature)

        network = apart.network if apart else traced
        forms, reports = make_forms(
            original, network, inputs, plan, None if borders == "train" else check, channels_last=measure, progress=show
        )
        show("time the network" if measure else "compare with the model", 0, 0)
        backends = further_backends(backend, original)
        trace = _finished(traced, original, inputs) if backends else traced
        made = race(forms, trace, backends, make, inputs, measure)
        if backend != "auto" and all(runs_in != backend for _, _, runs_in in made.modules):
            raise ValueError(f"backend={backend!r}: {made.notes[0]}")
        if not any(reports.values()) and not apart:
            made = made._replace(notes=(*made.notes, why_nothing_is_fused(traced)))
        fused = first_equal(made, check, reports, trains=borders == "train")
        if apart:
            fused.report = dataclasses.replace(fused.report, neurons=apart.neurons, multiplications=apart.multiplications)
        if borders == "train":
            make_trainable(fused, dict(original.named_parameters()))
        return fused


def _finished(traced: GraphModule, model: nn.Module, inputs: Inputs) -> GraphModule:
    """Return a copy of the trace of a model that runs as fast as its operators allow."""
    return finish(rewrite(traced, {}, {}), inputs, outputs_of(model, inputs))


def _smallest_sizes(traced_inputs: TracedInputs, check: EquivalenceCheck, traced: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return the guards (conditions on input sizes) that keep each free size from being too small.

    A trace is made at sizes of 2 and more. It is used for a batch of one only if its outputs were compared with the model's on
    a batch of one and agreed. Otherwise `check` compares no batch of one from now on, unless the example is one.

    Args:
        traced_inputs: the inputs of the trace.
        check: compares the outputs of a form with those of the model.
        traced: the graph of the trace.
        inputs: the inputs of one call.
    """
    takes_one = check.holds_for_one(traced)
    if not takes_one and inputs.batch != 1:
        check.leave_out_one()
    least = 1 if takes_one else 2
    return tuple(f"leaf_{leaf}.size()[{axis}] >= {2 if axis else least}" for leaf, axis in traced_inputs.free_axes())
