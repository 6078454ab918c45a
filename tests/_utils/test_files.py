"""Atomic writes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastentropy._utils.files import remove_leftovers, replace_file, save_json, save_tensors


def test_file_is_replaced_atomically(tmp_path):
    save_json({"a": 1}, tmp_path / "f.json")
    save_json({"b": [2]}, tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text()) == {"b": [2]}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_old_file_stays_when_writing_fails(tmp_path, error):
    (tmp_path / "f").write_text("old")

    def write(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        replace_file(tmp_path / "f", write)
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        save_json({}, tmp_path / "none" / "f.json")
    assert error.value.filename == str(tmp_path / "none" / "f.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        save_json({}, tmp_path / "folder")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "folder"), None)
    with pytest.raises(FileNotFoundError) as error:
        replace_file(tmp_path / "f", lambda path: (tmp_path / "other").read_text())
    assert error.value.filename == str(tmp_path / "other")


def test_only_leftovers_of_killed_processes_are_removed(tmp_path):
    """The leftovers are the folder of a temporary file, with the file that safetensors makes next to it."""
    (tmp_path / ".tmp-123-f.json").mkdir()
    (tmp_path / ".tmp-123-f.json" / ".tmpXyz").write_text("half")
    for name in ("f.json", ".tmp", ".hidden"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"f.json", ".tmp", ".hidden"}


def test_file_mode_follows_the_umask(tmp_path):
    save_json({}, tmp_path / "f.json")
    save_tensors({"x": torch.zeros(1)}, tmp_path / "t")
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "f.json").stat().st_mode


def test_tensors_may_be_views_and_share_memory(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save_tensors({"x": x, "row": x[1], "column": x[:, 1], "again": x}, tmp_path / "t", {"note": "text"})
    loaded = load_file(tmp_path / "t")
    assert torch.equal(loaded["column"], x[:, 1])
    assert torch.equal(loaded["again"], x)
