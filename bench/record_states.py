"""Measure the state kernels and their peers in turns, print the ratios and keep them as bench/results/states-NAME.json.

python bench/record_states.py [cpu|cuda] [NAME]
"""

import sys
from functools import partial

from records import save_record
from state_peers import DTYPES, PASSES, SHAPES, copy, operands, relu, relu_and_published_procedure, relu_with_states

from fastentropy.timing import measure_times


def main(device: str, name: str) -> None:
    """Print one line for each shape and dtype, and write the file."""
    cases = []
    for shape in SHAPES[device]:
        for dtype in DTYPES:
            cases.append(measure(device, shape, dtype))
            print(line(cases[-1]), flush=True)
    save_record(f"states-{name}", device, cases=cases)


def measure(device: str, shape: str, dtype: str) -> dict[str, object]:
    """Return the milliseconds of every operation, interleaved and on a GPU as CUDA graphs, and what follows from them."""
    x, counts = operands(device, shape, dtype)
    operations = {operation.__name__: partial(operation, x, counts) for operation in PASSES}
    # What waits for the GPU cannot be captured in a graph.
    waiting = {name: operations.pop(name) for name in [relu_and_published_procedure.__name__]}
    times = measure_times(operations, rounds=31, round_seconds=0.01, graphs_on=x.device if x.is_cuda else None)
    times |= measure_times(waiting, rounds=31, round_seconds=0.01)
    size = x.numel() * x.element_size()
    fused = times[relu_with_states.__name__]
    return {
        "shape": shape,
        "dtype": dtype,
        "bytes": 2 * size,
        "milliseconds": times,
        "ratio_to_relu": fused / times[relu.__name__],
        "speedup_over_published": times[relu_and_published_procedure.__name__] / fused,
        "copy_gigabytes_per_second": 2 * size / times[copy.__name__] / 1e6,
        "share_of_copy_bandwidth": times[copy.__name__] / fused,
    }


def line(case: dict[str, object]) -> str:
    """Show one measurement."""
    return (
        f"{case['shape']:12} {case['dtype']:9} relu with states / relu {case['ratio_to_relu']:5.2f}   "
        f"published / ours {case['speedup_over_published']:6.1f}   of the copy bandwidth {case['share_of_copy_bandwidth']:.2f}"
    )


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    main(chosen, sys.argv[2] if len(sys.argv) > 2 else chosen)
