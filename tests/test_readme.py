"""What the README shows runs, and what it says was measured."""

import json
import re
from pathlib import Path

import fastentropy as fe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", README, re.DOTALL)):
        path = tmp_path / f"block{index}.py"
        path.write_text(block, encoding="utf-8")
        exec(compile(block, path, "exec"), namespace)
    assert [site.name for site in fe.find_sites(namespace["block"], (namespace["x"],))] == ["relu", "relu_1", "gelu"]
    assert (tmp_path / "model.pt2").exists()


def test_every_figure_of_collecting_is_in_a_recorded_run():
    results = ROOT / "bench" / "results"
    records = [
        json.loads((results / name).read_text(encoding="utf-8")) for name in ("collect-epyc.json", "collect-epyc-swin_t.json")
    ]
    (text,) = re.findall(r"^<!-- collect -->\n(.*?)\n\nActivations", README, re.DOTALL | re.MULTILINE)
    assert all(figure in " ".join(text.split()) for record in records for figure in (record["machine"], record["date"]))
    for case in records[0]["cases"]:
        ratios, memory = case["ratios_to_plain"], case["memory_bytes"]
        added = (memory["added_by_collecting"] / 1e6, (memory["published"] - memory["plain"]) / 1e6)
        published = ratios["published"]["median"]
        cells = (case["model"], spread(ratios), f"{published:.2f}", f"{added[0]:.2f} MB", f"{added[1]:.0f} MB")
        assert f"| {' | '.join(cells)} |" in text
    assert f"{records[1]['rounds']} rounds" in text
    assert spread(records[1]["cases"][0]["ratios_to_plain"]) in text


def spread(ratios):
    """A median ratio with its quartiles, as the README writes it."""
    collecting = ratios["collecting"]
    return f"{collecting['median']:.2f} ({collecting['lower_quartile']:.2f} to {collecting['upper_quartile']:.2f})"


def recorded(name):
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def section(name, end="The record"):
    """What stands behind a mark, up to the line that names the record."""
    (text,) = re.findall(rf"^<!-- {name} -->\n(.*?)\n\n{end}", README, re.DOTALL | re.MULTILINE)
    return text


def quartiles(ratio):
    return f"{ratio['median']:.3f} ({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})"


def test_every_figure_of_collecting_on_a_gpu_is_in_the_recorded_run():
    record, text = recorded("collect-h100"), section("collect-gpu")
    assert record["machine"] in text
    assert record["date"] in text
    for case in record["cases"]:
        ratios = case["ratios_to_plain"]
        cells = (case["model"], quartiles(ratios["collecting"]), quartiles(ratios["collecting graph"]))
        assert f"| {' | '.join(cells)} | {ratios['published']['median']:.2f} |" in text
        assert abs(case["peak_bytes"]["collecting"] - case["peak_bytes"]["plain"]) < 1e6
        assert f"{case['inputs'][0]} " in text


def test_every_figure_of_minilm_is_in_the_recorded_run():
    record, text = recorded("minilm"), " ".join(section("minilm").split())
    machine, overhead = record["machine"], record["overhead"]
    for figure in (machine["device"], machine["date"], f"{record['tokens']:,} tokens".replace(",", " ")):
        assert figure in text
    assert f"{record['tokens_per_second']:.0f} tokens per second on {record['ranks']} process" in text
    assert f"{overhead['ratio']:.3f} of that without, median of {overhead['samples']} batches" in text
    assert all(f"| {name} | {bits:.3f} |" in text for name, bits in record["layer_entropy"].items())


def test_every_figure_of_calibrating_is_in_the_recorded_run():
    record, text = recorded("calibrate-epyc"), section("calibrate")
    for figure in (record["machine"], record["date"], f"{record['rounds']} pairs"):
        assert figure in " ".join(text.split())
    for case in record["cases"]:
        speed = case["tokens_per_second"]
        cells = (
            f"{case['processes']}",
            f"{speed['plain']:.0f}",
            f"{speed['collecting']:.0f}",
            quartiles(case["collecting_over_plain"]),
            f"{case['sync_milliseconds']:.1f} ms",
            f"{case['large_sync_milliseconds']:.1f} ms",
        )
        assert f"| {' | '.join(cells)} |" in text


def test_every_figure_of_fusing_is_in_the_recorded_run():
    record = json.loads((ROOT / "bench" / "results" / "fusion-epyc.json").read_text(encoding="utf-8"))
    (text,) = re.findall(r"^<!-- fusion -->\n(.*?)\n\nThe record", README, re.DOTALL | re.MULTILINE)
    blocks = [case for case in record["cases"] if "features" in case["name"]]
    fast = sum(case["folded_over_fused"]["median"] >= 1.5 for case in blocks)
    assert f"{fast} of {len(blocks)} blocks" in " ".join(text.split())
    assert record["machine"] in text
    assert record["date"] in text
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in text.splitlines() if row.startswith("| ")}
    cases = [case for case in record["cases"] if case["name"] in rows]
    assert len(cases) == len(rows) - 2 == 4
    for case in cases:
        times, ratio, counts = case["milliseconds"], case["folded_over_fused"], case["multiplications_in_chains"]
        cells = (
            f"{times['folded']:.2f} ms",
            f"{times['fused']:.2f} ms",
            f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})",
            f"{counts['folded'] / counts['fused']:.2f}",
        )
        assert rows[case["name"]] == f"| {case['name']} | {' | '.join(cells)} |"


def test_every_figure_of_the_criteria_is_in_the_recorded_run():
    record = json.loads((ROOT / "bench" / "results" / "criteria-epyc.json").read_text(encoding="utf-8"))
    (text,) = re.findall(r"^<!-- criteria -->\n(.*?)\n\nThe record", README, re.DOTALL | re.MULTILINE)
    seeds = {run["seed"] for run in record["runs"]}
    for figure in (record["machine"], record["date"], f"{len(seeds)} seeds", f"{record['epochs']} epochs"):
        assert figure in " ".join(text.split())
    for limit, rows in record["summary"].items():
        for criterion, row in rows.items():
            cells = (
                f"{100 * float(limit):.1f}",
                criterion,
                f"{row['removed']:.1f}",
                f"{100 * row['test_change']:+.2f}",
                f"{row['speedup']:.2f} ({row['least_speedup']:.2f} to {row['most_speedup']:.2f})",
            )
            assert f"| {' | '.join(cells)} |" in text


def test_every_figure_of_cifar10_is_in_the_recorded_run():
    history = json.loads((ROOT / "bench" / "results" / "cifar10-resnet8.json").read_text(encoding="utf-8"))
    (text,) = re.findall(r"^<!-- cifar10 -->\n(.*?)\n\nThe record", README, re.DOTALL | re.MULTILINE)
    for figure in (history["machine"]["device"], history["machine"]["date"], f"seed {history['seed']}"):
        assert figure in " ".join(text.split())
    for index, step in enumerate(history["steps"]):
        cells = (
            ", ".join(step["removed"]) or "dense",
            f"{100 * step['validation']:.2f}",
            f"{100 * step['test']:.2f}",
            f"{step['latency_ms']['fused']:.2f} ms",
            "kept" if index == history["kept_step"] else "",
        )
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in text


def test_every_figure_of_the_result_is_in_the_recorded_run():
    history = json.loads((ROOT / "bench" / "results" / "digits.json").read_text(encoding="utf-8"))
    (result,) = re.findall(r"^<!-- digits -->\n(.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    dense, kept, times = history["steps"][0], history["steps"][history["kept_step"]], history["latency_ms"]
    removed = sum(len(step["removed"]) for step in history["steps"][: history["kept_step"] + 1])
    figures = [
        f"{removed} of {len(dense['layer_entropy'])} activations",
        *(f"{100 * step['test']:.2f} %" for step in (dense, kept)),
        *(f"{times[name]:.2f} ms" for name in ("dense", "dense_fused", "pruned", "fused")),
        *(f"{times[name] / times['fused']:.2f}×" for name in ("dense", "dense_fused", "pruned")),
        history["machine"]["device"],
        history["machine"]["date"],
    ]
    assert all(figure in " ".join(result.split()) for figure in figures)
