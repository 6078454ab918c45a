"""Run a network in ONNX Runtime, on a CPU."""

import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from fastentropy._compat import tree_leaves, tree_unflatten
from fastentropy._utils.optional import install_command
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


def export_onnx(program: ExportedProgram, file: Path) -> None:
    """Write a program as ONNX.

    Raises ValueError if the program does what ONNX cannot express: it returns other values than tensors, or overwrites inputs.
    """
    if not all(isinstance(spec.arg, TensorArgument) for spec in program.graph_signature.output_specs):
        raise ValueError("the model returns values that are not tensors, which ONNX cannot; use backend='eager' or save")
    inputs = program.graph.find_nodes(op="placeholder")
    if any(overwrites(user, node) for node in inputs for user in node.users):
        raise ValueError("the model overwrites its inputs, which ONNX cannot; use backend='eager' or save")
    write_new_values(program.graph)
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    exported.save(file)


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
