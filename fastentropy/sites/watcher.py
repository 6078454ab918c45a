"""Watch the forward passes of a model, and report every call of an activation to an observer."""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fastentropy._compat import in_backward, is_traced, path_when_uncompiled
from fastentropy.sites import interception
from fastentropy.sites.activations import called_name, has_registered_functions
from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.compiled_calls import add_caller, remove_caller, set_caller
from fastentropy.sites.fast_paths import without_fast_path
from fastentropy.sites.graph_sites import GraphCaller
from fastentropy.sites.interception import Interception
from fastentropy.sites.modules import ACTIVATION, CONTAINER, LAYER, NEUTRAL, WatchedModules, is_scripted_activation
from fastentropy.sites.observer import Observer
from fastentropy.sites.operators import FunctionCalls, begin_listening, end_listening, keep_listening, listening
from fastentropy.sites.padding import Mask, MaskArgument, find_tokens, same_shape, tells_of_padding, token_mask
from fastentropy.sites.passes import Pass, Produced, ThreadState
from fastentropy.sites.registry import Misfits, SiteRegistry
from fastentropy.sites.reporter import CallReporter, calling_frame, is_countable
from fastentropy.sites.sharding import local_tensor
from fastentropy.sites.site import Site

P = TypeVar("P")


class SiteWatcher(Generic[P]):
    """Report every activation call of a model to an observer while attached. The observer runs the activation.

    Each such call belongs to a site, which is one call of an activation in a forward pass. Sites are discovered when they are
    first called. In the first complete pass through each module that is called from outside, every operator is followed to find
    out where the neurons lie. Each thread has passes of its own. Activation checkpointing repeats forwards during backward;
    these are not reported, and neither is code that torch.compile or torch.export traces.

    Attributes:
        modules: the modules of the model.
        registry: the sites that were discovered.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Observer[P],
        channel_axis: Mapping[str, int] | None = None,
        mask: Mask = None,
        exclude: Collection[str] = (),
        misfits: Misfits = "raise",
    ) -> None:
        """Prepare to watch a model.

        Args:
            model: any module.
            observer: the object that runs the activations.
            channel_axis: the axis of the neurons, by name of the site, for sites where it should not be inferred.
            mask: where the padding mask of a call comes from: the name of an argument, a function, or None (see `Mask`).
            exclude: names of sites, or patterns of names (see `fnmatch`), that are run without being reported.
            misfits: what happens to a site of which an input has another number of neurons.
        """
        self._model, self._observer, self._mask = model, observer, mask
        self.modules = WatchedModules(model, mask)
        self.registry = SiteRegistry(self.modules.class_at, dict(channel_axis or {}), exclude, misfits)
        self._reporter = CallReporter(self.modules, self.registry, observer)
        handlers = {
            ACTIVATION: self._run_activation,
            CONTAINER: self._run_container,
            LAYER: self._run_layer,
            NEUTRAL: self._run_neutral,
        }
        self._interception = Interception(handlers, self._add_module)
        self._entries: set[str] = set()
        self._thread: ThreadState[P] = ThreadState()
        names, places = self._reporter.names, self._reporter.places
        self._graphs = GraphCaller(self.modules, self.registry, names, places, self._thread, observer)
        self._attachment: object = None  # another one each time that the watcher is attached
        self._warned_of_mask = False

    def attach(self) -> None:
        """Begin to watch.

        Raises:
            RuntimeError: the model, or a part of it, is being watched already.
            ValueError: activations are compiled by TorchScript.
        """
        if self.is_attached:
            raise RuntimeError("a collector is attached to this model already; detach it first")
        if scripted := [name for name, module in self._model.named_modules() if is_scripted_activation(module)]:
            name = path_when_uncompiled(scripted[0]) or type(self._model).__name__
            raise ValueError(
                f"{name!r} is compiled by TorchScript, where calls cannot be seen; "
                "collect on the model as it was before torch.jit.script"
            )
        self._thread = self._graphs.thread = ThreadState()
        self.modules.refresh()
        self._graphs.forget()
        self._interception.attach(self._model, self.modules.kinds)
        self._attachment = object()
        add_caller(self._graphs)
        begin_listening(self)

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        self._attachment = None
        self._interception.detach()
        remove_caller(self._graphs)
        end_listening()

    @property
    def sites(self) -> dict[str, Site]:
        """Return the sites that were discovered, by name."""
        return self.registry.sites

    @property
    def is_attached(self) -> bool:
        """Return whether the model is being watched."""
        return self._interception.is_attached

    def _add_module(self, owner: str, attribute: str, module: nn.Module) -> None:
        """Watch a module that is put into the model while it is watched. The next passes discover its sites."""
        path = f"{owner}.{attribute}".lstrip(".")
        for replaced in self.modules.remove(path):
            self._interception.remove(replaced)
        for name, (added, kind) in self.modules.add(path, module).items():
            self._interception.add(name, added, kind)
        self._entries.clear()
        self._graphs.forget()

    # The handlers of `Interception`, so their arguments are those of `interception.Handler` ---------------------------------

    def _run_layer(
        self, name: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a layer, and remember that it ran."""
        current = self._thread.current
        if current is None:
            y = self._run_neutral(name, module, original, args, kwargs)
            self._thread.produced.set(name, module, y)
            return y
        if current.tracker is None:
            y = original(module, *args, **kwargs)
        else:
            y = current.tracker.run_layer(module, original, args, kwargs)
        current.produced.set(name, module, y)
        return y

    def _run_neutral(
        self, name: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module that calls no activations. If it is called from outside, parts of the model may be called one by one."""
        if self._thread.current is not None:
            return original(module, *args, **kwargs)
        keep_listening(self)
        if name in self._entries or in_backward() or is_traced():
            return original(module, *args, **kwargs)
        tracker = self._tracker()
        with tracker.following():
            y = original(module, *args, **kwargs)
        tracker.keep(y)
        self._entries.add(name)
        return y

    def _run_container(
        self, name: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module that may call activations. A call from outside begins a pass."""
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            original = without_fast_path(original)
        current = self._thread.current
        if current is not None:
            return self._run_inside(current, name, module, original, args, kwargs)
        if in_backward() or is_traced():
            return original(module, *args, **kwargs)
        with self._new_pass(name, Produced()) as current:
            y = self._run_inside(current, name, module, original, args, kwargs)
            if current.tracker is not None:
                current.tracker.keep(y)
        self._thread.produced.set(name, module, y)
        return y

    def _run_activation(
        self, name: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an activation module, and report it to the observer unless another activation calls it."""
        current = self._thread.current
        if (current is not None and current.inside_activation) or in_backward():
            return original(module, *args, **kwargs)
        caller = interception.calling_frame()
        if current is not None:
            return self._reporter.run_module(current, name, caller, module, original, args, kwargs)
        if is_traced():
            return original(module, *args, **kwargs)
        with self._new_pass(name, self._thread.produced) as current:
            return self._reporter.run_module(current, name, caller, module, original, args, kwargs)

    def takes(self, x: object) -> bool:
        """Return whether an activation of `x` that this thread calls now belongs to the model.

        It does in a pass. Outside of passes it does if a method of one of the model's modules is running, or if one of them has
        just returned `x`.
        """
        thread = self._thread
        if thread.current is not None:
            return True
        frame: FrameType | None = None if in_backward() or is_traced() else calling_frame()
        while frame is not None:
            path = self.modules.path_in(frame)
            if path is not None:
                thread.owner = path
                return True
            frame = frame.f_back
        thread.owner = (thread.produced.path or "").rpartition(".")[0]
        return thread.produced.returned(x) and not is_traced()

    def run_function(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator or a function that the model calls. If it is an activation, report it to the observer.

        Args:
            function: an overload of an ATen operator, or a function of PyTorch.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            The output of the function.
        """
        current, activation = self._thread.current, called_name(function)
        x = args[0] if args else kwargs.get("input")
        if activation is None or (current is not None and current.inside_activation) or not is_countable(x) or in_backward():
            return function(*args, **kwargs)
        frame, run = calling_frame(), partial(function, *args, **kwargs)
        if current is not None:
            return self._reporter.run_function(current, frame, function, activation, x, run)
        owner = self._thread.owner
        with self._new_pass(owner, self._thread.produced) as current:
            current.owners.append(owner)
            return self._reporter.run_function(current, frame, function, activation, x, run)

    @contextlib.contextmanager
    def _new_pass(self, entry: str, produced: Produced) -> Iterator[Pass[P]]:
        """Run a call from outside as a pass, inside the block.

        Args:
            entry: the path of the module that is called. In its first complete pass, every operator is followed.
            produced: what ran before the call.
        """
        thread = self._thread
        tracker = None if entry in self._entries else self._tracker()
        current = Pass(entry, self._observer.begin_pass(), tracker, produced)
        attachment, completed, caller = self._attachment, False, set_caller(self._graphs)
        try:
            thread.current = current
            with contextlib.ExitStack() as modes:
                modes.enter_context(listening(self))
                if has_registered_functions():
                    modes.enter_context(FunctionCalls(self))
                if tracker is not None:
                    modes.enter_context(tracker.following())
                yield current
            completed = attachment is self._attachment  # else the watcher was detached meanwhile, and has seen a part only
        finally:
            set_caller(caller)
            self._graphs.end_pass(current, completed)
            thread.current = None
            if completed:
                self._entries.add(entry)
            if tracker is not None:
                self.registry.add_meshes(tracker.meshes)
            self._observer.end_pass(current.observed, completed)
        self.registry.warn_of_inferred()

    def _tracker(self) -> AxisTracker:
        """Return the tracker of this thread. The parts of a model that are called one after another share it."""
        if self._thread.tracker is None:
            self._thread.tracker = AxisTracker(self._model.parameters())
        return self._thread.tracker

    def _run_inside(
        self,
        current: Pass[P],
        name: str,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the forward of a container in a pass. The other arguments are those of a handler.

        Meanwhile calls of functions are named after the container, and the padding mask that it was given applies.
        """
        is_token, given_mask = current.is_token, current.given_mask
        followed = None if current.tracker is None else current.tracker.followed
        argument = self.modules.mask_arguments.get(name)
        if argument is not None or (callable(self._mask) and not current.owners):
            self._apply_mask(current, name, argument, args, kwargs)
        current.owners.append(name)
        try:
            y = original(module, *args, **kwargs)
        finally:
            current.owners.pop()
            current.is_token, current.given_mask = is_token, given_mask
            if current.tracker is not None:
                current.tracker.followed = followed
        current.produced.set(name, module, y)
        return y

    def _apply_mask(
        self, current: Pass[P], name: str, argument: MaskArgument | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Let the padding mask of a call apply, which is given as an argument or by the user's function.

        If the call gives none, the mask of the call around it applies. Where operators are followed, its tokens are too.
        """
        given, mask = True, None
        if argument is not None:
            given, mask = argument.given(args, kwargs)
        elif callable(self._mask):
            mask = local_tensor(self._mask(args, kwargs))
        if given and mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            if not current.owners:
                self._warn_of_mask(mask)
            return
        if given:
            is_token = token_mask(local_tensor(mask), args, kwargs)
            if mask is not current.given_mask or not same_shape(is_token, current.is_token):
                self._graphs.has_own_mask.add(name)
            current.is_token, current.given_mask = is_token, mask
            if current.is_token is None and isinstance(mask, Tensor) and tells_of_padding(mask):
                self._warn_of_mask(mask)
        if current.tracker is None or (mask is None and current.owners and current.tracker.followed is not None):
            return  # a part of a model that is given no mask has the tokens of the call around it
        if (tokens := find_tokens(mask, args, kwargs)) is not None:
            current.tracker.follow_tokens(tokens)

    def _warn_of_mask(self, mask: Any) -> None:
        """Warn, once, that an argument with the name of the padding mask holds something else, which is ignored."""
        if not self._warned_of_mask:
            self._warned_of_mask = True
            given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            warnings.warn(
                f"{self._mask} of {given} does not tell which tokens are padding, so all are counted; pass one of shape "
                "[batch, tokens], or collect with a function as mask=",
                stacklevel=2,
            )
