"""Canaries: what the private names of PyTorch mean to us, and that a name that is gone is an error and not a guess."""

import contextlib
import copy
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode, functional_tensor
from torch.autograd import forward_ad
from torch.distributed import _functional_collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, _utils, distribute_tensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils.checkpoint import checkpoint

from fastentropy import _compat
from fastentropy._compat import compiled as compiled_code
from fastentropy._compat import interception, lookup, modes, modules
from fastentropy_kernels import _compat as kernels_compat


class Branching(nn.Module):
    def forward(self, x):
        return x.relu() if x.shape[0] * x.shape[1] < 100 else x


class Mode(_compat.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    pass


@pytest.fixture(autouse=True)
def found_anew():
    """A name that was found before is looked up again, in the test and after it."""
    for found in (lookup.named, modules._global_pre_hooks):
        found.cache_clear()
    yield
    for found in (lookup.named, modules._global_pre_hooks):
        found.cache_clear()


@pytest.fixture(scope="module")
def dtensor(tmp_path_factory):
    """A DTensor of one rank, whose part is all of it."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distribute_tensor(torch.arange(6.0).view(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def program():
    sizes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    return torch.export.export(Branching(), (torch.ones(3, 4),), dynamic_shapes=sizes)


@pytest.mark.parametrize("stride", [(12, 1, 4), (24, 2, 8)])
def test_a_tensor_without_values_has_the_layout_of_another_one(stride):
    x = torch.zeros(100, dtype=torch.float16).as_strided((2, 4, 3), stride)
    like = _compat.without_values(x)
    assert (like.shape, like.stride(), like.dtype, like.device) == (x.shape, stride, x.dtype, x.device)
    assert like.is_contiguous() == x.is_contiguous()
    assert not hasattr(like, "real_tensor") or like.real_tensor is None


def test_plain_eager():
    x = torch.ones(2)
    assert kernels_compat.is_plain_eager(x)
    with Mode():
        assert not kernels_compat.is_plain_eager(x)
    with forward_ad.dual_level():
        assert not kernels_compat.is_plain_eager(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(kernels_compat.is_plain_eager(row)) or row)(torch.ones(2, 2))
    torch.jit.trace(lambda x: seen.append(kernels_compat.is_plain_eager(x)) or x * 2, x, check_trace=False)
    assert seen == [False, False]


def test_driver_of_triton_is_restored():
    driver = pytest.importorskip("triton").runtime.driver
    before, ours = driver._active, object()
    with kernels_compat.triton_driver(ours):
        assert driver.active is ours
    assert driver._active is before


def test_openmp_of_pytorch():
    parallel = kernels_compat.openmp_parallel()
    assert (parallel is not None) == sys.platform.startswith("linux")


def test_in_backward():
    seen = []

    def forward(x):
        seen.append(_compat.in_backward())
        return x * x

    checkpoint(forward, torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    assert seen == [False, True]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_running_checkpoint(use_reentrant):
    seen = []

    def inner(x):
        seen.append(_compat.running_checkpoint())
        return x.sin()

    def outer(x):
        seen.append(_compat.running_checkpoint())
        return checkpoint(inner, x.sin(), use_reentrant=use_reentrant).sin()

    checkpoint(outer, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant).backward()
    assert _compat.running_checkpoint() is None
    if use_reentrant:
        assert set(seen) == {None}
    else:
        assert None not in seen
        assert seen.count(seen[0]) == 2  # the outer one, in the forward and recomputed
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            assert _compat.running_checkpoint() is None


def test_dispatch_modes():
    assert not _compat.in_dispatch_mode()
    with Mode():
        assert _compat.in_dispatch_mode()
        with _compat.without_modes():
            assert not _compat.in_dispatch_mode()
        assert _compat.in_dispatch_mode()


def test_a_mode_steps_aside():
    class Seeing(Mode):
        seen = 0

        def __torch_dispatch__(self, *args, **kwargs):
            self.seen += 1
            return super().__torch_dispatch__(*args, **kwargs)

    assert not _compat.is_only_mode(Mode())
    with Seeing() as mode:
        assert _compat.is_only_mode(mode)
        assert not _compat.is_only_mode(Mode())
        _compat.step_aside()
        assert not _compat.in_dispatch_mode()
        torch.ones(1)
        assert mode.seen == 0
        for _ in range(2):
            _compat.step_back(mode)
            assert torch._C._len_torch_dispatch_stack() == 1
        torch.ones(1)
        assert mode.seen == 1
        with Mode() as inner:
            assert not _compat.is_only_mode(mode)
            assert not _compat.is_only_mode(inner)
    assert not _compat.in_dispatch_mode()


def test_functorch_tensor():
    seen = []
    torch.func.vmap(lambda row: seen.append(_compat.is_functorch_tensor(row)) or row)(torch.ones(2, 2))
    assert (seen, _compat.is_functorch_tensor(torch.ones(2))) == ([True], False)


def test_values():
    seen = []
    with FakeTensorMode():
        assert not _compat.has_values(torch.ones(2))
    torch.func.functionalize(lambda x: seen.append(_compat.has_values(x)) or x)(torch.ones(2))
    with functional_tensor.FunctionalTensorMode():
        seen.append(_compat.has_values(functional_tensor.FunctionalTensor.to_functional(torch.ones(2))))
    assert seen == [False, False]
    assert not _compat.has_values(torch.ones(2, device="meta"))
    assert _compat.has_values(torch.ones(2))
    assert _compat.has_values(nn.Parameter(torch.ones(2)))


def test_function_modes():
    assert not _compat.in_function_mode()
    with torch.device("meta"):
        assert not _compat.in_function_mode()
        with FunctionMode():
            assert _compat.in_function_mode()
            with _compat.without_modes():
                assert not _compat.in_function_mode()
                assert torch.ones(1).device.type == "cpu"
    with FunctionMode():
        assert _compat.in_function_mode()


def test_subclasses_of_tensor_are_not_asked():
    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("was asked")

    with _compat.without_modes():
        assert type(torch.ones(2).as_subclass(Asked).detach()) is torch.Tensor


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_runs_only_forward(register):
    module = nn.ReLU()
    assert _compat.runs_only_forward(module)
    handle = getattr(module, register)(lambda *args: None)
    assert not _compat.runs_only_forward(module)
    handle.remove()
    assert _compat.runs_only_forward(module)


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules_run_too(register):
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda *args: None)
    assert not _compat.runs_only_forward(nn.ReLU())
    handle.remove()
    assert _compat.runs_only_forward(nn.ReLU())


def test_add_to_each():
    totals = [torch.tensor(1), torch.tensor(2)]
    _compat.add_to_each(totals, [torch.tensor(10), torch.tensor(20)])
    _compat.add_to_each(totals, [100, 200])
    assert totals == [111, 222]


def test_buffers_parameters_and_children_are_what_the_module_reads():
    module = nn.Module()
    module.register_buffer("a", None)
    module.register_parameter("weight", None)
    module.first = module.second = nn.ReLU()
    assert _compat.buffers_of(module) == {"a": None}
    assert _compat.children_of(module) == {"first": module.first, "second": module.first}
    assert _compat.parameters_of(module) == {"weight": None}
    _compat.buffers_of(module)["a"] = torch.ones(1)
    _compat.parameters_of(module)["weight"] = nn.Parameter(torch.ones(1))
    assert module.weight == 1
    _compat.children_of(module)["second"] = nn.GELU()
    assert module.a == 1
    assert isinstance(module.second, nn.GELU)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks(register):
    module = nn.ReLU()
    assert not _compat.has_hooks(module)
    getattr(module, register)(lambda *args: None)
    assert _compat.has_hooks(module)


def test_compiled_modules():
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
    assert not _compat.is_compiled(model)
    model[0] = torch.compile(model[0])
    model[1].compile()
    assert [_compat.is_compiled(module) for module in (model, model[0], model[1])] == [False, True, True]
    paths = [_compat.path_when_uncompiled(name) for name, _ in model.named_modules()]
    assert paths == ["", "0", "0", "0.0", "1"]
    assert [type(_compat.uncompiled(module)) for module in model] == [nn.Sequential, nn.ReLU]


def test_asserts_metadata():
    class Cast(torch.nn.Module):
        def forward(self, x):
            return x.relu().to(torch.float32)

    nodes = torch.export.export(Cast(), (torch.ones(2),)).graph.nodes
    assert [_compat.asserts_metadata(node.target) for node in nodes].count(True) == 1
    assert not _compat.asserts_metadata(torch.ops.aten.relu.default)
    assert not _compat.asserts_metadata("placeholder")


def test_to_copy():
    class Cast(torch.nn.Module):
        def forward(self, x):
            return x.to(torch.float64)

    program = torch.export.export(Cast(), (torch.ones(2),)).run_decompositions()
    assert _compat.to_copy() in {node.target for node in program.graph.nodes}


def test_operator_schema():
    schema = _compat.operator_schema(torch.ops.aten.relu_.default)
    assert schema.is_mutable
    assert [argument.name for argument in schema.arguments] == ["self"]
    assert _compat.operator_schema(torch.relu) is None


def test_export_guards_tell_the_branch(program):
    assert any(re.search(r"L\['x'\]\.size\(\)\[0\].*100", guard) for guard in _compat.export_guards(program))


def test_frozen_weights():
    from torch._inductor import config

    with _compat.with_frozen_weights():
        assert config.freezing
    assert not config.freezing


def test_recompile_limit():
    config = torch._dynamo.config
    before = config.recompile_limit
    with _compat.with_recompile_limit(before + 1):
        assert config.recompile_limit == before + 1
    assert config.recompile_limit == before


def test_part_of_a_dtensor(dtensor):
    local = _compat.local_part(dtensor)
    assert type(local) is torch.Tensor
    assert torch.equal(local, torch.arange(6.0).view(3, 2))
    assert tuple(map(tuple, _compat.local_shape_and_offset(dtensor))) == ((3, 2), (0, 0))


def test_pending_collective(dtensor):
    from torch.distributed import _functional_collectives

    pending = _functional_collectives.all_reduce(torch.ones(2), "sum", dist.group.WORLD)
    assert type(pending) is not torch.Tensor
    for plain in (_compat.without_waiting(pending), _compat.wait_tensor(pending)):
        assert type(plain) is torch.Tensor
        assert torch.equal(plain, torch.ones(2))
    assert _compat.wait_tensor(plain) is _compat.without_waiting(plain) is plain


def test_call_of_modules():
    model, original, calls = nn.Sequential(nn.ReLU()), _compat.module_call(), []
    _compat.replace_module_call(lambda module, x: calls.append(module) or original(module, x))
    try:
        compiled = torch.compile(model, backend="eager")
        with torch.compiler.set_stance("force_eager"):
            compiled(torch.ones(2))
    finally:
        _compat.replace_module_call(original)
    assert calls == [compiled, model, model[0]]


def test_call_of_a_module_that_is_compiled_in_place():
    module = nn.ReLU()
    assert _compat.compiled_call(module) is None
    module.compile(backend="eager")
    assert _compat.compiled_call(module) is not None


def test_module_identity():
    module = nn.Linear(2, 2)
    replica = module._replicate_for_data_parallel()
    assert _compat.module_identity(module) == _compat.module_identity(replica)
    assert [_compat.is_replica(each) for each in (module, copy.copy(module), replica)] == [False, False, True]
    assert _compat.module_identity(module) != _compat.module_identity(copy.deepcopy(module))


def test_hooks_before_the_forward_and_of_all_modules():
    module = nn.ReLU()
    with module.register_forward_hook(print):
        assert not _compat.has_pre_hooks(module)
    with module.register_forward_pre_hook(print):
        assert _compat.has_pre_hooks(module)
    with torch.nn.modules.module.register_module_forward_pre_hook(print):
        assert _compat.has_pre_hooks(module)
        assert not _compat.has_hooks(module)
    assert not _compat.has_pre_hooks(module)


def test_traced():
    x, seen = torch.ones(2), []

    def trace(x):
        seen.append(_compat.is_traced())
        return x + 1

    class Traced(nn.Module):
        def forward(self, x):
            return trace(x)

    assert not _compat.is_traced()
    torch.jit.trace(trace, (x,), check_trace=False)
    make_fx(trace)(x)
    torch.export.export(Traced(), (x,))
    assert seen == [True, True, True]
    assert not _compat.is_traced()


def test_operators_are_intercepted_in_this_thread_alone():
    x, seen = torch.tensor([-1.0, 2.0]), []

    def run(operator, args, kwargs):
        seen.append(operator)
        return operator(*args, **kwargs) + 1

    operator = torch.ops.aten.frac.default
    _compat.intercept_operators((operator,), run)
    _compat.set_intercepting(True)
    try:
        assert torch.equal(torch.frac(x), torch.ones(2))
        thread = threading.Thread(target=torch.frac, args=(x,))
        thread.start()
        thread.join()
        with _compat.without_intercepting():
            torch.frac(x)
    finally:
        _compat.set_intercepting(False)
    torch.frac(x)
    assert seen == [operator]


def test_composite_kernel():
    import torch._decomp  # registers decompositions in Python that round differently

    operator, x = torch.ops.aten.upsample_bilinear2d.vec, torch.randn(1, 3, 7, 9)
    arguments = (x, (11, 13), False, None)
    assert torch.equal(_compat.composite_kernel(operator)(*arguments), operator(*arguments))
    assert _compat.composite_kernel(torch.ops.aten.relu.default) is None
    assert _compat.composite_kernel(torch.ops.higher_order.cond) is None
    assert _compat.composite_kernel(torch.relu) is None


def test_operators_without_a_composite_kernel_that_the_dispatcher_knows():
    operators = [torch.ops.prim.device.default, torch.ops.aten.sym_size.default, torch.ops.aten._fused_rms_norm.default]
    assert [_compat.composite_kernel(operator) for operator in operators] == [None] * 3


def test_weak_storage():
    x = torch.ones(6)
    address, weak = _compat.storage_id(x), _compat.weak_storage(x)
    view = x[2:]
    del x
    assert not weak.expired()
    del view
    assert weak.expired()
    assert all(_compat.storage_id(torch.ones(6)) != address for _ in range(100))


def test_classes_that_handle_operators():
    from torch.distributed.tensor import DTensor
    from torch.sparse import SparseSemiStructuredTensor

    class Plain(torch.Tensor):
        pass

    handled = [torch.Tensor, nn.Parameter, Plain, DTensor, SparseSemiStructuredTensor]
    assert [_compat.handles_operators(kind) for kind in handled] == [False, False, False, True, True]


class Failing(_compat.TorchDispatchMode):
    """A mode of which `__exit__` raises before, or after, it has left the stack."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        entered = super().__enter__()
        if self.when == "entering":
            raise KeyboardInterrupt
        return entered

    def __exit__(self, *exception):
        if self.when == "before":
            raise RecursionError
        super().__exit__(*exception)
        if self.when == "after":
            raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["entering", "before", "after", "never"])
@pytest.mark.parametrize("outer", [0, 1])
def test_a_mode_is_left_whatever_is_raised(when, outer, monkeypatch):
    # All threads share the flag, and PyTorch leaves it on where two of them have compiled at the same time, as in tests before.
    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", False)
    around = Failing("never")
    with contextlib.ExitStack() as stack:
        for _ in range(outer):
            stack.enter_context(around)
        flags = modes._mode_flags()
        with contextlib.suppress(KeyboardInterrupt, RecursionError), _compat.entered(Failing(when)):
            torch.ones(2)
        assert torch._C._len_torch_dispatch_stack() == outer
        assert modes._mode_flags() == flags
        assert _python_dispatch.is_in_torch_dispatch_mode() == bool(outer)
        assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))


def test_storage_id():
    for device in ("cpu", "meta"):
        x, other = torch.ones(6, device=device), torch.ones(6, device=device)
        assert _compat.storage_id(x[2:].view(2, 2)) == _compat.storage_id(x)
        assert _compat.storage_id(x) != _compat.storage_id(other)


def in_mode(call):
    with Mode():
        call()


def in_function_mode(call):
    with FunctionMode():
        call()


GONE = [
    (torch._C, "_get_tracing_state", lambda: kernels_compat.is_plain_eager(torch.ones(1))),
    (torch._C, "_len_torch_dispatch_stack", lambda: kernels_compat.is_plain_eager(torch.ones(1))),
    (forward_ad, "_current_level", lambda: kernels_compat.is_plain_eager(torch.ones(1))),
    (torch._C._functorch, "is_functorch_wrapped_tensor", lambda: kernels_compat.is_plain_eager(torch.ones(1))),
    (torch._C, "_current_graph_task_id", lambda: _compat.in_backward()),
    (torch._C, "_len_torch_dispatch_stack", lambda: _compat.in_dispatch_mode()),
    (torch._C, "_len_torch_dispatch_stack", lambda: _compat.is_only_mode(Mode())),
    (torch._C, "_get_dispatch_stack_at", lambda: in_mode(lambda: _compat.is_only_mode(Mode()))),
    (torch._C, "_pop_torch_dispatch_stack", lambda: _compat.step_aside()),
    (torch._C, "_push_on_torch_dispatch_stack", lambda: _compat.step_back(Mode())),
    (torch._C, "DisableTorchFunction", lambda: _compat.without_modes()),
    (_python_dispatch, "_disable_current_modes", lambda: in_mode(lambda: _compat.without_modes().__enter__())),
    (torch._C, "_is_torch_function_mode_enabled", lambda: _compat.in_function_mode()),
    (torch.overrides, "_get_current_function_mode_stack", lambda: in_function_mode(_compat.in_function_mode)),
    (torch.utils._device, "DeviceContext", lambda: in_function_mode(_compat.in_function_mode)),
    (nn.modules.module, "_has_any_global_hook", lambda: _compat.runs_only_forward(nn.ReLU())),
    (torch._C._functorch, "is_functorch_wrapped_tensor", lambda: _compat.is_functorch_tensor(torch.ones(1))),
    (torch, "_is_functional_tensor", lambda: _compat.has_values(torch.ones(1))),
    (torch._subclasses, "FakeTensor", lambda: _compat.has_values(nn.Parameter(torch.ones(1)))),
    (functional_tensor, "FunctionalTensor", lambda: _compat.has_values(nn.Parameter(torch.ones(1)))),
    (torch, "_foreach_add_", lambda: _compat.add_to_each([torch.ones(1)], [1])),
    (torch._ops, "OpOverload", lambda: _compat.operator_schema(torch.ops.aten.relu.default)),
    (torch._inductor, "aoti_compile_and_package", lambda: _compat.compile_package(None, "a.pt2")),
    (torch._inductor, "aoti_load_package", lambda: _compat.load_package("a.pt2")),
    (torch._inductor, "config", lambda: _compat.with_frozen_weights()),
    (torch._dynamo, "config", lambda: _compat.with_recompile_limit(64)),
    (torch._dynamo, "OptimizedModule", lambda: _compat.is_compiled(nn.ReLU())),
    (torch._dynamo, "OptimizedModule", lambda: _compat.uncompiled(nn.ReLU())),
    (_functional_collectives, "AsyncCollectiveTensor", lambda: _compat.wait_tensor(nn.Parameter(torch.ones(1)))),
    (_functional_collectives, "AsyncCollectiveTensor", lambda: _compat.without_waiting(nn.Parameter(torch.ones(1)))),
    (_utils, "compute_local_shape_and_global_offset", lambda: _compat.local_shape_and_offset(SimpleNamespace())),
    (torch._C, "_get_tracing_state", lambda: _compat.is_traced()),
    (torch._C._autograd, "_top_saved_tensors_default_hooks", lambda: _compat.running_checkpoint()),
    (proxy_tensor, "get_proxy_mode", lambda: _compat.is_traced()),
    (torch._C, "_dispatch_key_parse", interception._intercepted_key.__wrapped__),
    (torch._C, "DispatchKeySet", interception._intercepted_keys.__wrapped__),
    (torch._C, "_dispatch_tls_set_dispatch_key_included", lambda: _compat.set_intercepting(False)),
    (torch._C, "_ExcludeDispatchKeyGuard", interception._guard_without_key.__wrapped__),
    (torch.nn.modules.module, "_global_forward_pre_hooks", lambda: _compat.has_pre_hooks(nn.ReLU())),
    (torch._C, "_DisableFuncTorch", lambda: _compat.without_transforms()),
    (torch.fx._symbolic_trace, "_orig_module_call", lambda: _compat.outer_module_call()),
    (torch.fx._symbolic_trace, "_orig_module_call", lambda: _compat.take_for_call_in_traces(print)),
    (torch._dynamo.convert_frame, "compile_lock", lambda: compiled_code._counted_alone(in_mode.__code__, print).__enter__()),
    (torch._dynamo.eval_frame, "_debug_get_cache_entry_list", lambda: compiled_code._counted_alone(None, None).__enter__()),
    (torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda: _compat.composite_kernel(torch.ops.aten.relu.default)),
]


@pytest.mark.parametrize(("owner", "name", "call"), GONE, ids=lambda value: value if isinstance(value, str) else "")
def test_a_name_that_is_gone_is_an_error(owner, name, call, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=f"PyTorch {re.escape(torch.__version__)} .*{name}") as error:
        call()
    assert "\n" not in str(error.value)


ATTRIBUTES = {
    "_cdata": lambda without: _compat.storage_id(SimpleNamespace(untyped_storage=lambda: without)),
    "_buffers": _compat.buffers_of,
    "_modules": _compat.children_of,
    "_parameters": _compat.parameters_of,
    "_forward_hooks": _compat.module_identity,
    "_forward_pre_hooks": _compat.has_pre_hooks,
    "_compiled_call_impl": _compat.is_compiled,
    "_guards_code": _compat.export_guards,
    "id_matched_objs": compiled_code._is_counted,
    "_local_tensor": _compat.local_part,
    "children_specs": _compat.tree_node,
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_gone_is_an_error(name):
    with pytest.raises(RuntimeError, match=rf"PyTorch {re.escape(torch.__version__)} has no SimpleNamespace\.{name}"):
        ATTRIBUTES[name](SimpleNamespace())


@pytest.mark.parametrize(
    "name", ["tree_leaves", "tree_map", "tree_structure", "tree_unflatten", "tree_flatten_with_path", "keystr"]
)
def test_functions_for_nested_values_that_are_gone(name):
    program = f"import torch.utils._pytree as pytree; del pytree.{name}; import fastentropy"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"ImportError: fastentropy does not work with PyTorch {torch.__version__}: ")
    assert name in run.stderr.splitlines()[-1]


def test_nested_values():
    value = {"a": [1, (2, 3)], "b": None}
    assert _compat.tree_leaves(value) == [1, 2, 3, None]
    assert _compat.tree_map(str, value) == {"a": ["1", ("2", "3")], "b": "None"}
    entries, spec = _compat.tree_flatten_with_path(value)
    assert [(_compat.keystr(path), leaf) for path, leaf in entries] == [
        ("['a'][0]", 1),
        ("['a'][1][0]", 2),
        ("['a'][1][1]", 3),
        ("['b']", None),
    ]
    assert _compat.tree_unflatten([4, 5, 6, 7], spec) == {"a": [4, (5, 6)], "b": 7}
    kind, keys, (first, last) = _compat.tree_node(spec)
    assert (kind, keys, _compat.tree_node(last)) == (dict, ["a", "b"], (None, None, []))
    assert [_compat.tree_node(part)[0] for part in _compat.tree_node(first)[2]] == [None, tuple]
    assert (spec.num_leaves, first.num_leaves) == (4, 3)


def test_compiler_of_a_thread():
    chosen, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def refusing(graph, inputs):
        raise _compat.UncountableGraphError("never")

    compiled = torch.compile(lambda x: x.sin(), backend=backend, fullgraph=True)
    compiled(torch.ones(2))
    assert [_compat.current_compiler(), len(graphs)] == [None, 1]
    for own, expected in [(None, 1), (refusing, 1), (backend, 2)]:

        def choose(compiler, module, own=own):
            assert _compat.backend_of(compiler).compiler_fn is backend
            _compat.run_as_it_is()
            return own and _compat.CompilerWith(compiler, own, _compat.Refusals(lambda code, error: chosen.append(str(error))))

        end = _compat.choose_compilers(choose)
        try:
            compiled(torch.ones(2))
        finally:
            end()
        assert len(graphs) == expected
    assert chosen == ["never"]
    compiled(torch.ones(2))
    assert len(graphs) == 2


def test_limit_of_recompilations():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x.sin(), backend=backend, dynamic=False)
    refused = _compat.Refusals(lambda code, error: None)

    def run(own):
        end = own and _compat.choose_compilers(lambda compiler, module: _compat.CompilerWith(compiler, own, refused))
        for size in (1, 2, 3, 4):
            compiled(torch.ones(size))
        if own:
            end()

    others = [lambda graph, inputs: backend(graph, inputs) for _ in range(2)]
    with torch._dynamo.config.patch(recompile_limit=3):
        for own, expected in [(others[0], 3), (others[1], 6), (None, 9)]:
            refused.codes.clear()
            run(own)
            assert len(graphs) == expected


def test_calls_of_modules_in_traces():
    calls, module = [], nn.ReLU()

    def call(module, *args):
        calls.append(module)
        return before(module, *args)

    def traced(x):
        assert nn.Module.__call__ is not before
        assert _compat.outer_module_call() is call
        return module(x)

    before = nn.Module.__call__
    end = _compat.take_for_call_in_traces(call)
    try:
        make_fx(traced)(torch.ones(2))
    finally:
        end()
    assert calls == [module]
    assert _compat.outer_module_call() is before is nn.Module.__call__


def test_code_that_is_never_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def inner(x):
        return x.sin()

    def outer(x):
        return inner(x).cos()

    _compat.never_compile(outer.__code__)
    assert torch.equal(torch.compile(outer, backend=backend)(torch.ones(2)), torch.ones(2).sin().cos())
    assert ["sin" in graph.code and "cos" not in graph.code for graph in graphs] == [True]


def test_own_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append((graph, _compat.own_graph(graph)))
        return graph.forward

    torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend=backend)(torch.ones(1, 2))
    for node, own in zip(*(graph.graph.nodes for graph in graphs[0]), strict=True):
        assert node is not own
        assert node.meta.get("nn_module_stack") == own.meta.get("nn_module_stack")
    assert len(list(graphs[0][0].graph.nodes)) > 2


def test_modules_of_compiled_code():
    def backend(graph, inputs):
        found.append((_compat.module_being_compiled(), _compat.roots_of_modules()))
        return graph.forward

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.held = nn.Linear(2, 2), [nn.Linear(2, 2)]

        def forward(self, x):
            return self.held[0](self.layer(x))

    found, model, x = [], Holding(), torch.ones(2)
    torch.compile(model, backend=backend)(x)
    torch.compile(model.layer, backend=backend)(x)
    (holding, roots), (layer, layer_roots) = found
    assert [holding, layer] == [model, model.layer]
    assert roots == {"L['self']", "L['self'].held[0]"}
    assert len(layer_roots) == 1
