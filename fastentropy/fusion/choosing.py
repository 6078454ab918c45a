"""Choose what `fuse` returns: every form in every backend is timed as the very module that would be returned.

A form is one way to compute the same network. The baseline is the model as its user calls it, in its faster memory format.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple, TypeAlias

from torch import nn

from fastentropy._utils.errors import joined_lines
from fastentropy._utils.timing import measure_samples
from fastentropy.fusion.backends import Backend
from fastentropy.fusion.backends.onnx_runtime import missing_packages
from fastentropy.fusion.forms import Form
from fastentropy.fusion.fused_model import FusedModel
from fastentropy.fusion.inputs import Inputs, clone, outputs_of
from fastentropy.fusion.planner import TIE
from fastentropy.fusion.report import ChainReport, FusionReport
from fastentropy.fusion.verification import EquivalenceCheck, Judgement

#: A form and the backend that runs it: the name of the form, its memory format, and the name of the backend.
Entry: TypeAlias = tuple[str, str, str]

#: The model as its user calls it is returned unless another module saves at least this share of its time.
GAIN = TIE

#: The number of rounds, and the seconds for which a round repeats a short call.
ROUNDS, ROUND_SECONDS = 15, 0.002

#: The seconds after which no further round of the measurement begins.
BUDGET_SECONDS = 4.0

#: A module is timed only roughly if it takes more than this many times as long as the fastest one.
SLOWEST = 1.5


#: The bound of a network that is to be trained, in the report.
AT_BORDERS = "no bound: the outputs may differ near the borders of images until the network is trained"

#: The forms in the order in which they are listed.
_NAMES = ("original", "folded", "fused")


class Race(NamedTuple):
    """The modules that `fuse` may return, and their times.

    Attributes:
        modules: the modules by form and backend.
        samples: the milliseconds of a call of each on the example inputs, one number per round; empty if nothing was measured.
        notes: which backends could not run the network or a form of it, and why.
    """

    modules: dict[Entry, FusedModel]
    samples: dict[Entry, list[float]]
    notes: tuple[str, ...]

    def best(self) -> dict[tuple[str, str], Entry]:
        """Return the faster memory format of each form in each backend, by the names of the backend and the form.

        The first one is to be returned if its outputs are those of the model.
        """
        best: dict[tuple[str, str], Entry] = {}
        for entry in self._order():
            best.setdefault((entry[2], entry[0]), entry)
        return best

    def times(self) -> dict[str, dict[str, float]]:
        """Return the milliseconds of each form by backend, each in its faster memory format."""
        if not self.samples:
            return {}
        best = self.best()
        times: dict[str, dict[str, float]] = {}
        for backend, name in dict.fromkeys((backend, name) for name, _, backend in self.modules):
            times.setdefault(backend, {})[name] = median(self.samples[best[backend, name]])
        return times

    def _order(self) -> list[Entry]:
        """Return the entries, the fastest first.

        Times are compared with those of the model in the same round. The model comes before each module that is not faster by
        more than the noise of the measurement. The fused form comes before a folded form that is the same module.
        """
        if not self.samples:
            return list(self.modules)[::-1]
        baselines = [entry for entry in self.samples if entry[0] == "original" and entry[2] == "eager"]
        baseline = min(baselines, key=lambda entry: median(self.samples[entry]))
        ratios = {
            entry: [one / other for one, other in zip(samples, self.samples[baseline], strict=False)]
            for entry, samples in self.samples.items()
        }
        order = sorted(ratios, key=lambda entry: (median(ratios[entry]), entry[0] != "fused"))
        faster = [entry for entry in order if entry not in baselines and _is_below_one(ratios[entry])]
        return [*faster, baseline, *(entry for entry in order if entry not in (*faster, baseline))]


def _is_below_one(ratios: Sequence[float]) -> bool:
    """Return whether ratios are below one by more than their noise: by `GAIN` in the middle, and in three of four rounds."""
    middle, high = median(ratios), sorted(ratios)[3 * (len(ratios) - 1) // 4]
    return middle <= 1 - GAIN and high <= 1


def further_backends(backend: Backend, model: nn.Module) -> tuple[str, ...]:
    """Return the backends that `fuse` tries in addition to "eager", by its argument. ONNX Runtime is for models on a CPU."""
    if backend == "auto":
        on_cpu = all(value.device.type == "cpu" for value in model.state_dict().values())
        return ("inductor", "onnxruntime") if on_cpu and not missing_packages() else ("inductor",)
    return () if backend == "eager" else (backend,)


def race(
    forms: Mapping[Form, nn.Module],
    trace: nn.Module,
    backends: Sequence[str],
    make: Callable[[nn.Module, str], FusedModel],
    inputs: Inputs,
    measure: bool,
) -> Race:
    """Make every module that `fuse` may return, and time them side by side.

    Args:
        forms: the forms of the network.
        trace: the graph of the network as it was traced: the original form in all backends but "eager".
        backends: the backends to try in addition to "eager".
        make: returns the module that runs a form in a backend.
        inputs: the example inputs.
        measure: whether to measure. If not, only the forms in the last backend are made.

    Raises:
        ImportError: a package that a backend needs is missing.
    """
    modules: dict[Entry, FusedModel] = {}
    notes: list[str] = []
    if measure or not backends:
        modules |= _made({(*form, "eager"): module for form, module in forms.items()}, make)
    for backend in backends:
        compiled = _made(dict(_compiled_forms(forms, trace, backend)), make)
        failures = _failures(compiled, inputs)
        if len(failures) == len(compiled):
            notes.append(f"{backend} cannot run this network: {next(iter(failures.values()))}")
        else:
            notes += [f"{backend} cannot run the {name} form: {failure}" for name, failure in failures.items()]
        modules |= {entry: module for entry, module in compiled.items() if entry[0] not in failures}
    return Race(modules, _samples(modules, inputs) if measure else {}, tuple(notes))


def _made(forms: Mapping[Entry, nn.Module], make: Callable[[nn.Module, str], FusedModel]) -> dict[Entry, FusedModel]:
    """Return the modules that run forms in their backends: a single one for entries that have the same form."""
    distinct = {(id(form), entry[2]): form for entry, form in forms.items()}
    made = {key: make(form, key[1]) for key, form in distinct.items()}
    return {entry: made[id(form), entry[2]] for entry, form in forms.items()}


def _compiled_forms(forms: Mapping[Form, nn.Module], trace: nn.Module, backend: str) -> Iterator[tuple[Entry, nn.Module]]:
    """Yield the entries of a backend that lays out values itself, with their forms: each in one memory format.

    torch.compile prefers channels-last, for which the chains were planned in that format; ONNX Runtime computes in the other.
    """
    formats = {memory_format for _, memory_format in forms}
    memory_format = "channels_last" if backend == "inductor" and "channels_last" in formats else "contiguous"
    for name in _NAMES:
        form = forms[name, memory_format]
        yield (name, memory_format, backend), trace if form is forms["original", memory_format] else form


def _failures(modules: Mapping[Entry, FusedModel], inputs: Inputs) -> dict[str, str]:
    """Call each module once, and return by the name of its form why it cannot be compiled or run, if it cannot."""
    failures: dict[str, str] = {}
    for (name, _, _), module in modules.items():
        try:
            outputs_of(module, inputs)
        except ImportError:
            raise
        except Exception as error:  # whatever a compiler raises
            failures[name] = joined_lines(error)[:300]
    return failures


def _samples(modules: Mapping[Entry, FusedModel], inputs: Inputs) -> dict[Entry, list[float]]:
    """Return the milliseconds of calls of each module, as its user calls it, in rounds."""
    inputs = clone(inputs)
    entries = {id(module): entry for entry, module in modules.items()}
    calls = {entry: functools.partial(modules[entry], *inputs.args, **inputs.kwargs) for entry in entries.values()}
    samples = measure_samples(calls, rounds=ROUNDS, round_seconds=ROUND_SECONDS, budget_seconds=BUDGET_SECONDS, slowest=SLOWEST)
    return {entry: samples[entries[id(module)]] for entry, module in modules.items()}


def first_equal(
    made: Race, check: EquivalenceCheck, reports: Mapping[str, tuple[ChainReport, ...]], trains: bool
) -> FusedModel:
    """Return the fastest module that computes what the model computes, with its report.

    Args:
        made: the modules.
        check: compares them with the model.
        reports: the reports on the chains, by memory format.
        trains: whether the fused form may differ near the border of images, because it is to be trained.

    Raises:
        RuntimeError: none of them does.
    """
    best, times = made.best(), made.times()
    formats = {name: memory_format for name, memory_format, _ in sorted(best.values(), key=lambda entry: entry[2] == "eager")}
    for (backend, name), entry in best.items():
        judged = _judge(made.modules[entry], check)
        folded = best.get((backend, "folded"))
        if trains and name == "fused" and folded and _judge(made.modules[folded], check).holds:
            judged = Judgement(judged.error, math.inf, AT_BORDERS)
        if judged.holds:
            milliseconds = {**times[backend], "original": times["eager"]["original"]} if times else {}
            further = backend, times, made.notes, judged.bound
            report = FusionReport(reports[entry[1]], milliseconds, formats, name, judged.error, *further)
            made.modules[entry].report = report
            return made.modules[entry]
    raise RuntimeError(_refusal(judged, check))


def _judge(module: FusedModel, check: EquivalenceCheck) -> Judgement:
    """Judge the outputs of a module. A compiled one runs at the sizes of the example only, its graph at all sizes."""
    if module.report.backend == "eager":
        return check.judge(module)
    return Judgement.worst([check.judge(module.network), check.judge(module, other_sizes=False)])


def _refusal(judged: Judgement, check: EquivalenceCheck) -> str:
    """Return the message for a model whose own trace does not compute the same as the model."""
    text = f"the trace of the model differs from the model by {judged.error:.1e} (relative), above {judged.bound}; "
    if check.is_random:
        return text + "two calls of the model differ as well: it draws random numbers, which a fused model would not repeat"
    return text + "pass a larger tolerance= if that is acceptable"
