"""Runs that replace single neurons: their counts, page, picture and table, and what a damaged history is refused for."""

import copy

import pytest

from fastentropy.cli.console import print_history
from fastentropy.reporting.comparison import plot_comparison, write_comparison
from fastentropy.reporting.history import RunHistory, check_history
from fastentropy.reporting.run_report import plot_summary, write_report
from tests._helpers.histories import make_history, make_neuron_history

SITES = [f"stage{index}.relu" for index in range(4)]
HISTORY = make_neuron_history(SITES, 4, kept_step=2)


def test_counts():
    run = RunHistory(HISTORY)
    assert run.depths == [0, 12, 24, 36]
    assert (run.unit, run.removed) == ("neurons replaced", 0)
    assert run.neuron_shares == dict.fromkeys(SITES, (4 / 16, 2 / 16))


def test_removed_activations_count_as_such():
    run = RunHistory(make_neuron_history(SITES, 6))
    assert (run.removed, run.depths[-1]) == (1, 60)


def test_layer_runs_have_no_neurons():
    run = RunHistory(make_history(SITES, 3))
    assert (run.unit, run.depths) == ("activations removed", [0, 1, 2])
    assert set(run.neuron_shares.values()) == {(0.0, 0.0)}


def test_page_shows_the_states(tmp_path):
    write_report(HISTORY, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The activation of 24 neurons is removed" in page
    assert page.count('<svg class="phone"') == page.count('<svg class="screen"') == 5
    assert page.count("2 linear, 1 constant") == 12
    assert page.count("the dense network\n") == 1


def test_picture(tmp_path):
    plot_summary(HISTORY, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_with_a_layer_run(tmp_path):
    runs = {"neurons": HISTORY, "layers": make_history(SITES, 3)}
    write_comparison(runs, tmp_path / "comparison.html")
    plot_comparison(runs, tmp_path / "comparison.png")
    assert "neurons" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_table_counts_neurons(tmp_path, capsys):
    from rich.console import Console

    print_history(HISTORY, tmp_path, Console(width=80))
    printed = capsys.readouterr().out
    assert printed.count("12 neurons") == 3
    assert "neurons  24 replaced" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": {"neurons": 16, "linear": 1, "constant": 1}}, "replaced neurons of other, which the dense network lacks"),
        ({SITES[0]: {"neurons": 16, "linear": 9, "constant": 8}}, "replaced no neurons of a site, or more than it has"),
        ({SITES[0]: {"neurons": 0, "linear": 0, "constant": 0}}, "replaced no neurons of a site"),
        ({SITES[0]: {"neurons": 16, "linear": 1}}, "lacks constant"),
        ([], "expected an object"),
    ],
)
def test_damaged_histories(change, message):
    history = copy.deepcopy(HISTORY)
    history["steps"][1]["neurons"] = change
    with pytest.raises(ValueError, match=message):
        check_history(history)
