"""The wheel and the source distribution hold the right files, and the wheel works outside the repository."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

import fastentropy
from tests._helpers.paths import ROOT

PACKAGES = {"fastentropy": ROOT / "fastentropy", "fastentropy_kernels": ROOT / "kernels" / "fastentropy_kernels"}
SUFFIXES = {".py", ".j2", ".typed"}

pytestmark = pytest.mark.slow

COLLECT = """
import runpy
import sys
from pathlib import Path

import torch
from torch import nn

import fastentropy
import fastentropy_kernels

folder = Path(sys.argv[1])
assert Path(fastentropy.__file__).is_relative_to(folder), fastentropy.__file__
assert Path(fastentropy_kernels.__file__).is_relative_to(folder), fastentropy_kernels.__file__

model = nn.Sequential(nn.Identity(), nn.ReLU())
with fastentropy.collect(model) as collector:
    y = model(torch.tensor([[-1.0, 0.0], [2.0, -3.0], [-0.5, 4.0]]))
assert y.tolist() == [[0, 0], [2, 0], [0, 4]]
assert collector.compute()["1"].counts.tolist() == [[2, 0, 1], [1, 1, 1]]

sys.argv[1:] = ["doctor"]
runpy.run_module("fastentropy", run_name="__main__")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a folder with the wheel and the source distribution, built from the repository without a network."""
    return build(ROOT, tmp_path_factory.mktemp("built"), "--wheel", "--sdist")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Return a folder in which the wheel is installed without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def test_wheel_holds_only_the_two_packages(built):
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in files_below(folder)
        if path.suffix in SUFFIXES
    }
    assert {f"{package}/py.typed" for package in PACKAGES} < expected
    names = wheel_contents(built).keys()
    assert {name for name in names if ".dist-info/" not in name} == expected
    information = {name.split(".dist-info/")[1] for name in names - expected}
    assert information == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_wheel_metadata_list_dependencies(built):
    metadata = email.message_from_bytes(dist_info_file(built, "METADATA"))
    expected = ("fastentropy", fastentropy.__version__, ">=3.10")
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == expected
    extras = {"bench", "calibrate", "cifar10", "cli", "dev", "docs", "images", "onnx", "pretrained", "test"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    needed = {re.split(r"[ ;>=]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch", "triton", "numpy", "numba", "safetensors", "executing"}
    assert dist_info_file(built, "entry_points.txt").decode().split() == [
        *("[console_scripts]", "fastentropy", "=", "fastentropy.__main__:main")
    ]


def test_wheel_carries_licence_and_readme(built):
    metadata = email.message_from_bytes(dist_info_file(built, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert dist_info_file(built, "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_changelog_begins_with_the_version(built):
    version = email.message_from_bytes(dist_info_file(built, "METADATA"))["Version"]
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## "))
    assert version in first


def test_sdist_holds_the_sources_of_the_wheel(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in PACKAGES.values()
        for path in files_below(folder)
        if path.suffix in SUFFIXES
    }
    assert names == sources | {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", ".gitignore"}


def test_sdist_builds_the_same_wheel(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build(source, tmp_path / "again", "--wheel")
    assert wheel_contents(again) == wheel_contents(built)


def test_installed_wheel_collects_and_its_doctor_succeeds(installed, tmp_path):
    run(sys.executable, "-c", COLLECT, installed, folder=tmp_path, PYTHONPATH=str(installed))


def build(source, folder, *formats):
    """Build a source tree into a folder with the installed hatchling."""
    run(sys.executable, "-m", "build", "--no-isolation", *formats, "--outdir", folder, source)
    return folder


def run(*command, folder=None, **variables):
    """Run a command and fail with its output if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout


def files_below(folder):
    """Return the files of a package on disk, without compiled Python files."""
    return {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def wheel_contents(folder):
    """Return the files of the wheel: name in the archive to bytes."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def dist_info_file(folder, name):
    """Return a file of the wheel's dist-info folder as bytes."""
    (content,) = (content for path, content in wheel_contents(folder).items() if path.endswith(f".dist-info/{name}"))
    return content
