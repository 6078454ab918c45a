"""Attaching and detaching at any time, from any thread, as often as one likes, leaves nothing behind."""

import gc
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import collect
from tests._helpers.counts import plain_counts
from tests._helpers.invisibility import appearance, changes, import_all, mechanism, state_of_pytorch
from tests._helpers.networks import Reads, make_part
from tests._helpers.statistics import counted

pytestmark = pytest.mark.filterwarnings("ignore:.*fe.isolate")


def functional():
    """A network of which each activation is called in another way."""
    return Reads(
        lambda self, x: F.gelu(self.fc2(F.relu(self.act(self.fc1(x))))), fc1=nn.Linear(4, 6), act=nn.SiLU(), fc2=nn.Linear(6, 3)
    )


DRAWN = {("random numbers of torch", "")}  # by tests that make further models
SITES = {"act": 42, "relu": 42, "gelu": 21}  # of seven rows


@pytest.fixture(scope="module", autouse=True)
def imported():
    import_all()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return functional().eval()


@pytest.fixture
def x():
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


def times(count):
    return {name: count * values for name, values in SITES.items()}


class Scene:
    """How a model and PyTorch looked, what the model computed, and a check that this is so again."""

    def __init__(self, model, x):
        self.model, self.x = model, x
        with torch.inference_mode():
            self.output = model(x)
        self.before, self.untouched = appearance(model, in_copies=True), mechanism()

    def assert_as_before(self):
        assert changes(self.before, appearance(self.model, in_copies=True), DRAWN) == {}
        with torch.inference_mode():
            assert torch.equal(self.model(self.x), self.output)
        assert changes(self.before, appearance(self.model, in_copies=True), DRAWN) == {}
        self.model(self.x)  # outside of inference mode, which puts the dispatch keys back when it is left
        assert changes(self.untouched, mechanism()) == {}


@pytest.fixture
def scene(model, x):
    scene = Scene(model, x)
    yield scene
    scene.assert_as_before()


# Cycles ------------------------------------------------------------------------------------------------------------------


def cycle(model, x, way):
    collector = collect(model)
    collector.attach()
    if way != "without a pass":
        model(x)
    if way == "two passes":
        model(x)
    if way == "raises":
        with pytest.raises(RuntimeError):
            model(x[:, :2])
    if way == "dropped":
        del collector
        gc.collect()
    else:
        collector.detach()


CYCLES = ["without a pass", "one pass", "two passes", "raises", "dropped"]


@pytest.mark.slow
@pytest.mark.parametrize("way", CYCLES)
def test_hundreds_of_cycles_leak_nothing(scene, model, x, way):
    """What leaks in each cycle would show in each of four rounds; caches that fill do not."""

    def run(count):
        objects, (memory, _) = len(gc.get_objects()), tracemalloc.get_traced_memory()
        for _ in range(count):
            cycle(model, x, way)
        gc.collect()
        return len(gc.get_objects()) - objects, tracemalloc.get_traced_memory()[0] - memory

    cycles = 5 if way == "dropped" else 50  # the dropped ones collect garbage each time
    gc.collect()
    gc.freeze()  # what other tests left need not be searched each time
    tracemalloc.start()
    try:
        with torch.inference_mode():
            run(cycles // 5)
            objects, memory = zip(*[run(cycles) for _ in range(4)], strict=True)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert min(objects) < 0.1 * cycles
    assert min(memory) < 40 * cycles + 10_000  # a collector alone has more than that


@pytest.mark.slow
@pytest.mark.parametrize("way", CYCLES)
def test_model_and_collector_are_freed(x, way):
    state = state_of_pytorch() | mechanism()
    model = functional()
    collector = collect(model)
    collector.attach()
    for _ in range({"without a pass": 0, "one pass": 1}.get(way, 2)):
        model(x)
    if way != "dropped":
        collector.detach()
    dead = [weakref.ref(each) for each in (model, model.act, collector)]
    del collector
    gc.collect()
    assert dead[2]() is None
    model(x)
    del model
    gc.collect()
    assert [reference() for reference in dead] == [None] * 3
    assert changes(state, state_of_pytorch() | mechanism(), DRAWN) == {}


def test_model_is_freed_before_its_statistics(x):
    model = functional()
    with collect(model) as collector:
        model(x)
    statistics, dead = collector.compute(), weakref.ref(model)
    del model, collector
    gc.collect()
    assert dead() is None
    assert {name: site.observations for name, site in statistics.items()} == times(1)


def test_dropped_collector_no_longer_counts_or_blocks(scene, model, x):
    collect(model).attach()
    gc.collect()
    with collect(model) as collector:
        model(x)
    assert counted(collector) == times(1)


def test_attaching_and_detaching_twice(scene, model, x):
    collector = collect(model)
    for _ in range(2):
        collector.attach()
        with pytest.raises(RuntimeError, match="detach it first"):
            collector.attach()
        model(x)
        collector.detach()
        collector.detach()
    assert counted(collector) == times(2)


# Several collectors ------------------------------------------------------------------------------------------------------


def test_collectors_of_disjoint_models(scene, model, x):
    other = make_part()
    first, second = collect(model), collect(other)
    first.attach()
    second.attach()
    model(x)
    other(x[:, :3])
    first.detach()  # not the last that was attached
    model(x)
    other(x[:, :3])
    second.detach()
    other(x[:, :3])
    assert counted(first) == times(1)
    assert counted(second) == {"1": 2 * 28, "2.1": 2 * 35}


def test_passes_of_one_model_inside_of_another(x):
    inner = make_part()
    outer = Reads(lambda self, x: self.act(self.fc(x)) + self.hidden[0](x[:, :3]).sum(), fc=nn.Linear(4, 6), act=nn.ReLU())
    outer.hidden = [inner]  # a list, so that it is no submodule
    with torch.no_grad(), collect(outer) as first, collect(inner) as second:
        outputs = [outer(x) for _ in range(3)]
    assert all(torch.equal(output, outer(x)) for output in outputs)
    assert counted(first) == {"act": 3 * 42}
    assert counted(second) == {"1": 3 * 28, "2.1": 3 * 35}


@pytest.mark.parametrize("passes_before", [0, 1])
def test_shared_submodule_is_refused(scene, model, x, passes_before):
    other = nn.Sequential(model.fc1, model.act)
    look = appearance(other)
    with collect(model) as first:
        for _ in range(passes_before):
            model(x)
        second = collect(other)
        with pytest.raises(RuntimeError, match="detach it first"):
            second.attach()
        other(x)
        assert changes(look, appearance(other)) == {}
        model(x)
    with second:
        other(x)
    assert counted(first)["relu"] == (passes_before + 1) * 42
    assert counted(second) == {"1": 42}


# Within a pass -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("passes_before", [0, 1, 2])
@pytest.mark.parametrize("place", ["fc1", "act", "fc2"])
@pytest.mark.parametrize("hook", ["before", "after"])
def test_detached_inside_of_a_forward(scene, model, x, place, hook, passes_before, mode):
    """The pass that runs then is computed as ever, and the passes before are counted."""
    collector, passes = collect(model), []

    def detach(*args):
        if len(passes) == passes_before:
            collector.detach()

    module = model.get_submodule(place)
    handle = module.register_forward_pre_hook(detach) if hook == "before" else module.register_forward_hook(detach)
    collector.attach()
    with mode():
        for _ in range(passes_before + 2):
            output = model(x)
            assert torch.equal(output, scene.output)
            passes.append(output)
    handle.remove()
    total = counted(collector) if passes_before else dict.fromkeys(SITES, 0)
    assert total in (times(passes_before), times(passes_before + 1))
    with mode(), collector:
        model(x)
    assert counted(collector) == {name: count + SITES[name] for name, count in total.items()}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("place", ["fc1", "act", "fc2"])
def test_attached_inside_of_a_forward(scene, model, x, place, mode):
    """The pass that runs then is computed as ever, and those that begin later are counted as a whole."""
    collector = collect(model)
    handle = model.get_submodule(place).register_forward_pre_hook(lambda *args: collector.attach())
    with mode():
        assert torch.equal(model(x), scene.output)
        handle.remove()
        collector.reset()
        assert torch.equal(model(x), scene.output)
        assert torch.equal(model(x), scene.output)
    collector.detach()
    # An activation that was called before anything was known to have run is a site of its own.
    assert {name.removesuffix(":1"): count for name, count in counted(collector).items()} == times(2)


# Threads -----------------------------------------------------------------------------------------------------------------


def in_thread(function, *args):
    """Run a function in a thread of its own, and return its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


@pytest.mark.parametrize("passes_before", [0, 1])
def test_attached_in_one_thread_and_run_in_others(scene, model, x, passes_before):
    collector = collect(model)
    in_thread(collector.attach)
    for _ in range(passes_before):
        model(x)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: model(x), range(8)))
    assert all(torch.equal(output, scene.output) for output in outputs)
    in_thread(collector.detach)
    in_thread(model, x)
    assert counted(collector) == times(8 + passes_before)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("passes_before", [0, 1])
@pytest.mark.parametrize("place", ["fc1", "act", "fc2"])
def test_detached_by_another_thread_while_a_pass_runs(scene, model, x, place, passes_before, mode):
    collector, reached, goes_on = collect(model), threading.Event(), threading.Event()
    state = state_of_pytorch() | mechanism()

    def wait(*args):
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert goes_on.wait(60)

    def run():
        before = mechanism()["dispatch keys"]
        with mode():
            outputs = [model(x), model(x)]
        assert mechanism()["dispatch keys"] == before
        assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        return outputs

    collector.attach()
    for _ in range(passes_before):
        model(x)
    handle = model.get_submodule(place).register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        outputs = pool.submit(run)
        assert reached.wait(60)
        collector.detach()
        assert torch.equal(model(x), scene.output)
        goes_on.set()
        assert all(torch.equal(output, scene.output) for output in outputs.result())
    handle.remove()
    assert changes(state, state_of_pytorch() | mechanism(), DRAWN) == {}
    with collector:
        model(x)
    assert counted(collector) in (times(passes_before + 1), times(passes_before + 2))


@pytest.mark.slow
def test_attached_and_detached_while_others_run(scene, model, x):
    """Passes of other threads give the right outputs. Those that had begun before it was attached are counted in part."""
    stop = threading.Event()

    def run():
        outputs = []
        with torch.inference_mode():
            while not stop.is_set() or not outputs:
                outputs.append(torch.equal(model(x), scene.output))
        return all(outputs)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(run) for _ in range(3)]
        try:
            collectors = [collect(model) for _ in range(100)]
            for collector in collectors:
                with collector:
                    model(x)
        finally:
            stop.set()
        assert all(each.result() for each in running)
    expected = plain_counts(model.fc1(x), 1)
    for collector in collectors:
        passes = {name: count / SITES[name.partition(":")[0]] for name, count in counted(collector).items()}
        assert all(count.is_integer() for count in passes.values())
        assert max(passes.values()) - min(passes.values()) <= len(running)
        assert torch.equal(collector.compute()["act"].counts, int(passes["act"]) * expected)


def test_models_in_threads_of_their_own(x):
    """Collectors that come and go in other threads do not end the counting in this one."""

    def work(index):
        model = functional()
        with torch.inference_mode():
            expected = model(x)
            for _ in range(10):
                with collect(model) as collector:
                    assert torch.equal(model(x), expected)
                    assert torch.equal(model(x), expected)
                assert counted(collector) == times(2)

    state = state_of_pytorch() | mechanism()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert changes(state, state_of_pytorch() | mechanism(), DRAWN) == {}
