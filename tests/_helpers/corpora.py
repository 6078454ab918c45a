"""Read all of a corpus, which is divided into chunks of documents, and write parquet files for one."""

import itertools
import os

import pyarrow as pa
import pyarrow.parquet as pq

from fastentropy.calibration.data.documents import Problems


def contents(corpus, first=0, step=1):
    return [document.content for chunk in corpus.read(first, step) for document in chunk.documents]


def by_chunk(corpus, ranks, first=0):
    """Read a corpus as several ranks would, each of which reads every `ranks`-th chunk.

    Args:
        corpus: the corpus.
        ranks: the number of ranks.
        first: the number of the first chunk to read.

    Returns:
        The documents and the problems of each chunk, by the number of the chunk.
    """
    readers = [corpus.read(first + rank, ranks) for rank in range(ranks)]
    found = {}
    for chunk in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*readers))):
        assert chunk.number not in found
        found[chunk.number] = ([document.content for document in chunk.documents], list(chunk.problems))
    return found


def problems_of(corpus):
    """Return the problems of a corpus and of all its chunks: (file name, kind of problem) → (first position, how often)."""
    problems = Problems(corpus.problems)
    for chunk in corpus.read():
        list(chunk.documents)
        problems.update(chunk.problems)
    return {(os.path.basename(path), what): (position, times) for path, what, _, position, times in problems}


def write_parquet(path, values, rows_per_group=1 << 20, column="text", type=None):
    pq.write_table(pa.table({column: pa.array(values, type), "label": range(len(values))}), path, rows_per_group)
