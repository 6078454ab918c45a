"""The time of a pass over a corpus: with the model alone, with `fastentropy calibrate`, and with the baselines.

pytest bench/test_bench_calibrate.py --benchmark-group-by=group

The corpus consists of random words. The model is a Llama of 13 million random parameters. `record_calibrate.py` measures
several processes.
"""

import contextlib
import random
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fastentropy.benchmarks.collecting import PROCEDURES
from fastentropy.calibration.ranks import init_ranks
from fastentropy.calibration.run import Options, run_calibration

WORDS = [f"w{number}" for number in range(4000)]
ROWS, TOKENS, BATCHES = 8, 256, 2


class Silent:
    """Receive the progress of a calibration and show nothing."""

    def show(self, read, tokens, tokens_per_second, overhead):
        """Do nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model, its tokenizer, and a text that fills the batches exactly if it is packed into rows."""
    folder = tmp_path_factory.mktemp("calibrate")
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<eos>", *WORDS])}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder / "model")
    llama().save_pretrained(folder / "model")
    words = random.Random(0).choices(WORDS, k=ROWS * TOKENS * BATCHES)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def llama():
    """Return a Llama with random weights, which are the same in every call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_a_loop(benchmark, procedure):
    benchmark.group = "calibrate"
    batches = torch.randint(0, len(WORDS), (BATCHES, ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), PROCEDURES[procedure](llama()) as run:
        benchmark.pedantic(lambda: [run(batch) for batch in batches], rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = batches.numel() / benchmark.stats.stats.median if benchmark.stats else None


def test_fastentropy_calibrate(benchmark, folder):
    """Time the whole command, including reading, tokenizing, checkpoints and the report."""
    benchmark.group = "calibrate"
    options = Options(str(folder / "model"), str(folder / "text.txt"), batch_size=ROWS, max_length=TOKENS, packing=True)

    def calibrate():
        with init_ranks() as ranks:
            _, summary = run_calibration(options, folder / "run", ranks, lambda size, unit: contextlib.nullcontext(Silent()))
        shutil.rmtree(folder / "run")
        return summary

    summary = benchmark.pedantic(calibrate, rounds=5, warmup_rounds=1)
    assert summary["tokens"] == ROWS * TOKENS * BATCHES
    benchmark.extra_info["tokens_per_second"] = summary["tokens_per_second"]
