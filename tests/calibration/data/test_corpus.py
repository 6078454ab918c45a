"""A corpus is made of the files that the user names; those that cannot be used are problems."""

import json
import os
import re
import sys

import pyarrow as pa
import pytest

from fastentropy._utils.optional import install_command
from fastentropy.calibration.data import images
from fastentropy.calibration.data.corpus import open_corpus
from tests._helpers.corpora import contents, problems_of, write_parquet


def test_image_files(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ROWS_PER_CHUNK", 3)
    monkeypatch.setattr(images, "MAX_IMAGE", 100)
    for name in range(8):
        (tmp_path / f"{name}.JPG").write_bytes(b"x" * (name + 1))
    (tmp_path / "4.JPG").write_bytes(b"x" * 101)
    corpus = open_corpus(str(tmp_path))
    assert corpus.chunks == 3
    assert corpus.size == sum(chunk.size for chunk in corpus.read()) == 36 - 5 + 101
    assert contents(corpus) == [b"x" * size for size in (1, 2, 3, 4, 6, 7, 8)]
    assert contents(corpus, 1, 2) == [b"x" * 4, b"x" * 6]


def test_folder_in_order(tmp_path):
    for name in ("b/2.md", "b/1.txt", "a.jsonl", "c.parquet", ".git/x.txt", ".hidden.txt", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    write_parquet(tmp_path / "c.parquet", ["c.parquet"])
    (tmp_path / "d.txt").symlink_to(tmp_path / "b" / "1.txt")
    assert contents(open_corpus(str(tmp_path))) == ["a.jsonl", "b/1.txt", "b/2.md", "c.parquet", "b/1.txt"]
    assert contents(open_corpus(str(tmp_path / "b" / "*"))) == ["b/1.txt", "b/2.md"]
    assert contents(open_corpus(str(tmp_path / "**"))) == ["a.jsonl", "b/1.txt", "b/2.md", "c.parquet", "b/1.txt"]
    assert contents(open_corpus(str(tmp_path / "**" / "*.md"))) == ["b/2.md"]


def test_bad_files_are_problems(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "denied.txt").write_text("secret")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    write_parquet(tmp_path / "column.parquet", ["a"], column="story")
    write_parquet(tmp_path / "type.parquet", [1], column="text")
    write_parquet(tmp_path / "rows.parquet", [], type=pa.string())
    monkeypatch.setattr(os, "access", lambda path, mode: "denied" not in path)
    corpus = open_corpus(str(tmp_path))
    assert contents(corpus) == ["good"]
    found = dict(problems_of(corpus))
    assert len(found) == 8
    for name, what in [
        ("empty.txt", "is empty"),
        ("rows.parquet", "is empty"),
        ("pipe.txt", "is not a file"),
        ("denied.txt", "cannot be read: Permission denied"),
        ("broken.txt", "cannot be read: No such file or directory"),
        (
            "column.parquet",
            "has the columns story, label; expected text or image or img; name one with --column",
        ),
        ("type.parquet", "has a column text of type int64; expected strings, or the bytes of images"),
    ]:
        assert found[name, what] == (0, 1)


def test_deleted_file_is_a_problem_of_each_chunk(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    corpus = open_corpus(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    assert contents(corpus) == ["b"]
    assert problems_of(corpus) == {("a.txt", "cannot be read: No such file or directory"): (0, 1)}


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "", "holds no file that can be used; expected .txt"),
        ({"a.txt": ""}, "", r"holds no file that can be used; .*a\.txt is empty"),
        ({"a.txt": ""}, "*.md", "holds no file that can be used; expected .txt"),
        ({"a.bin": "1"}, "a.bin", "is not of a kind that can be read; expected .txt"),
        ({}, "missing.txt", "does not exist; expected a file, a folder, a glob pattern or the name"),
        ({}, "a/b/c/d", "does not exist"),
        ({"a.txt": "1", "b.png": "1"}, "", r"holds text \(.*a\.txt\) and images \(.*b\.png\); expected only one kind"),
    ],
)
def test_invalid_source_is_one_line(tmp_path, files, source, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_corpus(str(tmp_path / source) if source else str(tmp_path))
    assert "\n" not in str(error.value)


def test_fingerprint_of_files(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_text('{"text": 1}')
    before = open_corpus(str(tmp_path / "x"))
    assert open_corpus(str(tmp_path / "x")).fingerprint == before.fingerprint
    assert open_corpus(str(tmp_path / "x"), column="story").fingerprint != before.fingerprint
    os.rename(tmp_path / "x", tmp_path / "y")
    assert open_corpus(str(tmp_path / "y")).fingerprint == before.fingerprint
    (tmp_path / "y" / "b.txt").write_text("b")
    more = open_corpus(str(tmp_path / "y"))
    assert more.fingerprint != before.fingerprint
    (tmp_path / "y" / "b.txt").write_text("bb")
    assert open_corpus(str(tmp_path / "y")).fingerprint != more.fingerprint


def test_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert {open_corpus(source).fingerprint for source in (".", "a.txt", "*.txt", str(tmp_path))} == {
        open_corpus("a.txt").fingerprint
    }


@pytest.mark.parametrize("name", ["datasets", "pyarrow"])
def test_missing_package_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ValueError, match=f"needs {name}: {re.escape(install_command('calibrate'))}$"):
        open_corpus("org/name" if name == "datasets" else str(tmp_path))
