"""On any number of ranks, the chunks of a streamed data set contain each row once, in order."""

import itertools
import sys
from types import SimpleNamespace

import pytest

from fastentropy.calibration.data import streaming
from fastentropy.calibration.data.corpus import open_corpus
from tests._helpers.corpora import by_chunk, contents, problems_of


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
    with pytest.raises(OSError, match=r"^name cannot be read any further: connection lost$"):
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
    message = "org/none is neither a path nor a data set that can be opened: connection lost"
    with pytest.raises(ValueError, match=f"^{message}$"):
        open_corpus("org/none")


def test_fingerprint_of_a_stream(library):
    library.shards = [[{"text": "a", "story": "b"}]]
    assert len({open_corpus(*asked).fingerprint for asked in [("a",), ("b",), ("a:x",)]}) == 3
    assert open_corpus("a").fingerprint == open_corpus("a", column="text").fingerprint
    assert open_corpus("a").fingerprint != open_corpus("a", column="story").fingerprint


def test_is_dataset_name():
    assert all(map(streaming.is_dataset_name, ["a", "a/b", "a-b/c.d", "a/b:c", "a/b:c:d", "a::d"]))
    assert not any(map(streaming.is_dataset_name, ["", "/a", "a/b/c", "../a", "a b", "a:b:c:d", "~/a", "a/"]))
