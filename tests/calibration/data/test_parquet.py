"""On any number of ranks, the chunks of parquet files contain each row once, in order."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy.calibration.data import parquet
from fastentropy.calibration.data.corpus import open_corpus
from fastentropy.calibration.data.documents import ROWS_PER_CHUNK
from tests._helpers.corpora import by_chunk, contents, problems_of, write_parquet


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
