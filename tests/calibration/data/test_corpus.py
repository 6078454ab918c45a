"""On any number of ranks, the chunks of a corpus contain each document once, in order, for every kind of file."""

import io
import itertools
import json
import os
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy._utils import optional
from fastentropy.calibration.data import documents, images, parquet, streaming, text
from fastentropy.calibration.data.corpus import open_corpus
from fastentropy.calibration.data.cursor import Cursor
from fastentropy.calibration.data.documents import ROWS_PER_CHUNK, Place, Problem, Problems
from fastentropy.calibration.data.text import TextFile, lines, parse_line


def contents(corpus, first=0, step=1):
    return [document.content for chunk in corpus.read(first, step) for document in chunk.documents]


def by_chunk(corpus, ranks, first=0):
    """Read a corpus with some ranks, which take turns; return the documents and problems of each chunk."""
    readers = [corpus.read(first + rank, ranks) for rank in range(ranks)]
    found = {}
    for chunk in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*readers))):
        assert chunk.number not in found
        found[chunk.number] = ([document.content for document in chunk.documents], list(chunk.problems))
    return found


def problems_of(corpus):
    """Return the problems of a corpus and of all its chunks."""
    problems = Problems(corpus.problems)
    for chunk in corpus.read():
        list(chunk.documents)
        problems.update(chunk.problems)
    return {(os.path.basename(path), what): (position, times) for path, what, _, position, times in problems}


def write_parquet(path, values, rows_per_group=1 << 20, column="text", type=None):
    pq.write_table(pa.table({column: pa.array(values, type), "label": range(len(values))}), path, rows_per_group)


# Text ----------------------------------------------------------------------------------------------------------------

ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \t\n", b""])
TEXTS = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=40).map(str.encode)
FILES = st.lists(st.tuples(TEXTS, ENDS), max_size=30).map(lambda pieces: b"".join(map(b"".join, pieces)))


def expected_lines(data):
    """Return the documents of a text file, by reading it as a whole."""
    found = [line.removesuffix(b"\r").decode() for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return [line for line in found if line.strip()]


@settings(max_examples=300)
@given(data=FILES, chunk_size=st.integers(1, 100), limit=st.sampled_from([100_000, 7]))
def test_each_line_is_in_the_chunk_of_its_first_byte(data, chunk_size, limit):
    found = []
    for start in range(0, len(data), chunk_size):
        stop = min(start + chunk_size, len(data))
        for position, line in lines(io.BytesIO(data), start, stop, limit):
            assert start <= position < stop
            found.append((position, line[: limit + 1]))
    whole = io.BytesIO(data)
    assert found == [(whole.tell() - len(line), line[: limit + 1]) for line in iter(whole.readline, b"")]


class Counting(io.BytesIO):
    """A file that counts the bytes read from it."""

    read_bytes = 0

    def readline(self, size=-1):
        line = super().readline(size)
        self.read_bytes += len(line)
        return line


def test_chunk_within_a_long_line_reads_itself_only():
    file = Counting(b"x" * 10_000)
    assert list(lines(file, 1000, 1100, limit=50)) == []
    assert file.read_bytes == 101


def test_too_long_line_is_read_in_part():
    file = Counting(b"x" * 10_000 + b"\nend")
    assert [(position, len(line)) for position, line in lines(file, 0, 100, limit=50)] == [(0, 52)]
    assert file.read_bytes == 100


@settings(max_examples=100)
@given(data=FILES.filter(bool), chunk_size=st.integers(1, 100), ranks=st.integers(1, 5))
def test_ranks_cover_a_text_file_once(tmp_path_factory, data, chunk_size, ranks):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(data)
    part = TextFile(str(path), len(data), parse_line, chunk_size)
    read = {}
    for rank in range(ranks):
        for chunk in range(rank, part.chunks, ranks):
            problems = Problems()
            read[chunk] = [document.content for document in part.read(chunk, problems)]
            assert not len(problems)
    assert [text for chunk in sorted(read) for text in read[chunk]] == expected_lines(data)
    assert sum(map(part.size_of, range(part.chunks))) == len(data)


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 19, 20, 21])
def test_lines_near_the_chunk_size(tmp_path, length):
    data = b"\n".join([b"a" * length] * 7)
    (tmp_path / "a.txt").write_bytes(data)
    part = TextFile(str(tmp_path / "a.txt"), len(data), parse_line, 10)
    found = [document for chunk in range(part.chunks) for document in part.read(chunk, Problems())]
    assert [document.content for document in found] == expected_lines(data)
    assert [document.place.position for document in found] == [i * (length + 1) for i in range(7) if length]


def test_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\nb")
    assert contents(open_corpus(str(tmp_path / "a.txt"))) == ["a", "b"]


def test_bad_lines_are_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_TEXT", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\xfe\ntwo\n" + b"x" * (2 << 20) + b"\n\xffbad\nthree")
    corpus = open_corpus(str(tmp_path))
    assert contents(corpus) == ["one", "two", "three"]
    assert problems_of(corpus) == {
        ("a.txt", "a line is not UTF-8"): (4, 2),
        ("a.txt", "a line is longer than 1 MB"): (11, 1),
    }


def test_json_lines(tmp_path):
    rows = [
        {"text": "one"},
        {"text": "two", "n": 1},
        {"text": ""},
        {"text": None},
        {"n": 1},
        {"text": "\ud800"},
        {"text": "é\n"},
    ]
    text = "\n".join([*map(json.dumps, rows), "no json", "[1]", "[" * 100_000, "", '{"text": "end"}'])
    (tmp_path / "a.jsonl").write_text(text)
    corpus = open_corpus(str(tmp_path))
    assert contents(corpus) == ["one", "two", "é\n", "end"]
    assert {what: times for (_, what), (_, times) in problems_of(corpus).items()} == {
        "no text under 'text'; name another column with --column": 2,
        "a text is not Unicode": 1,
        "a line is not JSON": 2,
        "a line is not a JSON object": 1,
    }


def test_json_lines_with_a_column(tmp_path):
    (tmp_path / "a.ndjson").write_text('{"text": "no", "story": "yes"}')
    assert contents(open_corpus(str(tmp_path), column="story")) == ["yes"]


# Parquet -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    per_group=st.integers(50, 400),
    ranks=st.integers(1, 4),
    first=st.integers(0, 5),
)
def test_ranks_cover_parquet_files_once(tmp_path_factory, rows, per_group, ranks, first):
    folder, texts = tmp_path_factory.mktemp("parquet"), []
    for number, count in enumerate(rows):
        texts.append([f"{number}/{row}" for row in range(count)])
        write_parquet(folder / f"{number}.parquet", texts[-1], per_group)
    corpus = open_corpus(str(folder))
    whole = by_chunk(corpus, 1)
    assert len(whole) == corpus.chunks
    assert [text for chunk in sorted(whole) for text in whole[chunk][0]] == list(itertools.chain(*texts))
    assert max(len(found) for found, _ in whole.values()) <= ROWS_PER_CHUNK
    assert by_chunk(corpus, ranks, first) == {chunk: found for chunk, found in whole.items() if chunk >= first}
    assert sum(chunk.size for chunk in corpus.read()) == corpus.size


def test_chunk_reads_only_its_row_group(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [str(row) for row in range(2000)], 500)
    opened = []
    original = parquet._open_row_group
    monkeypatch.setattr(parquet, "_open_row_group", lambda *asked: opened.append(asked) or original(*asked))
    corpus = open_corpus(str(tmp_path))
    chunk = next(corpus.read(5))
    assert next(chunk.documents).content == str(1000 + 256)
    assert [(source.number, start) for source, start in opened] == [(2, 256)]


def test_reading_in_order_opens_each_row_group_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [str(row) for row in range(2000)], 1000)
    opened = []
    original = parquet._open_row_group
    monkeypatch.setattr(parquet, "_open_row_group", lambda *asked: opened.append(asked) or original(*asked))
    assert len(contents(open_corpus(str(tmp_path)))) == 2000
    assert len(opened) == 2


STORED = {
    "struct": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "bytes": pa.binary(),
    "large bytes": pa.large_binary(),
}


@pytest.mark.parametrize("column", ["image", "img", "photo"])
@pytest.mark.parametrize("stored", STORED)
def test_parquet_images(tmp_path, column, stored):
    secret = tmp_path / "secret"
    secret.write_bytes(b"not named by anybody")
    cells = [{"bytes": b"1", "path": "a"}, {"bytes": None, "path": str(secret)}, None, {"bytes": b"2", "path": None}]
    if stored != "struct":
        cells = [cell and cell["bytes"] for cell in cells]
    write_parquet(tmp_path / "a.parquet", cells, column=column, type=STORED[stored])
    corpus = open_corpus(str(tmp_path), column=column if column == "photo" else None)
    assert corpus.kind == "images"
    assert contents(corpus) == [b"1", b"2"]
    assert list(problems_of(corpus).values()) == [(1, 2)]


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_texts(tmp_path, type):
    write_parquet(tmp_path / "a.parquet", ["one", None, "", "two"], type=type)
    corpus = open_corpus(str(tmp_path))
    assert contents(corpus) == ["one", "two"]
    assert list(problems_of(corpus).values()) == [(1, 1)]


def test_parquet_text_that_is_not_utf8(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    )
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    corpus = open_corpus(str(tmp_path))
    assert contents(corpus) == ["a", "b"]
    assert problems_of(corpus) == {("a.parquet", "a text is not UTF-8"): (1, 1)}


def test_corrupt_row_group_loses_its_rows(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{row:0200}" for row in range(1200)]
    table = pa.table({"text": texts})
    pq.write_table(table, path, 400, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    corpus = open_corpus(str(path))
    assert contents(corpus) == texts[:400] + texts[800:]
    assert list(problems_of(corpus).values()) == [(400, 400)]


# Image files, and what files there are ---------------------------------------------------------------------------------


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


# Streams -------------------------------------------------------------------------------------------------------------


class Stream:
    """Stands for an IterableDataset: shards of rows, each of which resharding splits in two."""

    def __init__(self, shards, log, breaks_at=None):
        self.shards, self.log, self.breaks_at = shards, log, breaks_at
        self.num_shards = len(shards)
        self.column_names = None

    def __iter__(self):
        for number, row in enumerate(itertools.chain(*self.shards)):
            if number == self.breaks_at:
                raise RuntimeError("connection lost\nand much more")
            self.log.append(row)
            yield row

    def _with(self, shards):
        return Stream(shards, self.log, self.breaks_at)

    def decode(self, enable):
        assert enable is False
        return self

    def reshard(self):
        return self._with([half for shard in self.shards for half in (shard[: len(shard) // 2], shard[len(shard) // 2 :])])

    def select_columns(self, names):
        return self._with([[{name: row[name] for name in names} for row in shard] for shard in self.shards])

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return self._with([self.shards[index]])

    def skip(self, count):
        rows = list(itertools.chain(*self.shards))
        return self._with([rows[count:]])


@pytest.fixture
def library(monkeypatch):
    """Stands for `datasets`; records the calls and the rows that were read."""
    asked = SimpleNamespace(calls=[], rows=[], shards=[[{"id": 1, "text": "a"}]], breaks_at=None)

    def load_dataset(path, config, *, split, streaming):
        assert streaming
        asked.calls.append((path, config, split))
        return Stream(asked.shards, asked.rows, asked.breaks_at)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("name", ("name", None, "train")),
        ("org/na-me.v1", ("org/na-me.v1", None, "train")),
        ("org/name:config", ("org/name", "config", "train")),
        ("org/name:config:test", ("org/name", "config", "test")),
        ("org/name::test", ("org/name", None, "test")),
    ],
)
def test_data_set_name_is_parsed(library, source, call):
    corpus = open_corpus(source)
    assert library.calls == [call]
    assert (corpus.kind, corpus.size, contents(corpus)) == ("text", None, ["a"])


@pytest.mark.parametrize("shards", [1, 40])
@pytest.mark.parametrize("rows", [0, 1, 256, 257, 5000])
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_cover_a_stream_once(library, shards, rows, ranks):
    """Resharding turns 40 shards into many, but not a single shard."""
    texts = [f"{row}" for row in range(rows)]
    library.shards = [[{"text": text} for text in texts[start::shards]] for start in range(shards)]
    ordered = [row["text"] for shard in library.shards for row in shard]
    if not rows:
        with pytest.raises(ValueError, match="has the columns ; expected"):
            open_corpus("org/name")
        return
    corpus = open_corpus("org/name")
    assert corpus.chunks == (None if shards == 1 else 80)
    whole = by_chunk(corpus, 1)
    assert list(itertools.chain(*(whole[chunk][0] for chunk in sorted(whole)))) == ordered
    for first in (0, 1, 7):
        assert by_chunk(corpus, ranks, first) == {chunk: found for chunk, found in whole.items() if chunk >= first}


def test_rank_reads_a_stream_once(library):
    library.shards = [[{"text": f"{row}"} for row in range(2000)]]
    corpus = open_corpus("name")
    library.rows.clear()
    assert len(contents(corpus, 1, 3)) == 2 * 256 + (2000 - 7 * 256)
    assert len(library.rows) == 2000 - 256


def test_chunk_of_bad_rows_is_not_the_end(library):
    library.shards = [[{"text": ""}, *[{"text": None}] * 600, {"text": "end"}]]
    corpus = open_corpus("name")
    assert contents(corpus) == ["end"]
    assert list(problems_of(corpus).values()) == [(1, 600)]


def test_stream_images(library):
    library.shards = [[{"image": {"bytes": b"1", "path": None}}, {"image": {"bytes": None, "path": "/etc/passwd"}}]]
    corpus = open_corpus("name")
    assert (corpus.kind, contents(corpus)) == ("images", [b"1"])
    assert list(problems_of(corpus).values()) == [(1, 1)]


def test_broken_stream_is_an_error(library):
    library.shards, library.breaks_at = [[{"text": f"{row}"} for row in range(2000)]], 1000
    corpus = open_corpus("name")
    with pytest.raises(OSError, match=r"^name cannot be read any further: connection lost and much more$"):
        contents(corpus)


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"id": 1}], None, "^name has the columns id; expected text or image or img; name one with --column$"),
        ([{"id": 1}], "id", "^name holds neither text nor images under 'id'; name another column with --column$"),
        ([{"text": "a"}], "story", "^name has the columns text; expected story; name one of these with --column$"),
    ],
)
def test_stream_without_documents(library, rows, column, message):
    library.shards = [rows]
    with pytest.raises(ValueError, match=message):
        open_corpus("name", column=column)


def test_data_set_that_cannot_be_opened(library):
    library.breaks_at = 0
    message = "org/none is neither a path nor a data set that can be opened: connection lost and much more"
    with pytest.raises(ValueError, match=f"^{message}$"):
        open_corpus("org/none")


@pytest.mark.parametrize("name", ["datasets", "pyarrow"])
def test_missing_package_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ValueError, match=rf'needs {name}: pip install "fastentropy\[calibrate\]"$'):
        open_corpus("org/name" if name == "datasets" else str(tmp_path))


def test_fingerprint_of_a_stream(library):
    library.shards = [[{"text": "a", "story": "b"}]]
    assert len({open_corpus(*asked).fingerprint for asked in [("a",), ("b",), ("a:x",)]}) == 3
    assert open_corpus("a").fingerprint == open_corpus("a", column="text").fingerprint
    assert open_corpus("a").fingerprint != open_corpus("a", column="story").fingerprint


# Parts of it ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(data=st.data(), sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_cursor_reads_any_ranges_in_turn(data, sizes):
    def open_source(source, start):
        yield from range(start, sizes[source])

    cursor = Cursor(open_source)
    readers = []
    for _ in range(data.draw(st.integers(1, 5))):
        source, start = data.draw(st.integers(0, len(sizes) - 1)), data.draw(st.integers(0, 12))
        stop = data.draw(st.integers(start, 13))
        expected = [(row, row) for row in range(start, min(stop, sizes[source]))]
        readers.append((cursor.rows(source, start, stop), expected, []))
    for which in data.draw(st.lists(st.sampled_from(range(len(readers))), max_size=60)):
        reader, _, found = readers[which]
        found.extend(itertools.islice(reader, 1))
    for reader, expected, found in readers:
        assert [*found, *reader] == expected


def test_problems_add_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(documents, "MAX_PROBLEMS", 2)
    problems = Problems([Problem("a", "bad", "byte", 7, 2)])
    for path, position in [("a", 9), ("b", 3), ("c", 4), ("d", 5), ("a", 1)]:
        problems.add(Place(path, "byte", position), "bad")
    assert list(problems) == [
        Problem("a", "bad", "byte", 1, 4), Problem("b", "bad", "byte", 3, 1), Problem("further files", "bad", "byte", 0, 2),
    ]  # fmt: skip
    again = Problems(Problem(*row) for row in json.loads(json.dumps(list(problems))))
    assert list(again) == list(problems)
    assert str(next(iter(again))) == "a: bad (4 ×, first at byte 1)"


def test_require_names_the_package(monkeypatch):
    assert optional.require("json", "this") is json
    with pytest.raises(ValueError, match=r'^this needs no_such: pip install "fastentropy'):
        optional.require("no_such.module", "this")


def test_is_dataset_name():
    assert all(map(streaming.is_dataset_name, ["a", "a/b", "a-b/c.d", "a/b:c", "a/b:c:d", "a::d"]))
    assert not any(map(streaming.is_dataset_name, ["", "/a", "a/b/c", "../a", "a b", "a:b:c:d", "~/a", "a/"]))
