"""Run a network in ONNX Runtime, on a CPU."""

import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from fastentropy._compat import tree_leaves, tree_unflatten
from fastentropy._utils.optional import install_command
from fastentropy._utils.text import plural
from fastentropy.fusion.backends.functional import write_new_values
from fastentropy.fusion.chains.nodes import overwrites
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import export_again
from fastentropy_kernels.dispatch import launches_directly


class OnnxSession:
    """A network in an ONNX Runtime session, with as many threads as PyTorch has when the session is made.

    A call that needs gradients runs the network as it is, and so does one that a tracer, mode or transform of PyTorch looks on:
    none of them would see the session.
    """

    def __init__(self, network: nn.Module, inputs: TracedInputs) -> None:
        """Export the network and start the session.

        Args:
            network: the network.
            inputs: the inputs with which it was traced.

        Raises:
            ImportError: onnx, onnxscript or onnxruntime is missing.
            ValueError: the network cannot be exported, is not on a CPU, overwrites its inputs or returns other values than
                tensors.
        """
        check_onnx()
        if any(value.device.type != "cpu" for value in network.state_dict().values()):
            raise ValueError('backend="onnxruntime" runs on a CPU, but the model is on another device; call model.cpu()')
        program = export_again(network, inputs)
        self._network, self._structure = network, program.call_spec.out_spec
        self._session = session_of(program)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the network."""
        leaves = tree_leaves((inputs, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if needs_gradients or not all(map(launches_directly, tensors)):
            return self._network(*inputs, **keywords)
        return tree_unflatten(run_session(self._session, leaves), self._structure)


def missing_packages() -> list[str]:
    """Return which of onnx, onnxscript and onnxruntime are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]


def check_onnx() -> None:
    """Raise ImportError if onnx, onnxscript or onnxruntime is missing."""
    if missing := missing_packages():
        raise ImportError(f"{', '.join(missing)}: not installed; {install_command('onnx')}")


def export_onnx(
    program: ExportedProgram, file: Path, input_names: Sequence[str] = (), output_names: Sequence[str] = ()
) -> None:
    """Write a program as ONNX.

    Args:
        program: the program, which is changed where ONNX needs another form.
        file: the file to write.
        input_names: the names of the inputs that are tensors, in flat order. If empty, they have those of the program.
        output_names: the names of the outputs, likewise.

    Raises:
        ValueError: the program does what ONNX cannot express: it returns other values than tensors, or overwrites inputs; or
            the names do not fit it.
    """
    if not all(isinstance(spec.arg, TensorArgument) for spec in program.graph_signature.output_specs):
        raise ValueError("the model returns values that are not tensors, which ONNX cannot; use backend='eager' or save")
    inputs = program.graph.find_nodes(op="placeholder")
    if any(overwrites(user, node) for node in inputs for user in node.users):
        raise ValueError("the model overwrites its inputs, which ONNX cannot; use backend='eager' or save")
    signature = program.graph_signature
    _check_onnx_names(
        {
            "input_names": (input_names, [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]),
            "output_names": (output_names, [spec.arg for spec in signature.output_specs]),
        }
    )
    write_new_values(program.graph)
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    _rename(exported.model.graph, input_names, output_names)
    exported.save(file)


def _check_onnx_names(given: dict[str, tuple[Sequence[str], list[Any]]]) -> None:
    """Raise ValueError if chosen names are not as many as the tensors that they are for, or one of them is there twice.

    Args:
        given: for each argument that holds names, the names and the inputs or outputs of the program.
    """
    for argument, (names, values) in given.items():
        present = [value.name for value in values if isinstance(value, TensorArgument)]
        if names and len(names) != len(present):
            raise ValueError(f"{argument}: got {plural(len(names), 'name')}, expected {len(present)}, for {', '.join(present)}")
    chosen = [name for names, _ in given.values() for name in names]
    if twice := sorted({name for name in chosen if chosen.count(name) > 1}):
        raise ValueError(f"input_names and output_names: {', '.join(twice)} is there twice; every name must be another one")


def _rename(graph: Any, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Give the inputs and outputs of an ONNX graph their chosen names, and others to the values that had these names."""
    chosen = {*input_names, *output_names}
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in chosen:
            value.name = f"{value.name}.inner"
    for values, names in ((graph.inputs, input_names), (graph.outputs, output_names)):
        for value, name in zip(values, names, strict=False):  # without names, none is changed
            value.name = name


def session_of(program: ExportedProgram) -> Any:
    """Return an `onnxruntime.InferenceSession` of a program. What is raised is as in `export_onnx` and `start_session`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(program, file)
        return start_session(file, program)


def start_session(file: Path, program: ExportedProgram) -> Any:
    """Return an `onnxruntime.InferenceSession` of a file, with as many threads as PyTorch has now.

    Raises ValueError if ONNX Runtime cannot run an operator in the dtype of `program`, from which the file was written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a class that onnxruntime does not make public
        dtypes = {value.dtype for value in program.state_dict.values() if value.is_floating_point()} - {torch.float32}
        operator = re.search(r"Could not find an implementation for (\w+)", str(error))
        if not operator or not dtypes:
            raise
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"ONNX Runtime has no {operator[1]} in {names} on a CPU; convert the model with model.float(), fuse it again and "
            "write that"
        ) from error


def run_session(session: Any, leaves: list[Any]) -> list[Tensor]:
    """Return the outputs of a session for inputs in flat order. Inputs that are not tensors are part of the file."""
    tensors = [value.numpy(force=True) for value in leaves if isinstance(value, Tensor)]
    names = [each.name for each in session.get_inputs()]
    return [torch.from_numpy(output) for output in session.run(None, dict(zip(names, tensors, strict=True)))]
