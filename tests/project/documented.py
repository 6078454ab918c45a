"""Run the code of the README and of the pages of docs/, block by block in one folder.

- ```python runs in one namespace for the whole page. With title="NAME" it is written to the file NAME and not run.
- ```sh runs with `bash -e`. Commands that install something or run the tests are left to CI: in `pip install X && COMMAND`,
  only COMMAND runs.
- ```text is not run. With title="prints", it must equal the output of the previous block.

Nothing may be downloaded. `prepare` makes the files that pages expect from their reader: a model with its tokenizer, and texts.
"""

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

LANGUAGES = ("python", "sh", "text")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LEFT_TO_CI = re.compile(r"(pip install|git clone|cd fastentropy|(python -m )?pytest|mkdocs)\b")
#: The time limit of one block, in seconds.
_TIMEOUT = 300


class Block(NamedTuple):
    """A block of code with its language, its title, and the line of the page on which the code begins."""

    language: str
    title: str
    code: str
    line: int


def blocks(page: str) -> list[Block]:
    """Return the blocks of code of a page, in order."""
    found = []
    for fence in _FENCE.finditer(page):
        language, _, options = fence[1].partition(" ")
        title = re.fullmatch(r'title="([^"]*)"', options)
        found.append(Block(language, title[1] if title else options, fence[2], page.count("\n", 0, fence.start(2)) + 1))
    return found


def commands(script: str) -> str:
    """Return a ```sh block without the commands that are left to CI."""
    lines = script.splitlines()
    return "\n".join(" && ".join(part for part in line.split(" && ") if not _LEFT_TO_CI.match(part)) for line in lines)


def prepare(folder: Path) -> None:
    """Write `model`, a tiny Llama with its tokenizer, and `texts`, a few text files, into a folder."""
    from tests.calibration import cases  # transformers takes seconds to import

    cases.save_model("llama", folder / "model")
    cases.save_texts(folder / "texts", 4)


def run_page(path: Path, folder: Path) -> dict[str, object]:
    """Run the blocks of a page and return the namespace of its Python code. The current folder must be `folder`.

    Raises the errors of the code, and AssertionError if a command fails or the output differs from the page.
    """
    assert Path.cwd() == folder.resolve()
    namespace: dict[str, object] = {"__name__": path.stem.replace("-", "_")}
    printed = ""
    for block in blocks(path.read_text(encoding="utf-8")):
        where = f"{path.name}, line {block.line}"
        if block.language == "python" and block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            printed = _run_python(block, folder / f"{path.stem}_{block.line}.py", namespace)
        elif block.language == "sh":
            printed = _run_commands(block, where)
        elif block.language == "text" and block.title == "prints":
            assert _lines(printed) == _lines(block.code), f"{where}: the output differs from the page"
    return namespace


def _run_python(block: Block, file: Path, namespace: dict[str, object]) -> str:
    """Run a block from a file, because `isolate` reads its source, and return its output."""
    file.write_text(block.code, encoding="utf-8")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block.code, file, "exec"), namespace)
    return output.getvalue()


def _run_commands(block: Block, where: str) -> str:
    """Run a block with the programs of this interpreter's environment and return its stdout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with socket.socket() as free:  # torchrun takes one port for all runs otherwise, and tests may run at the same time
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads()), "PET_MASTER_PORT": port}
    command = ["bash", "-e", "-c", commands(block.code)]
    ran = subprocess.run(
        command, env={**os.environ, **alone, "PATH": path}, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
    assert ran.returncode == 0, f"{where}: exit status {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]
