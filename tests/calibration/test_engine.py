"""On any number of ranks, a calibration gives the counts of one process that runs one document after the other."""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastentropy as fe
from fastentropy.calibration.data.batching import TextBatches
from fastentropy.calibration.data.corpus import Corpus, open_corpus
from fastentropy.calibration.data.documents import Document, Place, Problems
from fastentropy.calibration.engine import Calibration
from fastentropy.calibration.pretrained import Pretrained
from fastentropy.calibration.ranks import Ranks
from tests.calibration import cases

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all models and both corpora."""
    return cases.save_all(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def calibrated(server, place):
    """A function that calibrates a model with further options of the command, and returns the outcome."""

    @functools.cache
    def run(name, *options, ranks=1, injected=()):
        output = place / f"run {len(list(place.iterdir()))}"
        data = place / ("images" if name == "vit" else "texts")
        arguments = [place / name, "--data", data, "--output", output, "--batch-size", 3, "--checkpoint-every", 2, *options]
        results = server.run(arguments, ranks=ranks, injected=dict(injected))
        assert [result.status for result in results] == [0] * ranks, results
        assert {path.name for path in output.iterdir()} == {"statistics.safetensors", "summary.json", "report.html"}
        return cases.outcome(output)

    return run


@functools.cache
def expected(name, packing, data):
    if name == "vit":
        return cases.images_by_hand()
    return (cases.packed_by_hand if packing else cases.by_hand)(name, data)


# Any number of ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "packing"),
    [("llama", False), ("llama", True), ("bert", False), ("bert", True), ("gpt2", False), ("vit", False)],
    ids=str,
)
def test_counts_equal_a_plain_loop(calibrated, place, name, packing, ranks):
    options = ["--packing"] * packing
    counts, tally = calibrated(name, *options, ranks=ranks)
    assert (counts, tally[1]) == expected(name, packing, place / "texts")
    assert tally == calibrated(name, *options)[1]


@pytest.mark.slow
def test_ranks_without_a_chunk(calibrated, place):
    assert calibrated("llama", ranks=13) == calibrated("llama")


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 100])
def test_counts_independent_of_checkpoints(calibrated, every):
    assert calibrated("llama", "--checkpoint-every", every, ranks=2) == calibrated("llama")


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "packing"), [(1, False), (300, False), (300, True), (10**6, False)])
def test_max_tokens_on_any_number_of_ranks(calibrated, place, limit, packing):
    options = ["--max-tokens", limit, *["--packing"] * packing]
    counts, tally = calibrated("llama", *options)
    batches = TextBatches(cases.tokenizer(), batch_size=3, max_length=cases.MAX_LENGTH, packing=packing)
    tokens, model = 0, cases.llama()
    with torch.no_grad(), fe.collect(model) as collector:
        for batch in itertools.chain.from_iterable(map(batches.batches, open_corpus(str(place / "texts")).read())):
            if tokens < limit:
                model(**batch.inputs)
                tokens += batch.tokens
    assert (counts, tally[1]) == (cases.figures(collector.compute()), tokens)
    for ranks in (2, 3):
        assert calibrated("llama", *options, ranks=ranks) == (counts, tally)


@pytest.mark.slow
def test_max_images_on_any_number_of_ranks(calibrated):
    assert calibrated("vit", "--max-tokens", 8, ranks=3) == calibrated("vit", "--max-tokens", 8)
    assert calibrated("vit", "--max-tokens", 8)[1][1] == 8


@pytest.mark.slow
def test_padding_counts_without_a_mask(calibrated):
    counts, tally = calibrated("llama", "--mask", "none", ranks=2)
    values = sum(map(sum, counts["model.layers.0.mlp.act_fn"][1]))
    assert values > 24 * tally[1]
    assert calibrated("llama", "--mask", "none") == (counts, tally)


@pytest.mark.slow
def test_only_rank_0_touches_the_output_folder(calibrated):
    injected = tuple((rank, ("refuse_folder",)) for rank in (1, 2))
    assert calibrated("llama", ranks=3, injected=injected) == calibrated("llama")


@pytest.mark.slow
def test_torchrun(place, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastentropy"]
    options = ["--data", place / "texts", "--output", tmp_path / "run", "--batch-size", "3", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launcher, "calibrate", place / "llama", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    counts, tally = cases.outcome(tmp_path / "run")
    assert (counts, tally[1]) == expected("llama", False, place / "texts")
    assert json.loads(result.stdout)["ranks"] == 2


# Ranks that fail ---------------------------------------------------------------------------------------------------------


def run_on(server, place, output, ranks, injected=None):
    arguments = [place / "llama", "--data", place / "texts", "--output", output, "--checkpoint-every", 1, "--batch-size", 3]
    return server.run(arguments, ranks=ranks, injected=injected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_broken_stream_is_reported_and_continued(server, calibrated, place, tmp_path, ranks):
    results = run_on(server, place, tmp_path / "run", ranks, dict.fromkeys(range(ranks), ("lose_stream", 8)))
    assert [result.status for result in results] == [2] * ranks
    teller = f"rank {8 % ranks}: " if 8 % ranks else ""
    assert results[0].errors.splitlines()[-1] == f"Error: {teller}data.txt cannot be read any further: connection lost"
    assert not any(result.errors or result.output for result in results[1:])
    assert [result.status for result in run_on(server, place, tmp_path / "run", 2)] == [0, 0]
    assert cases.outcome(tmp_path / "run") == calibrated("llama")


@pytest.mark.slow
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_rank_ends_all(server, place, tmp_path, rank, limited):
    options = ["--max-tokens", "500"] if limited else []
    arguments = [place / "llama", "--data", place / "texts", "--output", tmp_path / "run", *options]
    results = server.run(arguments, ranks=3, injected={rank: ("raise_at", 1, "AssertionError")})
    assert "AssertionError: boom" in results[rank].errors
    assert [result.status for result in results] == [1 if other == rank else 2 for other in range(3)]
    assert not any("Traceback" in result.errors for other, result in enumerate(results) if other != rank)


@pytest.mark.slow
def test_batch_that_fails_is_one_line(server, place, tmp_path):
    results = run_on(server, place, tmp_path / "run", 2, {1: ("raise_at", 0, "RuntimeError")})
    assert [result.status for result in results] == [2, 2]
    assert results[0].errors.splitlines()[-1] == f"Error: rank 1: {place / 'llama'} failed on a batch: boom"


@pytest.mark.slow
def test_input_that_the_model_refuses_is_one_line(server, place, tmp_path):
    results = run_on(server, place, tmp_path / "run", 2, {1: ("raise_at", 0, "ValueError")})
    assert [result.status for result in results] == [2, 2]
    assert results[0].errors.splitlines()[-1] == "Error: rank 1: boom"


@pytest.mark.slow
def test_interrupt(server, calibrated, place, tmp_path):
    (result,) = run_on(server, place, tmp_path / "run", 1, {0: ("raise_at", 8, "KeyboardInterrupt")})
    assert result.status == 130
    assert result.errors.splitlines()[-1] == "Interrupted. Repeat the command to continue from the last checkpoint."
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.safetensors"]
    assert run_on(server, place, tmp_path / "run", 1)[0].status == 0
    assert cases.outcome(tmp_path / "run") == calibrated("llama")


# One process, in this one -------------------------------------------------------------------------------------------------


class Pieces:
    """A part of a corpus in memory, with an unknown number of chunks."""

    chunks = None

    def __init__(self, *chunks):
        self._chunks = chunks

    def size_of(self, chunk):
        return 0

    def read(self, chunk, problems):
        if chunk >= len(self._chunks):
            return None
        return (Document(text, Place("memory", "row", row)) for row, text in enumerate(self._chunks[chunk]))


class NoDisplay(contextlib.nullcontext):
    def show(self, *figures):
        pass


def calibration_of(model, parts, path, max_tokens=None, ranks=None, every=2):
    corpus = Corpus("memory", "text", None, "fingerprint", (parts,), Problems())
    pretrained = Pretrained("model", model, "text", cases.tokenizer(), {})
    batches = TextBatches(cases.tokenizer(), batch_size=2, max_length=cases.MAX_LENGTH)
    options = {"settings": {}, "path": path / "checkpoint.safetensors", "every": every, "max_tokens": max_tokens}
    return Calibration(pretrained, corpus, batches, fe.collect(model), ranks or Ranks(0, 1), display=NoDisplay(), **options)


def counted(model, *chunks):
    """Count the chunks in a plain loop."""
    with torch.no_grad(), fe.collect(model) as collector:
        for text in filter(str.strip, itertools.chain(*chunks)):
            ids = cases.tokenizer()(text, truncation=True, max_length=cases.MAX_LENGTH, return_tensors="pt")
            model(input_ids=ids["input_ids"])
    return cases.figures(collector.compute())


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
def test_stream_is_read_to_its_end(tmp_path, chunks):
    parts = [cases.texts(3, seed=number) for number in range(chunks)]
    outcome = calibration_of(cases.llama(), Pieces(*parts), tmp_path).run()
    assert cases.figures(outcome.statistics) == counted(cases.llama(), *parts)
    assert outcome.tally.documents == 3 * chunks


def test_chunks_without_documents(tmp_path):
    parts = [[], [], [], cases.texts(3), [], [" "], cases.texts(2, seed=1), []]
    outcome = calibration_of(cases.llama(), Pieces(*parts), tmp_path).run()
    assert cases.figures(outcome.statistics) == counted(cases.llama(), *parts)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_error_while_making_batches(tmp_path, max_tokens):
    class Broken(Pieces):
        def read(self, chunk, problems):
            if chunk == 3:
                raise OSError("the stream breaks off")
            return super().read(chunk, problems)

    parts = [cases.texts(3, seed=number) for number in range(5)]
    calibration = calibration_of(model := cases.llama(), Broken(*parts), tmp_path, max_tokens)
    with pytest.raises(ValueError, match="the stream breaks off"):
        calibration.run()
    assert not fe.collect(model).attach()  # the first collector was detached


def test_nan_is_counted_apart(tmp_path):
    model = cases.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[5] = torch.nan
    outcome = calibration_of(model, Pieces(cases.texts(3)), tmp_path).run()
    assert outcome.statistics["model.layers.0.mlp.act_fn"].nan == outcome.tally.tokens
    assert outcome.statistics["model.layers.1.mlp.act_fn"].nan == 24 * outcome.tally.tokens


def test_model_without_activations(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(len(cases.IDS), 3)

        def forward(self, input_ids, attention_mask):
            return self.embedding(input_ids)

    with pytest.raises(ValueError, match="Plain calls no known activation"):
        calibration_of(Plain(), Pieces(cases.texts(3)), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_data_without_tokens_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="memory holds nothing that the model can read: it has no text"):
        calibration_of(cases.llama(), Pieces([" "], []), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [None, 10**6])
def test_prefetches_one_item(tmp_path, monkeypatch, max_tokens):
    """Memory must not grow with the data: one batch is made ahead, or one chunk in a run with max_tokens."""
    made, ran = [], []
    stack, forward = TextBatches._stack, Pretrained.forward
    monkeypatch.setattr(TextBatches, "_stack", lambda *arguments: made.append(len(ran)) or stack(*arguments))
    monkeypatch.setattr(Pretrained, "forward", lambda *arguments: ran.append(1) or forward(*arguments))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(cases.IDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    parts = [cases.texts(8, seed=number) for number in range(20)]
    calibration_of(model, Pieces(*parts), tmp_path, max_tokens).run()
    ahead = max(number - done for number, done in enumerate(made, 1))
    assert ahead <= (2 if max_tokens is None else 8)
    assert len(made) == 80


def test_max_tokens_limits_the_batches_made(tmp_path, monkeypatch):
    made, stack = [], TextBatches._stack
    monkeypatch.setattr(TextBatches, "_stack", lambda *arguments: made.append(1) or stack(*arguments))
    endless = (text for _ in itertools.count() for text in cases.texts(10))
    outcome = calibration_of(cases.llama(), Pieces(endless), tmp_path, max_tokens=100).run()
    assert 100 <= outcome.tally.tokens < 100 + 2 * cases.MAX_LENGTH
    assert len(made) < 20


def test_complete_checkpoint_counts_nothing_again(tmp_path):
    parts = [cases.texts(3, seed=number) for number in range(3)]
    for max_tokens in (None, 60):
        folder = tmp_path / str(max_tokens)
        first = calibration_of(cases.llama(), Pieces(*parts), folder, max_tokens).run()
        again = calibration_of(cases.llama(), Pieces(*parts), folder, max_tokens).run()
        assert cases.figures(again.statistics) == cases.figures(first.statistics)
        assert again.tally == first.tally
        assert again.tokens_per_second > 0
