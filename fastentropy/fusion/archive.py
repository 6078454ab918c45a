"""Fused models in files: torch.export archives, without pickled objects."""

import json
import re
import zipfile
from os import PathLike

import torch
from torch.export import ExportedProgram

from fastentropy.files import replace_file
from fastentropy.fusion.report import FusionReport
from fastentropy.fusion.tracing import first_line

#: The entries of an archive that `write` writes, below its folder.
_OWN_ENTRIES = re.compile(
    r"models/model\.json|extra/report\.json|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)"
)


def write(path: str | PathLike[str], program: ExportedProgram, report: FusionReport) -> None:
    """Write a program and its report, whole or not at all."""
    text = json.dumps(report.to_dict())
    program.example_inputs = None
    replace_file(path, lambda file: torch.export.save(program, file, extra_files={"report.json": text}))


def read(path: str | PathLike[str]) -> tuple[ExportedProgram, FusionReport]:
    """Read what `write` wrote.

    Raises ValueError for a file that is not such an archive, that is damaged, or that holds more than `write` writes.
    """
    try:
        _refuse_foreign_entries(path)
        extra_files = {"report.json": ""}
        program = torch.export.load(path, extra_files=extra_files)
        return program, FusionReport.from_dict(json.loads(extra_files["report.json"]))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a fused model (write one with fused.save(path)): {first_line(error)}") from error


def _refuse_foreign_entries(path: str | PathLike[str]) -> None:
    """Raise ValueError where an archive holds anything but what `write` writes: reading a pickle can run any code."""
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
