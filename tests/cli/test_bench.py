"""`fastentropy bench`: its options, table, record and plot. Most tests measure made-up cases."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastentropy.benchmarks import runner
from fastentropy.benchmarks.measurements import Case
from fastentropy.benchmarks.records import Record
from fastentropy.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def nothing():
    """Do nothing, as an operation that takes no time."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """Return the (device, dtypes, sizes) that the made-up cases of each benchmark were requested for."""
    asked = []

    def cases(*arguments):
        asked.append(arguments)
        for name in ("one", "two"):
            facts = {"layout": "rows", "dtype": "float32", "activation": "relu", "values": 8, "cuda_graph": False}
            operations = {"activation alone": nothing, "count_states": nothing}
            sizes = dict.fromkeys(operations, 8)
            yield Case(name, operations, "activation alone", sizes, "activation alone", dict.fromkeys(operations, facts))

    for name, benchmark in runner.BENCHMARKS.items():
        monkeypatch.setitem(runner.BENCHMARKS, name, dataclasses.replace(benchmark, cases=cases, rounds=3))
    return asked


def assert_refused(result, text, asked, folder, files=()):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error"))
    assert re.search(text, line), line
    assert not asked
    assert sorted(path.name for path in folder.rglob("*")) == sorted(files)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Run the benchmark on tiny tensors, without compiling the compiled baseline, which takes long."""
    folder = tmp_path_factory.mktemp("bench")
    options = ("--device", "cpu", "--dtype", "float32", "--sizes", "4k", "--rounds", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastentropy.benchmarks.kernels.compiled", lambda function: function)
        return folder, invoke("kernels", *options, "--record", folder / "record.json")


@pytest.mark.slow
def test_kernels_are_measured_plotted_and_recorded(kernels):
    folder, result = kernels
    assert result.exit_code == 0, result.output
    assert (folder / "record.png").stat().st_size > 10_000
    record = Record.load(folder / "record.json")
    assert record.complete
    assert list(record.cases()) == [
        "relu on rows, 4 × 1024, float32",
        "relu on planes, 1 × 64 × 56 × 56, float32",
        "silu on rows, 4 × 1024, float32",
    ]
    assert all(each.percent_of_roof > 0 for each in record.measurements if not each.skipped)
    assert {each.operation for each in record.measurements if not each.skipped} >= {
        "copy",
        "activation_states",
        "PyTorch counting",
    }


@pytest.mark.slow
def test_shown_figures_are_in_the_record(kernels):
    folder, result = kernels
    for each in Record.load(folder / "record.json").measurements:
        if not each.skipped:
            assert re.search(rf"{each.operation} .* {each.ratio.median:.2f} .* {each.percent_of_roof:.0f} %", result.output)
    assert max(map(len, result.stdout.split("\nrecord   ")[0].splitlines())) <= 80


@pytest.mark.slow
def test_files_go_to_the_folder_runs_by_default(asked, tmp_path):
    result = invoke("fuse", "--device", "cpu")
    assert result.exit_code == 0, result.output
    record, picture = sorted((tmp_path / "runs").iterdir())
    assert re.fullmatch(r"bench-fuse-\d{8}-\d{6}\.json", record.name)
    assert picture.name == record.with_suffix(".png").name
    assert result.output.endswith(f"record   runs/{record.name}\nplot     runs/{picture.name}\n")


def test_files_go_to_the_named_paths(asked, tmp_path):
    result = invoke("collect", "--device", "cpu", "--record", "a.json", "--plot", "b.svg")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.svg"]
    assert Record.load("a.json").complete


def test_json_is_the_record_and_nothing_else(asked, tmp_path):
    result = invoke("collect", "--device", "cpu", "--json", "--record", "a.json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_options_select_device_dtype_and_sizes(asked):
    assert invoke("kernels", "--device", "cpu", "--dtype", "float16", "--sizes", "1k,2").exit_code == 0
    assert invoke("--device", "cpu").exit_code == 0
    shown = [(device.type, [str(dtype) for dtype in dtypes], list(sizes)) for device, dtypes, sizes in asked]
    assert shown == [("cpu", ["torch.float16"], [2, 1024]), ("cpu", ["torch.float32", "torch.bfloat16"], [])]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["kernel"], "there is no benchmark 'kernel'; name one of kernels, collect, fuse"),
        (["--dtype", "int8"], "--dtype int8 is none of float32, bfloat16, float16"),
        (["--sizes", "1M,many"], "--sizes 1M,many: 'many' is no size"),
        (["--sizes", "0"], "'0' is no size"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--rounds", "1"], "--rounds"),
        (["--record", "missing/record.json"], r"missing/record\.json cannot be written; name a file in a folder that exists"),
        (["--record", "record.txt"], r"record\.txt cannot be written; name a file that ends in \.json"),
        (["--record", "record.png"], r"record\.png cannot be written; name a file that ends in \.json"),
        (["--plot", "picture.jpg"], r"picture\.jpg: a plot is saved as \.png, \.svg, \.pdf"),
        (["--plot", "missing/picture.png"], r"missing/picture\.png cannot be written"),
        (["--compare", "missing.json"], r"missing\.json"),
        (["--compare", "."], "Is a directory"),
        (["--json", "--compare", "old.json"], "--json prints the record without the table of --compare"),
        (["--sweep"], "--sweep tries launch configurations of the state kernels on a GPU, not of 'kernels' on cpu"),
        (["fuse", "--sweep"], "not of 'fuse' on cpu"),
        (["--sweep", "--dtype", "float32", "--record", "a.json"], "leave out --dtype, --record"),
        (["--sweep", "--json"], "leave out --json"),
    ],
)
def test_bad_input_is_one_line_and_has_no_effect(asked, tmp_path, arguments, text):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert_refused(invoke(*arguments, *device), text, asked, tmp_path)


def test_folder_at_the_path_of_the_record_is_refused(asked, tmp_path):
    (tmp_path / "a.json").mkdir()
    assert_refused(invoke("--record", "a.json"), r"a\.json cannot be written", asked, tmp_path, ["a.json"])


@pytest.mark.parametrize("content", ["", "[]", '{"recipe": "digits"}'])
def test_damaged_old_record_is_refused(asked, tmp_path, content):
    (tmp_path / "old.json").write_text(content)
    assert_refused(invoke("--compare", "old.json"), r"old\.json is damaged or no record", asked, tmp_path, ["old.json"])


def test_record_of_another_benchmark_is_refused(asked, tmp_path):
    Record.begin("fuse", "cpu", "").save("old.json")
    assert_refused(
        invoke("kernels", "--compare", "old.json"), "a record of 'fuse', not of 'kernels'", asked, tmp_path, ["old.json"]
    )


@pytest.mark.parametrize(("name", "missing"), [("collect", ["torchvision", "transformers"]), ("fuse", ["torchvision"])])
def test_missing_packages_are_named(asked, tmp_path, monkeypatch, name, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package in missing else find(package))
    text = rf'needs {" and ".join(missing)}: pip install .*\[bench\]"'
    assert_refused(invoke(name), text, asked, tmp_path)


@pytest.mark.slow
def test_changes_since_an_older_record_are_shown(asked):
    assert invoke("--device", "cpu", "--record", "old.json").exit_code == 0
    values = json.loads(Path("old.json").read_text(encoding="utf-8"))
    for each in values["measurements"]:
        each["milliseconds"] = dict.fromkeys(each["milliseconds"], 1000.0)
    Path("old.json").write_text(json.dumps(values), encoding="utf-8")
    result = invoke("--device", "cpu", "--record", "new.json", "--compare", "old.json")
    assert result.exit_code == 0, result.output
    assert result.output.count("faster") == 4
    assert "4 of 4 changed by more than the noise within the two runs" in result.output


@pytest.mark.slow
def test_compared_record_may_be_overwritten(asked):
    assert invoke("--device", "cpu", "--record", "a.json").exit_code == 0
    result = invoke("--device", "cpu", "--record", "a.json", "--compare", "a.json")
    assert "of 4 changed" in result.output


def test_interruption_keeps_finished_cases(asked, monkeypatch, tmp_path):
    def interrupted(record, path, _save=Record.save):
        _save(record, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "save", interrupted)
    result = invoke("--device", "cpu", "--record", "a.json")
    assert result.exit_code == 130
    assert "Interrupted. The cases measured before, if any, are in a.json" in result.output
    record = Record.load("a.json")
    assert (list(record.cases()), record.complete) == (["one"], False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_out_of_memory_is_one_line(monkeypatch):
    def cases(device, dtypes, sizes):
        yield Case("one", {"ours": nothing}, "ours")
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    monkeypatch.setitem(runner.BENCHMARKS, "fuse", dataclasses.replace(runner.BENCHMARKS["fuse"], cases=cases))
    result = invoke("fuse", "--device", "cpu", "--record", "a.json")
    assert result.exit_code == 2
    assert "Error: a tensor of the next case does not fit into memory; give smaller --sizes" in result.output
    assert list(Record.load("a.json").cases()) == ["one"]
