"""Measure inference while collecting against plain inference, in turns, on torchvision's models; print the ratios.

python bench/record_collect.py [MODEL …]
"""

import sys
from functools import partial

import torch
import torchvision

import fastentropy as fe
from fastentropy.timing import measure_times

MODELS = ("resnet18", "mobilenet_v2")


def main(names: tuple[str, ...]) -> None:
    """Print a line for each model: 224 x 224, batch 16, float32, random weights."""
    for name in names:
        plain, counted = (torchvision.models.get_model(name).eval() for _ in range(2))
        images = torch.randn(16, 3, 224, 224)
        with torch.inference_mode(), fe.collect(counted):
            times = measure_times({"plain": partial(plain, images), "collecting": partial(counted, images)}, rounds=21)
        ratio = times["collecting"] / times["plain"]
        print(
            f"{name:14} plain {times['plain']:.1f} ms   collecting {times['collecting']:.1f} ms   ratio {ratio:.3f}", flush=True
        )


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or MODELS)
