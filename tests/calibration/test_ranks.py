"""What one rank raises ends all ranks, with one message."""

import threading

import pytest

from fastentropy.calibration.ranks import Ranks, RemoteRankError, differing


class Exchange(Ranks):
    """Ranks that are threads."""

    def __init__(self, rank, number, barrier, values):
        super().__init__(rank, number)
        object.__setattr__(self, "_exchange", (barrier, values))

    def gather(self, value):
        barrier, values = self._exchange
        barrier.wait(10)
        values[self.rank] = value
        barrier.wait(10)
        return list(values)

    def broadcast(self, value):
        return self.gather(value)[0]


def on_ranks(number, function):
    """Call a function of Ranks on each of a number of ranks; return what it returned or raised there."""
    barrier, values, found = threading.Barrier(number), [None] * number, [None] * number

    def work(rank):
        try:
            found[rank] = function(Exchange(rank, number, barrier, values))
        except Exception as error:
            found[rank] = (type(error), str(error))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


QUIET = (RemoteRankError, "")


def refuse(ranks, *refusing, kind=ValueError):
    if ranks.rank in refusing:
        raise kind(f"no {ranks.rank}\nbut")
    return ranks.rank


@pytest.mark.parametrize(
    ("refusing", "kind", "outcomes"),
    [
        ([], ValueError, [0, 1, 2]),
        ([0], ValueError, [(ValueError, "no 0"), QUIET, QUIET]),
        ([2], OSError, [(ValueError, "rank 2: no 2"), QUIET, QUIET]),
        ([0, 1, 2], ValueError, [(ValueError, "no 0"), QUIET, QUIET]),
        ([1], KeyError, [QUIET, (KeyError, repr("no 1\nbut")), QUIET]),
        ([0], KeyError, [(KeyError, repr("no 0\nbut")), QUIET, QUIET]),
    ],
)
def test_run_on_all(refusing, kind, outcomes):
    assert on_ranks(3, lambda ranks: ranks.run_on_all(lambda: refuse(ranks, *refusing, kind=kind))) == outcomes


def test_run_on_first():
    assert on_ranks(3, lambda ranks: ranks.run_on_first(lambda: ranks.rank + 5)) == [5, 5, 5]
    assert on_ranks(2, lambda ranks: ranks.run_on_first(lambda: refuse(ranks, 0))) == [(ValueError, "no 0"), QUIET]


def test_require_equal():
    differing = on_ranks(3, lambda ranks: ranks.require_equal({"a": 1, "b": ranks.rank, **({"c": 1} if ranks.rank else {})}))
    assert differing[0][1].startswith("ranks 0 and 1 differ in b, c; give all ranks the same")
    assert differing[1:] == [QUIET, QUIET]
    assert on_ranks(3, lambda ranks: ranks.require_equal({"a": 1})) == [None] * 3


def test_single_rank():
    ranks = Ranks(0, 1)
    assert ranks.run_on_all(lambda: 3) == ranks.run_on_first(lambda: 3) == 3
    assert ranks.gather(3) == [3]
    ranks.require_equal({"a": 1})
    with pytest.raises(ValueError, match=r"^no 0$"):
        ranks.run_on_all(lambda: refuse(ranks, 0))
    with pytest.raises(KeyError):
        ranks.run_on_all(lambda: refuse(ranks, 0, kind=KeyError))


def test_differing():
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 2}) == []
    assert differing({"a": 1, "b": 2}, {"a": 3, "c": 4}) == ["a", "b", "c"]
