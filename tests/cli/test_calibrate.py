"""`fastentropy calibrate`: what it prints, and one line for every error that the user can fix."""

import functools
import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastentropy as fe
from fastentropy.calibration import run
from fastentropy.calibration.compiling import compile_layers
from fastentropy.calibration.pretrained import Pretrained
from fastentropy.cli import app
from tests.calibration import cases

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with all models and both corpora, which no test changes."""
    return cases.save_all(tmp_path_factory.mktemp("calibration"), 4)


@pytest.fixture
def model(place, tmp_path):
    """Return a copy of a model that a test may damage."""
    return shutil.copytree(place / "llama", tmp_path / "model")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def calibrate(model, data, output, *options):
    arguments = ["calibrate", model, "--data", data, "--output", output, *options]
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result, text, *unmade):
    """Assert that there is one line on stderr, with the text, and that no file was made."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert re.search(text, line), line
    assert not any(path.exists() for path in unmade)


def edit(path, **values):
    """Change values of a JSON file; None removes a value."""
    known = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))


# What is printed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = calibrate(place / "llama", place / "texts", folder, "--max-length", 16)
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.mark.slow
def test_compiled_layers_count_the_same(place, finished, output, monkeypatch):
    monkeypatch.setattr(run, "compile_layers", functools.partial(compile_layers, backend="aot_eager"))
    result = calibrate(place / "llama", place / "texts", output, "--max-length", 16, "--compile")
    assert result.exit_code == 0, result.output
    expected, actual = (fe.Statistics.load(folder / "statistics.safetensors") for folder in (finished[0], output))
    assert list(actual) == list(expected)
    for name, site in expected.items():
        assert torch.equal(actual[name].counts, site.counts)
    assert not actual.notes
    summary = json.loads((output / "summary.json").read_text())
    assert summary["settings"]["compile"]
    torch.compiler.reset()


def test_table_and_outcome_are_printed(finished):
    folder, result = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert str(fe.Statistics.load(folder / "statistics.safetensors")) in result.stdout
    assert f"data     {summary['tokens']} tokens in {summary['documents']} documents" in result.stdout
    assert f"report   {folder}/report.html" in result.stdout
    assert "tokens per second on 1 process" in result.stdout


def test_output_fits_80_columns(finished):
    lines = finished[1].stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith(("report", "left out"))) <= 80
    (bar,) = (line for line in finished[1].stderr.splitlines() if "calibrate" in line)
    assert re.search(r"calibrate ━+ 100% \d+ tokens, [\d.]+( k)?/s", bar)
    assert len(bar) <= 80


def test_json_is_the_only_output(place, output):
    result = calibrate(place / "vit", place / "images", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((output / "summary.json").read_text())
    assert "3 images" in result.stderr


def test_max_length_does_not_apply_to_images(place, output):
    result = calibrate(place / "vit", place / "images", output)
    assert json.loads((output / "summary.json").read_text())["unit"] == "images"
    assert "data     3 images in 3 documents" in result.stdout


def test_notice_about_eos_padding_is_printed_and_stored(place, output):
    result = calibrate(place / "gpt2", place / "texts", output)
    assert result.exit_code == 0, result.output
    assert re.search("note     the tokenizer .* has no padding token; EOS is used instead, and masked", result.stdout)
    assert len(json.loads((output / "summary.json").read_text())["notices"]) == 1


@pytest.mark.slow
def test_default_folder_is_named_by_model_and_data(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", f"{place}/llama/", "--data", f"{place}/texts/*.txt"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [
        run.Options(model=f"{place}/llama", data=f"{place}/texts/*.txt").default_folder.name
    ]


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("org/llama", "org/data:config:split", "calibrate-llama-data"),
        ("./llama/", "/data/texts/", "calibrate-llama-texts"),
        ("/", "a b/..", "calibrate--work"),
    ],
)
def test_names_of_folders(model, data, name, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert re.fullmatch(f"runs/{name}-[0-9a-f]{{6}}", str(run.Options(model=model, data=data).default_folder))


def test_folders_of_models_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, other = ("a/model", "texts"), ("b/model", "texts")
    folders = [run.Options(model=model, data=data).default_folder for model, data in (first, other)]
    assert folders[0] != folders[1]
    assert run.Options(model=f"{tmp_path}/a/model/", data="./texts").default_folder == folders[0]


# Models ------------------------------------------------------------------------------------------------------------------


def test_missing_model_is_one_line(place, tmp_path, output):
    assert_one_line(
        calibrate(tmp_path / "none", place / "texts", output), "none has no configuration that can be loaded", output
    )
    assert_one_line(calibrate("no-such/model", place / "texts", output), "no-such/model has no configuration", output)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda model: (model / "config.json").unlink(), "has no configuration that can be loaded: .*config.json"),
        (lambda model: (model / "config.json").write_text("{"), "has no configuration that can be loaded: .*valid JSON"),
        (lambda model: edit(model / "config.json", model_type="nonsense"), "has no configuration that can be loaded: .*nonse"),
        (lambda model: edit(model / "config.json", hidden_size="many"), "has no configuration that can be loaded: .*hidden"),
        (lambda model: edit(model / "config.json", hidden_size=32), "has 21 weights whose shapes differ from its"),
        (lambda model: edit(model / "config.json", num_hidden_layers=3), "lacks 9 of the weights of LlamaForCausalLM, such as"),
        (lambda model: os.truncate(model / "model.safetensors", 3000), "has no weights that can be loaded"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\xff" * 500), "has no weights that can be loaded"),
        (lambda model: (model / "model.safetensors").unlink(), "has no weights that can be loaded: .*model.safetensors"),
        (lambda model: drop_weights(model / "model.safetensors"), "lacks 2 of the weights of LlamaForCausalLM"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer that can be loaded"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), "has no tokenizer that can be loaded"),
        (
            lambda model: cases.tokenizer(words=map(str, range(90))).save_pretrained(model),
            "the tokenizer has 95 tokens, but the model 55; they do not belong together",
        ),
        (
            lambda model: cases.tokenizer(without=["pad_token", "eos_token"]).save_pretrained(model),
            "has neither a padding token nor EOS",
        ),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_damaged_model_is_one_line(server, model, place, output, damage, text):
    """Run in a process of its own, so that everything that libraries print is seen."""
    damage(model)
    (result,) = server.run([model, "--data", place / "texts", "--output", output])
    print(result.errors)
    (line,) = result.errors.splitlines()
    assert re.match(f"Error: .*{text}", line)
    assert (result.status, result.output) == (2, "")
    assert not output.exists()


def drop_weights(path):
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "gate_proj" not in name}, path, {"format": "pt"})


def test_pickled_weights_are_refused_and_never_unpickled(model, place, output, tmp_path):
    class Mark:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.safetensors"):
        (model / name).write_bytes(pickle.dumps(Mark()))
        assert_one_line(calibrate(model, place / "texts", output), "has no weights that can be loaded", output)
        (model / name).unlink()
    torch.save(cases.llama().state_dict(), model / "pytorch_model.bin")
    assert_one_line(calibrate(model, place / "texts", output), "has no weights that can be loaded: .*safetensors", output)
    assert not (tmp_path / "executed").exists()


def test_code_of_a_model_is_not_run(model, place, output, tmp_path):
    (model / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    edit(model / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    assert_one_line(calibrate(model, place / "texts", output), "has no configuration that can be loaded", output)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("vit", "texts", "reads images, but the data is text; name data of the model's kind"),
        ("llama", "images", "reads text, but the data is images; name data of the model's kind"),
    ],
)
def test_wrong_kind_of_data_is_one_line(place, output, name, data, text):
    assert_one_line(calibrate(place / name, place / data, output), text, output)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-length", "65"], "--max-length 65 is more than .*llama takes; set 16 or less"),
        (["--max-length", "0"], "--max-length"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--checkpoint-every", "0"], "--checkpoint-every"),
        (["--dtype", "int4"], "dtype: got 'int4', expected one of auto, float32"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--mask", "padding"], "--mask padding: no module of .*llama takes an argument of that name"),
        (["--column", "words"], "no document|holds nothing"),
    ],
)
def test_impossible_option_is_one_line(place, tmp_path, output, options, text):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "w1"}\n')
    result = calibrate(place / "llama", data, output, *options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert re.search(text, result.stderr), result.stderr
    assert not output.exists()


def test_max_length_filled_by_special_tokens_is_one_line(place, output):
    text = "max_length: got 2, expected more than the 2 special tokens of a document"
    assert_one_line(calibrate(place / "bert", place / "texts", output, "--max-length", 2), text, output)


# Data --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_files_are_reported_and_good_ones_counted(place, tmp_path, output):
    data = cases.save_texts(tmp_path / "data", 4)
    (data / "04.txt").write_bytes(b"")
    (data / "05.txt").write_bytes(bytes(range(128, 256)) * 8)
    (data / "06.parquet").write_bytes(b"PAR1 but not really")
    (data / "07.txt").mkdir()
    (data / "08.jsonl").write_text("not json\n")
    (data / "09.txt").symlink_to(tmp_path / "nowhere")
    result = calibrate(place / "llama", data, output)
    assert result.exit_code == 0, result.output
    for bad in data.glob("0[4-9].*"):
        shutil.rmtree(bad) if bad.is_dir() else bad.unlink()
    assert cases.outcome(output)[0] == cases.by_hand("llama", data)[0]
    problems = {os.path.basename(problem["path"]) for problem in json.loads((output / "summary.json").read_text())["problems"]}
    assert problems == {"04.txt", "05.txt", "06.parquet", "08.jsonl", "09.txt"}
    assert all(f"/{name}: " in result.stdout for name in problems)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no file that can be used; .*a.txt is empty"),
        (b"\n \n", "holds nothing that the model can read: it has no text"),
        (b"\xff\xfe\n", "holds nothing that the model can read: .*a.txt: a line is not UTF-8"),
    ],
)
def test_only_bad_files_are_one_line(place, tmp_path, output, content, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(content)
    result = calibrate(place / "llama", tmp_path / "data", output)
    assert result.exit_code == 2
    assert re.search(text, result.stderr.splitlines()[-1])
    assert not output.exists()


@pytest.mark.parametrize("data", ["nowhere/at/all", "none.txt"])
def test_missing_data_is_one_line(place, output, data):
    assert_one_line(calibrate(place / "llama", data, output), f"{data} does not exist", output)


# The folder --------------------------------------------------------------------------------------------------------------


def test_foreign_folder_is_left_alone(place, finished, output):
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / ".tmp-1-model.pt").mkdir()
    before = cases.contents_of(output)
    assert_one_line(calibrate(place / "llama", place / "texts", output), "holds other files; name another folder")
    assert cases.contents_of(output) == before
    assert (output / ".tmp-1-model.pt").exists()
    before = cases.contents_of(finished[0])
    assert_one_line(
        calibrate(place / "llama", place / "texts", finished[0]), "holds a finished calibration; show it with: .* name another"
    )
    assert cases.contents_of(finished[0]) == before


def test_unmakeable_folder_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert_one_line(calibrate(place / "llama", place / "texts", folder), r"file is a file; name a folder with --output")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
def test_folder_that_cannot_be_written_is_found_out_first(place):
    assert_one_line(calibrate(place / "llama", place / "texts", "/proc/run"), "/proc/run cannot be written to")


def report(folder, *options):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["report", str(folder), *map(str, options)])


def test_finished_calibration_is_shown_again(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    shown = report(folder)
    assert (shown.exit_code, shown.stdout) == (0, finished[1].stdout.replace(str(finished[0]), str(folder)))
    assert (folder / "report.html").read_bytes() == page
    assert json.loads(report(folder, "--json", "--output", tmp_path / "page.html").stdout) == json.loads(
        (folder / "summary.json").read_text()
    )
    assert (tmp_path / "page.html").read_bytes() == page


def test_damaged_calibration_is_one_line(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    assert_one_line(report(folder, finished[0]), "reported by itself")
    for damage, text in (
        ({"overhead": {"ratio": "1.0", "samples": 3}}, "overhead.ratio is '1.0'; expected a number"),
        ({"overhead": 1}, "overhead is 1; expected an object"),
        ({"model": 3}, "model is 3; expected a text"),
        ({"machine": {"device": "", "torch": ""}}, "machine lacks date"),
    ):
        shutil.copy(finished[0] / "summary.json", folder)
        edit(folder / "summary.json", **damage)
        assert_one_line(report(folder), f"summary.json is damaged: {text}")
    (folder / "statistics.safetensors").write_bytes(b"")
    assert_one_line(report(folder), "statistics.safetensors")


def test_empty_folder_with_leftovers_is_accepted(place, output):
    (output / ".tmp-1-checkpoint.safetensors").mkdir(parents=True)
    assert calibrate(place / "llama", place / "texts", output).exit_code == 0
    assert {path.name for path in output.iterdir()} == {"statistics.safetensors", "summary.json", "report.html"}


@pytest.fixture
def interrupted(place, output, monkeypatch):
    """Return the folder of a run that was interrupted after its first checkpoint."""
    forward, batches = Pretrained.forward, []

    def forward_some(self, inputs):
        batches.append(1)
        if len(batches) == 5:
            raise KeyboardInterrupt
        return forward(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Pretrained, "forward", forward_some)
        result = calibrate(place / "llama", place / "texts", output, "--batch-size", 3, "--checkpoint-every", 1)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted. Repeat the command to continue from the last checkpoint."
    assert [path.name for path in output.iterdir()] == ["checkpoint.safetensors"]
    return output


@pytest.mark.parametrize(
    ("name", "data", "options", "text"),
    [
        ("llama", "texts", ["--batch-size", 4], "differs in batch size; name"),
        ("llama", "texts", ["--batch-size", 3, "--packing"], "differs in packing"),
        ("llama", "texts", ["--batch-size", 3, "--max-length", 8, "--max-tokens", 5], "differs in max length, max tokens"),
        ("llama", "texts", ["--batch-size", 3, "--mask", "none"], "differs in mask"),
        ("llama", "texts", ["--batch-size", 3, "--dtype", "float32"], "differs in model, dtype"),
        ("gpt2", "texts", ["--batch-size", 3], "differs in model"),
        ("vit", "images", ["--batch-size", 3], "differs in model, data, max length, packing, mask"),
    ],
)
def test_run_with_other_settings_is_left_alone(place, interrupted, name, data, options, text):
    before = cases.contents_of(interrupted)
    result = calibrate(place / name, place / data, interrupted, *options)
    assert_last_line(result, f"run holds a run that {text}")
    assert cases.contents_of(interrupted) == before


def assert_last_line(result, text):
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert re.search(text, line), line


@pytest.mark.slow
def test_resume_with_another_checkpoint_interval(place, interrupted):
    result = calibrate(place / "llama", place / "texts", interrupted, "--batch-size", 3, "--checkpoint-every", 5)
    assert result.exit_code == 0, result.output
    counts, tally = cases.outcome(interrupted)
    assert (counts, tally[1]) == cases.by_hand("llama", place / "texts")


def test_damaged_checkpoint_is_one_line_and_left_alone(place, finished, interrupted):
    path = interrupted / "checkpoint.safetensors"
    whole = path.read_bytes()
    statistics = (finished[0] / "statistics.safetensors").read_bytes()
    for content in (b"", whole[:-20], whole[:100], b"\xff" * 400, pickle.dumps({"settings": {}}), statistics):
        path.write_bytes(content)
        result = calibrate(place / "llama", place / "texts", interrupted, "--batch-size", 3)
        assert_last_line(result, "checkpoint.safetensors is damaged or not a checkpoint of fastentropy calibrate")
        assert path.read_bytes() == content


# Ranks -------------------------------------------------------------------------------------------------------------------


def assert_first_rank_says(results, text):
    assert [result.status for result in results] == [2] * len(results), results
    assert re.search(text, results[0].errors.splitlines()[-1]), results[0].errors
    assert not any(result.errors or result.output for result in results[1:])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"model": "gpt2"}, "ranks 0 and 1 differ in model; give all ranks the same files and arguments"),
        ({"data": "others"}, "ranks 0 and 1 differ in data;"),
        ({"model": "vit", "data": "images"}, "ranks 0 and 1 differ in model, data, max length, packing, mask"),
        ({"options": ["--batch-size", 2, "--packing"]}, "differ in batch size, packing;"),
        ({"options": ["--checkpoint-every", 2]}, "differ in checkpoint every;"),
        ({"model": "none"}, "rank 1: .*none has no configuration that can be loaded"),
        ({"data": "none.txt"}, "rank 1: .*none.txt does not exist"),
        ({"options": ["--dtype", "int4"]}, "rank 1: dtype: got 'int4'"),
        ({"options": ["--device", "toaster"]}, "rank 1: --device toaster cannot be used here"),
    ],
)
@pytest.mark.slow
def test_disagreeing_ranks_stop_with_one_message(server, place, output, changed, text):
    cases.save_texts(place / "others", 2) if not (place / "others").exists() else None

    def arguments(model="llama", data="texts", options=()):
        return [place / model, "--data", place / data, "--output", output, *options]

    assert_first_rank_says(server.run([arguments(), arguments(**changed)], ranks=2), text)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--device-map", "auto"], "--device-map spreads the model of one process over all devices; leave it out"),
        (["--max-length", 65], "^Error: --max-length 65 is more than"),
    ],
)
@pytest.mark.slow
def test_error_of_all_ranks_is_reported_once(server, place, output, options, text):
    results = server.run([place / "llama", "--data", place / "texts", "--output", output, *options], ranks=2)
    assert_first_rank_says(results, text)
    assert not output.exists()


@pytest.mark.slow
def test_foreign_folder_is_reported_once(server, place, output):
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    results = server.run([place / "llama", "--data", place / "texts", "--output", output], ranks=2)
    assert_first_rank_says(results, "^Error: .*run holds other files")
