import pytest

from fastentropy import timing


def test_times_are_medians_in_milliseconds_of_interleaved_rounds(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "_clock", lambda: now[0])

    def function(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds * (100 if len(calls) == 40 else 1)  # one round is disturbed

        return call

    times = timing.measure_times({"a": function("a", 0.003), "b": function("b", 0.005)}, rounds=9)
    assert times == {"a": pytest.approx(3.0), "b": pytest.approx(5.0)}
    assert "".join(calls).endswith("ab" * 9)


def test_a_short_function_is_repeated_to_fill_its_round(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "_clock", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 1e-5

    times = timing.measure_times({"a": call}, rounds=3, round_seconds=1e-3)
    assert times["a"] == pytest.approx(0.01)
    assert len(calls) == pytest.approx(2 + 3 * 100, abs=3)
