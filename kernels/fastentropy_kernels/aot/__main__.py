"""The command `python -m fastentropy_kernels.aot`."""

import sys

from fastentropy_kernels.aot import main

if __name__ == "__main__":
    sys.exit(main())
