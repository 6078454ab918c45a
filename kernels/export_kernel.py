"""Write the package of kernels as a universal kernel for Hugging Face's library `kernels`.

python kernels/export_kernel.py FOLDER

The folder gets the layout of a kernel repository: `README.md` is its page, and `build/torch-universal` holds the Python files
and `metadata.json`. A universal kernel has no compiled code, so it is the same for all devices. The library imports it under
a name of its own, beside other versions. So all imports are made relative, and the operators are registered under this name
in place of that of the package. The tool `aot` is left out.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

PACKAGE = Path(__file__).parent / "fastentropy_kernels"
VARIANT = Path("build") / "torch-universal"
LEFT_OUT = "aot"
#: The page of the repository. What stands between the lines is read by the hub.
PAGE = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# fastentropy-kernels

Activations that count, for each neuron, how often their input is below, at and above zero, in the kernel that computes the
activation; and two linear operators in one kernel. They run in Triton on a GPU, in Numba on a CPU where it is installed, and in
plain PyTorch elsewhere.

```python
import torch
from kernels import get_local_kernel

kernel = get_local_kernel("PATH OF THIS FOLDER")
x, counts = torch.randn(8, 64, 56, 56), torch.zeros(64, 3, dtype=torch.int64)
y = kernel.activation_states(x, counts, "relu", channel_axis=1)  # adds to counts: off, zero, on
```
"""


def main() -> None:
    """Write the kernel to the folder that the command line names, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(export(parser.parse_args().folder))


def export(folder: Path) -> Path:
    """Write the kernel.

    Args:
        folder: the folder of the repository. It is created, and existing files are replaced.

    Returns:
        The folder of the variant, `folder/build/torch-universal`.
    """
    sources = {
        path.relative_to(PACKAGE): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != LEFT_OUT
    }
    identity = f"_fastentropy_kernels_{hashlib.sha256(''.join(sources.values()).encode()).hexdigest()[:12]}"
    for path, source in sources.items():
        target = folder / VARIANT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relocated(source, len(path.parts), identity), encoding="utf-8")
    metadata = {
        "id": identity,
        "name": "fastentropy-kernels",
        "version": 1,
        "license": "apache-2.0",
        "python-depends": [],  # Numba is none that the library knows; without it, the reference runs on a CPU
        "backend": {"type": "cpu"},  # one must be named; the variant is taken for every backend
    }
    (folder / "README.md").write_text(PAGE, encoding="utf-8")
    (folder / VARIANT / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder / VARIANT


def relocated(source: str, depth: int, identity: str) -> str:
    """Return the source of a module so that it does not depend on the name of its package.

    Args:
        source: the source.
        depth: how many folders up the root of the package lies: 1 for its own files.
        identity: the name under which operators are registered.
    """
    dots = "." * depth
    source = re.sub(r"^(\s*)from fastentropy_kernels import", rf"\1from {dots} import", source, flags=re.MULTILINE)
    source = re.sub(r"^(\s*)from fastentropy_kernels\.", rf"\1from {dots}", source, flags=re.MULTILINE)
    return source.replace('"fastentropy_kernels::', f'"{identity}::')


if __name__ == "__main__":
    main()
