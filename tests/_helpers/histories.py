"""Histories (`history.json`) of pruning runs, with made-up figures."""

import copy

CANDIDATES = {
    "keep": {"milliseconds": 0.512, "operators": 3, "multiplications": 28_700_000, "relative_error": 5e-7},
    "merge": {"milliseconds": 0.231, "operators": 1, "multiplications": 12_340_000, "relative_error": 4e-7},
}
FUSION = {
    "speedup": 2.0,
    "max_relative_error": 2e-7,
    "choice": "fused",
    "milliseconds": {"original": 3.2, "folded": 2.4, "fused": 1.6},
    "chains": [
        {"names": ["block1.expand", "block1.bn"], "candidates": CANDIDATES, "choice": "merge", "note": ""},
        {"names": ["block2.expand"], "candidates": CANDIDATES, "choice": "keep", "note": "a reason for <this>"},
        {"names": ["alone"], "candidates": {}, "choice": "keep", "note": ""},
    ],
}
#: Texts that a page must escape: they look like HTML, formulas or templates, or are not ASCII.
HOSTILE = ["<script>alert(1)</script>", '"><b>&', "$x_1$", "a\\b{{ 7 * 7 }}", "名前.relu"]


def make_history(sites, steps, *, kept_step=None, fusion=FUSION, per_step=1):
    """Return the history of a run that removes sites (calls of an activation) in the given order.

    Args:
        sites: the names of the sites of the dense network.
        steps: the number of steps, including step 0, the dense network.
        kept_step: the index of the kept step; None for the last step.
        fusion: the report on fusing the kept network; None for an unfinished run.
        per_step: the number of sites that each step after step 0 removes.
    """
    history = {
        "recipe": "digits",
        "seed": 7,
        "options": {"max_drop": 0.01, "max_removed": None, "per_step": per_step, "epochs": 10, "device": "cpu"},
        "machine": {"device": "a processor (2 threads)", "torch": "2.15.0", "date": "2026-11-23"},
        "steps": [],
        "kept_step": (steps - 1 if kept_step is None else kept_step) if fusion else None,
        "fusion": fusion,
        "latency_ms": {"dense": 4.0, "dense_fused": 3.0, "pruned": 3.2, "fused": 1.6} if fusion else None,
    }
    for step in range(steps):
        left = sites[step * per_step :]
        history["steps"].append(
            {
                "removed": sites[(step - 1) * per_step : step * per_step] if step else [],
                "layer_entropy": {name: 0.3 + 0.5 * sites.index(name) / len(sites) + 0.001 * step for name in left},
                "validation": 0.98 - 0.004 * step,
                "test": 0.97 - 0.004 * step,
                "latency_ms": {"pruned": 4.0 - 0.1 * step, "fused": 3.0 - 0.2 * step},
                "collapsed": [],
            }
        )
    return history


def make_neuron_history(sites, steps, **options):
    """Return the history of a run that replaces single neurons; other arguments are those of `make_history`.

    Each step after step 0 makes 2 of 16 neurons of each site linear and 1 constant, and step 5 removes the last site.
    """
    history = make_history(sites, steps, **options)
    history["options"]["granularity"] = "neuron"
    for index, step in enumerate(history["steps"]):
        step["removed"] = [sites[-1]] if index == 5 else []
        step["layer_entropy"] = dict.fromkeys(sites[: -1 if index >= 5 else None], 0.5)
        changed = {"neurons": 16, "linear": 2, "constant": 1}
        step["neurons"] = dict.fromkeys(sites, changed) if index else {}
    return history


def make_run(sites=6, steps=4, fused=1.6, test=0.0, recipe="digits", machine="a processor", seed=0, **options):
    """Return a history in which the last step is rejected, if there is more than one step.

    Args:
        sites: the number of sites of the dense network.
        steps: the number of steps.
        fused: the milliseconds of a call of the fused network.
        test: a number that is added to the test accuracy of every step.
        recipe: the recipe of the run.
        machine: the device of the run.
        seed: the seed of the run.
        options: further options of the run. `finished=False` makes the run unfinished instead.
    """
    finished = options.pop("finished", True)
    history = copy.deepcopy(make_history([f"stage{index}.relu" for index in range(sites)], steps, kept_step=max(steps - 2, 0)))
    history |= {"recipe": recipe, "seed": seed}
    history["machine"]["device"] = machine
    history["options"] |= options
    history["latency_ms"]["fused"] = fused
    for step in history["steps"]:
        step["test"] += test
    return history if finished else history | {"kept_step": None, "fusion": None, "latency_ms": None}
