"""Problems add up."""

import json

from fastentropy.calibration.data import documents
from fastentropy.calibration.data.documents import Place, Problem, Problems


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
