"""Write fused models as torch.export archives without pickled objects, AOTInductor packages or ONNX, and read archives."""

import copy
import functools
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fastentropy._compat import compile_package, load_package, tree_leaves
from fastentropy._utils.errors import one_line
from fastentropy._utils.files import replace_file
from fastentropy.fusion.backends.functional import write_new_values
from fastentropy.fusion.backends.inductor import freezing
from fastentropy.fusion.backends.onnx_runtime import check_onnx, export_onnx, run_session, start_session
from fastentropy.fusion.binding import Signature
from fastentropy.fusion.inputs import clone, is_float
from fastentropy.fusion.report import FusionReport
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import inference_module
from fastentropy.fusion.verification import TOLERANCE, EquivalenceCheck

#: The names of the entries that `write` puts into an archive, without the top folder.
_OWN_ENTRIES = re.compile(
    r"models/model\.json|extra/(report|guards|signature)\.json|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)"
)


def write(
    path: str | PathLike[str], program: ExportedProgram, report: FusionReport, guards: tuple[str, ...], signature: Signature
) -> None:
    """Write a fused model as a torch.export archive, completely or not at all.

    The archive is written under another name, read back and run. It gets its own name only if the outputs agree.

    Args:
        path: the file to write. Its name must end in `.pt2`.
        program: the network. Its sample inputs are not written.
        report: the report on the fusion.
        guards: conditions on the input sizes, as `guards_of` returns them.
        signature: the signature of the original model.

    Raises:
        ValueError: the name does not end in `.pt2`.
        RuntimeError: the archive gives other outputs than the program.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"{path}: the name of a fused model must end in .pt2")

    def save(file: Path) -> None:
        write_archive(file, program, report, guards, signature)
        _check_equal(program, inference_module(read(file)[0]))

    replace_file(path, save)


def write_archive(
    file: Path | BytesIO, program: ExportedProgram, report: FusionReport, guards: tuple[str, ...], signature: Signature
) -> None:
    """Write a fused model as a torch.export archive, without a check; the arguments are as in `write`."""
    texts = {"report.json": json.dumps(report.to_dict()), "guards.json": json.dumps(guards)}
    texts["signature.json"] = json.dumps(signature.to_dict())
    written = copy.copy(program)  # a caller may still compile the program, which takes its sample inputs
    written.example_inputs = None
    with warnings.catch_warnings():
        # PyTorch mistakes weights in channels-last for parts of larger tensors. `write` reads the file back and compares.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(written, file, extra_files=texts)


def write_package(path: str | PathLike[str], program: ExportedProgram) -> None:
    """Compile a program for this machine with AOTInductor, and write the package if its outputs are those of the program."""

    def save(file: Path) -> None:
        package = file.with_name(f"{file.name}.pt2")  # AOTInductor refuses other names
        try:
            write_new_values(program.graph)
            with freezing([*program.state_dict.values(), *program.constants.values()]):
                compile_package(program, package)
            _check_equal(program, load_package(package))
            package.replace(file)
        finally:
            package.unlink(missing_ok=True)

    replace_file(path, save)


def write_onnx(
    path: str | PathLike[str], program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]
) -> None:
    """Write a program as ONNX, checked with onnxruntime as in `write`. The names are those of `export_onnx`.

    Raises ImportError if onnx, onnxscript or onnxruntime is missing.
    """
    check_onnx()

    def save(file: Path) -> None:
        export_onnx(program, file, input_names, output_names)
        session = start_session(file, program)
        _check_equal(program, lambda *inputs, **keywords: run_session(session, tree_leaves((inputs, keywords))))

    replace_file(path, save)


def _check_equal(program: ExportedProgram, written: Callable[..., Any]) -> None:
    """Raise RuntimeError if the outputs of a written model differ from those of the program on random inputs.

    Args:
        program: the program.
        written: runs the written model on the same inputs.
    """
    inputs = TracedInputs.of(program).sample()
    given = clone(inputs)
    outputs = tree_leaves(inference_module(program)(*given.args, **given.kwargs))
    tolerance = TOLERANCE.get(next((value.dtype for value in outputs if is_float(value)), torch.float32), 1e-5)
    judged = EquivalenceCheck(inference_module(program), inputs, lambda other: False, tolerance).judge(written)
    if not judged.holds:
        raise RuntimeError(
            f"the written model differs by {judged.error:.1e} (relative), above {judged.bound}, and was not kept"
        )


def read(path: str | PathLike[str] | bytes) -> tuple[ExportedProgram, FusionReport, tuple[str, ...], Signature]:
    """Read an archive that `write` wrote, without running code from it.

    Args:
        path: the file, or its contents.

    Returns:
        The program, the report, the guards and the signature of the original model. A file of an older version has none; then
        the signature is empty.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not such an archive, is damaged, or holds an entry that `write` does not write.
    """
    try:
        open_file: Callable[[], Any] = functools.partial(BytesIO, path) if isinstance(path, bytes) else lambda: path
        _refuse_foreign_entries(open_file())
        extra_files = {"report.json": "", "guards.json": "", "signature.json": ""}
        with torch.device("cpu"):  # PyTorch loads the weights into tensors on the default device, whatever theirs was
            program = torch.export.load(open_file(), extra_files=extra_files)
        report, guards = (json.loads(extra_files[name]) for name in ("report.json", "guards.json"))
        signature = Signature.from_dict(json.loads(text)) if (text := extra_files["signature.json"]) else Signature()
        return program, FusionReport.from_dict(report), tuple(map(str, guards)), signature
    except OSError:
        raise
    except Exception as error:
        name = "the pickled archive" if isinstance(path, bytes) else path
        raise ValueError(f"{name} is not a fused model (write one with fused.save(path)): {one_line(error)}") from error


def _refuse_foreign_entries(path: str | PathLike[str] | BytesIO) -> None:
    """Raise ValueError if an archive holds an entry that `write` does not write.

    Such an entry could be a pickle, and reading a pickle can run any code.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]
            empty_sample_inputs = name == "data/sample_inputs/model.pt" and not entry.file_size
            if not (_OWN_ENTRIES.fullmatch(name) or empty_sample_inputs):
                raise ValueError(f"{entry.filename} is not part of a fused model and may hold a pickle")
            if name.endswith("_config.json"):
                for key, item in json.loads(archive.read(entry))["config"].items():
                    if item["use_pickle"] or not item.get("tensor_meta"):
                        raise ValueError(f"{key} is a pickled object")
