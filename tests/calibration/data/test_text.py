"""On any number of ranks, the chunks of a text file contain each line once, in order."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy.calibration.data import text
from fastentropy.calibration.data.corpus import open_corpus
from fastentropy.calibration.data.documents import Problems
from fastentropy.calibration.data.text import TextFile, lines, parse_line
from tests._helpers.corpora import contents, problems_of

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
