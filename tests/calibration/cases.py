"""Tiny models and corpora, and `python -m tests.calibration.cases`, a process that forks the ranks of calibrations.

Forking imports PyTorch and transformers, and compiles the counting kernels, only once.
"""

import builtins
import contextlib
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.utils import logging

import fastentropy as fe
from fastentropy.calibration import overhead
from fastentropy.cli import app
from tests._helpers.kill_points import die_at
from tests._helpers.paths import PYTHONPATH

logging.disable_progress_bar()
#: Seconds after which a rank is killed, and after which it is killed once another rank has been killed.
SECONDS, GRACE_SECONDS = 60, 1
SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "eos_token": "<eos>"}
WORDS = [f"w{number}" for number in range(50)]
IDS = {token: number for number, token in enumerate([*SPECIAL.values(), *WORDS])}
MAX_LENGTH = 16


# Models and corpora ----------------------------------------------------------------------------------------------------


def tokenizer(template="$A", without=(), words=WORDS):
    ids = {token: number for number, token in enumerate([*SPECIAL.values(), *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(token, IDS[token]) for token in ("<cls>", "<sep>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {name: token for name, token in SPECIAL.items() if name not in without}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **names)


def llama(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return seeded(LlamaForCausalLM, LlamaConfig(vocab_size=len(IDS), max_position_embeddings=64, **sizes, **options))


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return seeded(BertForMaskedLM, BertConfig(vocab_size=len(IDS), max_position_embeddings=64, **sizes))


def gpt2():
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64}
    return seeded(GPT2LMHeadModel, GPT2Config(vocab_size=len(IDS), bos_token_id=4, eos_token_id=4, **sizes))


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return seeded(ViTForImageClassification, ViTConfig(image_size=8, patch_size=4, **sizes))


def seeded(model_class, config):
    """Build a float64 model: batches may sum in another order than single documents, but no sign depends on the last bits."""
    torch.manual_seed(3)
    return model_class(config).double().eval()


MODELS = {
    "llama": (llama, tokenizer),
    "bert": (bert, lambda: tokenizer("<cls> $A <sep>")),
    "gpt2": (gpt2, lambda: tokenizer(without=["pad_token"])),
    "vit": (vit, lambda: ViTImageProcessor(size={"height": 8, "width": 8})),
}


def save_model(name, folder):
    """Save a model with its tokenizer or image processor."""
    make, make_processor = MODELS[name]
    make().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def texts(number, seed=5):
    """Return documents of 1 to 30 words, some of which are truncated at MAX_LENGTH."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randrange(1, 31))) for _ in range(number)]


def save_all(folder, *numbers):
    """Save all models, and both corpora with the given number of files or images."""
    for name in MODELS:
        save_model(name, folder / name)
    save_texts(folder / "texts", *numbers)
    save_images(folder / "images", *numbers)
    return folder


def save_texts(folder, files=11):
    """Save files of 0 to 12 documents, one chunk each. The first has none; every fifth has a line that cannot be read."""
    folder.mkdir()
    drawn, documents = random.Random(7), iter(texts(1000))
    for number in range(files):
        lines = list(itertools.islice(documents, drawn.randrange(4, 13) if number else 0))
        data = "\n".join([*lines, "", " "]).encode() + (b"\xff\xfe\n" if number % 5 == 4 else b"")
        (folder / f"{number:02d}.txt").write_bytes(data)
    return folder


def save_images(folder, number=23, rows_per_group=3):
    """Save a table of images, with a chunk for each row group. One image cannot be decoded."""
    folder.mkdir()
    cells = [png(seed) for seed in range(number)]
    cells[1] = b"no image"
    table = pa.table({"image": pa.array([{"bytes": cell, "path": None} for cell in cells])})
    pq.write_table(table, folder / "images.parquet", rows_per_group)
    return folder


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def documents_of(path):
    """Return the documents of a text file, in order."""
    lines = path.read_bytes().split(b"\n")
    return [line.decode() for line in lines if line.strip() and line.isascii()]


def by_hand(name, data, max_length=MAX_LENGTH):
    """Run a model over a corpus, one document after the other; return the statistics and the number of tokens."""
    make, make_processor = MODELS[name]
    model, processor = make(), make_processor()
    tokens = 0
    with torch.no_grad(), fe.collect(model) as collector:
        for document in itertools.chain(*map(documents_of, sorted(data.iterdir()))):
            ids = processor(document, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
            model(input_ids=ids)
            tokens += ids.numel()
    return figures(collector.compute()), tokens


def packed_by_hand(name, data, max_length=MAX_LENGTH):
    """The same, with the documents of a file in one sequence that is cut into rows."""
    make, make_processor = MODELS[name]
    model, processor = make(), make_processor()
    separator = [] if name == "bert" else [IDS["<eos>"]]
    tokens = 0
    with torch.no_grad(), fe.collect(model) as collector:
        for path in sorted(data.iterdir()):
            sequence = []
            for document in documents_of(path):
                sequence += separator * bool(sequence) + processor(document)["input_ids"]
            for start in range(0, len(sequence), max_length):
                model(input_ids=torch.tensor([sequence[start : start + max_length]]))
            tokens += len(sequence)
    return figures(collector.compute()), tokens


def images_by_hand(number=23):
    """The same for the images of `save_images`."""
    model, processor = vit(), MODELS["vit"][1]()
    with torch.no_grad(), fe.collect(model) as collector:
        for seed in range(number):
            if seed != 1:
                image = Image.open(io.BytesIO(png(seed)))
                model(pixel_values=processor(images=image, return_tensors="pt")["pixel_values"].double())
    return figures(collector.compute()), number - 1


def figures(statistics):
    """Return all integers of statistics as plain values."""
    return {name: (site.activation, site.counts.tolist(), site.nan) for name, site in statistics.items()}


def outcome(folder):
    """Return what must be the same on any number of ranks of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    tally = [summary[name] for name in ("batches", "tokens", "documents", "truncated", "tokens_cut", "problems")]
    return figures(fe.Statistics.load(folder / "statistics.safetensors")), tally


# Processes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The result of a rank: its exit status, or minus the number of the signal, and what it printed."""

    status: int
    output: str
    errors: str


class Server:
    """Runs `fastentropy calibrate` on any number of ranks, in children of a process that has imported everything."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "PYTHONPATH": PYTHONPATH}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, arguments, *, ranks=1, injected=None):
        """Start the ranks; return their process numbers, which are not reused before `finish`.

        Args:
            arguments: the arguments of the command, or a list of them for each rank.
            ranks: how many ranks to start.
            injected: rank -> the name and the arguments of a function in `INJECTED`.
        """
        alike = not isinstance(arguments[0], list)
        each = [[str(argument) for argument in (arguments if alike else arguments[rank])] for rank in range(ranks)]
        return self._ask([each, {str(rank): what for rank, what in (injected or {}).items()}])

    def finish(self):
        """Wait for the ranks; return the result of each. Ranks that hang are killed, with the status -SIGKILL."""
        return [Result(*values) for values in self._ask("finish")]

    def run(self, arguments, **options):
        """Run ranks to their ends."""
        self.start(arguments, **options)
        return self.finish()

    def stop(self):
        self._process.kill()
        self._process.communicate()

    def _ask(self, question):
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def serve():
    """Answer a line with the arguments of the ranks by their process numbers, and the next line by their results."""
    torch.set_num_threads(1)  # threads would not survive the fork
    warm_up()
    for line in sys.stdin:
        arguments, injected = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            port = free_port()
            children = [
                start_rank(rank, len(arguments), port, arguments[rank], injected.get(str(rank)), Path(folder))
                for rank in range(len(arguments))
            ]
            print(json.dumps(children), flush=True)
            sys.stdin.readline()
            statuses = wait_for(children)
            outputs = [[Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(len(children))]
            print(json.dumps([[status, *output] for status, output in zip(statuses, outputs, strict=True)]), flush=True)


def warm_up():
    """Run calibrations, which leave no thread behind, to import every module and compile the counting kernels."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        corpora = {"llama": save_texts(Path(folder, "texts"), 2), "vit": save_images(Path(folder, "images"))}
        for name, data in corpora.items():
            arguments = [
                "calibrate",
                save_model(name, Path(folder, name)),
                "--data",
                data,
                "--output",
                Path(folder, f"{name} run"),
            ]
            with contextlib.redirect_stderr(io.StringIO()):
                app([*map(str, arguments), "--json"], standalone_mode=False)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_rank(rank, number, port, arguments, injected, folder):
    if child := os.fork():
        return child
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
        os.close(0)
        if number > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        overhead.RUN_TWICE = (2, 4)
        if injected:
            name, *values = injected
            INJECTED[name](*values)
        app(["calibrate", *arguments])
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait_for(children):
    """Return the exit statuses. Like torchrun, kill the remaining ranks some time after one was killed."""
    statuses, deadline = {}, time.monotonic() + SECONDS
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (ended := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(ended[1])
                if statuses[child] < 0:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            elif child not in statuses and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[child] for child in children]


# Faults of a rank ------------------------------------------------------------------------------------------------------


def in_forward(batch, act):
    """Call `act` in the forward pass of the batch of that number, counted on this rank."""
    from fastentropy.calibration.pretrained import Pretrained

    forward, batches = Pretrained.forward, itertools.count()

    def forward_unless(self, inputs):
        if next(batches) == batch:
            act()
        return forward(self, inputs)

    Pretrained.forward = forward_unless


def raise_at(batch, kind):
    def act():
        raise getattr(builtins, kind)("boom")

    in_forward(batch, act)


def slow_down(seconds):
    """Make each forward pass take this long, so that a kill can happen during the run."""
    from fastentropy.calibration.pretrained import Pretrained

    forward = Pretrained.forward

    def slowly(self, inputs):
        time.sleep(seconds)
        return forward(self, inputs)

    Pretrained.forward = slowly


def lose_stream(chunk):
    """Make the data break off in a chunk."""
    from fastentropy.calibration.data.text import TextFile

    read = TextFile.read

    def breaking(self, number, problems):
        if self.path.endswith(f"{chunk:02d}.txt"):
            raise OSError("data.txt cannot be read any further: connection lost")
        return read(self, number, problems)

    TextFile.read = breaking


def refuse_folder():
    """Make this rank fail when it touches the output folder."""
    from fastentropy.calibration import run

    def touched(*arguments, **options):
        raise AssertionError("this rank touches the folder")

    for name in ("_check_folder", "_finish", "remove_leftovers"):
        setattr(run, name, touched)
    Path.mkdir = Path.unlink = Path.replace = Path.iterdir = touched


INJECTED = {function.__name__: function for function in (die_at, raise_at, slow_down, lose_stream, refuse_folder)}


def contents_of(folder):
    """Return a folder's files with their contents, to compare them later."""
    with contextlib.suppress(FileNotFoundError):
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    serve()
