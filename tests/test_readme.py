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
