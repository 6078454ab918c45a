"""Every private name of PyTorch and of Python that fastentropy uses, each in one small function.

A private name can vanish with any release. If a function does not find its name, it raises RuntimeError. It does not fall back
on a default, because wrong counts, or a fused model that computes something else, would go unnoticed.
"""

import torch

# Passed on unchanged: the base class of dispatch modes, which is documented, and the functions for nested values (pytrees).
try:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import keystr as keystr
    from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_structure as tree_structure
    from torch.utils._pytree import tree_unflatten as tree_unflatten
except ImportError as error:
    raise ImportError(f"fastentropy does not work with PyTorch {torch.__version__}: {error}") from error

from fastentropy._compat.compiled import Backend as Backend
from fastentropy._compat.compiled import CompilerWith as CompilerWith
from fastentropy._compat.compiled import Refusals as Refusals
from fastentropy._compat.compiled import UncountableGraphError as UncountableGraphError
from fastentropy._compat.compiled import UnknownSiteError as UnknownSiteError
from fastentropy._compat.compiled import backend_of as backend_of
from fastentropy._compat.compiled import called_module as called_module
from fastentropy._compat.compiled import choose_compilers as choose_compilers
from fastentropy._compat.compiled import for_counting as for_counting
from fastentropy._compat.compiled import module_being_compiled as module_being_compiled
from fastentropy._compat.compiled import roots_of_modules as roots_of_modules
from fastentropy._compat.compiled import take_for_plain as take_for_plain
from fastentropy._compat.compiled import without_functions_of_modes as without_functions_of_modes
from fastentropy._compat.compiled import wrapper_class as wrapper_class
from fastentropy._compat.frames import Compiler as Compiler
from fastentropy._compat.frames import current_compiler as current_compiler
from fastentropy._compat.frames import is_compiling_here as is_compiling_here
from fastentropy._compat.frames import never_compile as never_compile
from fastentropy._compat.frames import run_as_it_is as run_as_it_is
from fastentropy._compat.frames import set_compiler as set_compiler
from fastentropy._compat.graphs import add_input as add_input
from fastentropy._compat.graphs import bodies as bodies
from fastentropy._compat.graphs import identity_in_stack as identity_in_stack
from fastentropy._compat.graphs import in_fake_mode_of as in_fake_mode_of
from fastentropy._compat.graphs import in_trace_of as in_trace_of
from fastentropy._compat.graphs import is_checkpoint as is_checkpoint
from fastentropy._compat.graphs import own_graph as own_graph
from fastentropy._compat.graphs import size_of as size_of
from fastentropy._compat.graphs import without_values as without_values
from fastentropy._compat.interception import intercept_operators as intercept_operators
from fastentropy._compat.interception import set_intercepting as set_intercepting
from fastentropy._compat.interception import stack_frame as stack_frame
from fastentropy._compat.interception import without_intercepting as without_intercepting
from fastentropy._compat.modes import entered as entered
from fastentropy._compat.modes import in_backward as in_backward
from fastentropy._compat.modes import in_dispatch_mode as in_dispatch_mode
from fastentropy._compat.modes import in_function_mode as in_function_mode
from fastentropy._compat.modes import is_compiled_here as is_compiled_here
from fastentropy._compat.modes import is_only_mode as is_only_mode
from fastentropy._compat.modes import is_traced as is_traced
from fastentropy._compat.modes import running_checkpoint as running_checkpoint
from fastentropy._compat.modes import step_aside as step_aside
from fastentropy._compat.modes import step_back as step_back
from fastentropy._compat.modes import without_modes as without_modes
from fastentropy._compat.modes import without_transforms as without_transforms
from fastentropy._compat.modules import buffers_of as buffers_of
from fastentropy._compat.modules import children_of as children_of
from fastentropy._compat.modules import compiled_call as compiled_call
from fastentropy._compat.modules import has_hooks as has_hooks
from fastentropy._compat.modules import has_pre_hooks as has_pre_hooks
from fastentropy._compat.modules import is_compiled as is_compiled
from fastentropy._compat.modules import is_replica as is_replica
from fastentropy._compat.modules import module_call as module_call
from fastentropy._compat.modules import module_identity as module_identity
from fastentropy._compat.modules import outer_module_call as outer_module_call
from fastentropy._compat.modules import parameters_of as parameters_of
from fastentropy._compat.modules import path_when_uncompiled as path_when_uncompiled
from fastentropy._compat.modules import replace_module_call as replace_module_call
from fastentropy._compat.modules import runs_only_forward as runs_only_forward
from fastentropy._compat.modules import take_for_call_in_traces as take_for_call_in_traces
from fastentropy._compat.modules import uncompiled as uncompiled
from fastentropy._compat.programs import asserts_metadata as asserts_metadata
from fastentropy._compat.programs import compile_package as compile_package
from fastentropy._compat.programs import composite_kernel as composite_kernel
from fastentropy._compat.programs import export_guards as export_guards
from fastentropy._compat.programs import load_package as load_package
from fastentropy._compat.programs import operator_schema as operator_schema
from fastentropy._compat.programs import to_copy as to_copy
from fastentropy._compat.programs import tree_node as tree_node
from fastentropy._compat.programs import with_frozen_weights as with_frozen_weights
from fastentropy._compat.programs import with_recompile_limit as with_recompile_limit
from fastentropy._compat.ranks import local_part as local_part
from fastentropy._compat.ranks import local_shape_and_offset as local_shape_and_offset
from fastentropy._compat.ranks import wait_tensor as wait_tensor
from fastentropy._compat.ranks import without_waiting as without_waiting
from fastentropy._compat.tensors import add_to_each as add_to_each
from fastentropy._compat.tensors import handles_operators as handles_operators
from fastentropy._compat.tensors import has_values as has_values
from fastentropy._compat.tensors import is_functorch_tensor as is_functorch_tensor
from fastentropy._compat.tensors import storage_id as storage_id
from fastentropy._compat.tensors import weak_storage as weak_storage
