"""The description of the machine, and the commit of the sources."""

import subprocess

import pytest

from fastentropy._utils import machine


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Make a repository like ours with one commit, in which the module seems to be."""
    for name in (
        "fastentropy/_utils/machine.py",
        "kernels/states.py",
        "bench/record.py",
        "bench/results/a.json",
        "docs/page.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "fastentropy" / "_utils" / "machine.py"))
    return tmp_path


def git(folder, *arguments):
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_clone(clone):
    assert machine.source_commit() == git(clone, "rev-parse", "HEAD")[:12]


@pytest.mark.parametrize(
    "name", ["fastentropy/_utils/machine.py", "fastentropy/new.py", "kernels/states.py", "bench/record.py"]
)
def test_changed_source_marks_the_commit(clone, name):
    (clone / name).write_text("changed")
    assert machine.source_commit() == git(clone, "rev-parse", "HEAD")[:12] + "+"


@pytest.mark.parametrize("name", ["bench/results/a.json", "bench/results/new.json", "docs/page.md"])
def test_changed_record_or_page_does_not_mark_the_commit(clone, name):
    (clone / name).write_text("changed")
    assert machine.source_commit() == git(clone, "rev-parse", "HEAD")[:12]


def test_no_commit_outside_a_clone(clone, monkeypatch):
    (clone / "site-packages" / "fastentropy" / "_utils").mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(clone / "site-packages" / "fastentropy" / "_utils" / "machine.py"))
    assert machine.source_commit() is None
    monkeypatch.setenv("PATH", "")
    assert machine.source_commit() is None


def test_processor_is_named_with_its_threads(monkeypatch):
    monkeypatch.setattr(machine, "_processor", lambda: "A processor")
    for threads, text in ((1, "A processor, 1 thread"), (8, "A processor, 8 threads")):
        monkeypatch.setattr(machine.torch, "get_num_threads", lambda threads=threads: threads)
        assert machine.describe_machine("cpu")["device"] == text
