"""Follow, from operator to operator, the channel axis of each tensor, its token positions and the part that this rank holds."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastentropy._compat import TorchDispatchMode, entered, is_only_mode, step_aside, step_back, tree_leaves
from fastentropy.sites.axes import NO_AXIS, Factor, Note, channel_axis_of, token_axes_of, unlabelled
from fastentropy.sites.known_calls import LayerCall, LayerOutput, layer_call, layer_input
from fastentropy.sites.operator_kinds import Call, describe
from fastentropy.sites.output_notes import Input, output_note, output_sharding, sets_of, token_sets_of
from fastentropy.sites.padding import BY_SHAPE, TokenAxes
from fastentropy.sites.sharding import Sharding, is_dtensor, shown_local_tensors
from fastentropy.sites.tensor_notes import TensorNotes, has_notes, note_in, place_of, storage_number, tensors_in

__all__ = ["NO_AXIS", "AxisTracker"]


class Evidence(NamedTuple):
    """What is known of a tensor."""

    channel_axis: int | None  # see `AxisTracker.axis_of`
    sharding: Sharding | None  # see `AxisTracker.sharding_of`
    token_axes: TokenAxes | None  # see `AxisTracker.token_axes`


# TorchDispatchMode and its constructor have no annotations.
class AxisTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow, while active, what the axes of every tensor hold.

    The channel axis is the axis with the channels of the operator that made the tensor:

    - After a convolution, a batch norm or a group norm the channel axis is axis 1.
    - After a product of a weight and another matrix it is the axis that comes from the weight. Any other matrix product keeps
      the channel axes of its factors that it does not sum over. If it sums over the channels of one factor, and nothing is
      known of the other one, it is the other one's axis.
    - A layer norm keeps a known channel axis; otherwise the last axis becomes the channel axis. The same holds for an operator
      with a weight of the size of the last axis.
    - Reshapes, permutations and reductions move the channel axis.
    - Any other operator keeps it if the output has as many axes as the input.

    The positions of a batch of token sequences are followed in the same way.

    A DTensor knows how it is divided among the ranks of torch.distributed. If a plain tensor was taken out of a DTensor, the
    tracker follows how it is divided, in the same way as the channel axis.

    Whatever the tracker does not know runs as it would without it, and nothing is known of its outputs.

    Attributes:
        meshes: the device meshes of the DTensors that took part in the pass. DTensors that only operators on weights read are
            left out.
        followed: the number of the set of token sequences that `token_axes` is about; None if there is none.
    """

    # Higher-order operators, such as flex attention, arrive in `__torch_dispatch__` too. Without this they would raise.
    supports_higher_order_operators = True

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        """Begin with `weights`, the parameters of the model. Nothing is known of other tensors yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.meshes: set[Any] = set()
        self._notes = TensorNotes()
        self._token_sizes: list[tuple[int, int]] = []  # of each set of token sequences: the batch and the number of tokens
        self.followed: int | None = None
        self._vanished: frozenset[int] = frozenset()  # sets whose values went into tensors that cannot be followed
        self._has_failed = False
        self._layers: dict[nn.Module, LayerOutput] = {}  # the latest call of each layer whose operators were followed
        for weight in weights:
            self._notes.mark_weight(weight)

    def axis_of(self, x: Tensor) -> int | None:
        """Return the channel axis of `x`: NO_AXIS if it was squeezed away, None if nothing tells where it lies."""
        note = self._note_of(x)
        return None if note is None else channel_axis_of(note.axes)

    def sharding_of(self, x: Tensor) -> Sharding | None:
        """Return how the plain tensor `x`, which comes from a DTensor, is divided among ranks; None if it comes from none."""
        return self._notes.sharding(x) if has_notes(x) else None

    def follow_tokens(self, tokens: Tensor) -> None:
        """Begin to follow the positions of `tokens`: ids [batch, tokens] or embeddings [batch, tokens, features].

        From now on `token_axes` is about these positions. Tokens that are followed already, or whose axes are those of tokens
        that are followed, are not followed anew.
        """
        self.followed = None
        if tokens.ndim < 2 or not has_notes(tokens):
            return
        note = self._note_of(tokens) or Note(unlabelled(tokens.shape))
        sizes = tokens.shape[0], tokens.shape[1]
        sets = sorted(token_sets_of(note.axes))
        known = (number for number in sets if self._axes_of_set(note, number) == (0, 1))
        self.followed = next(known, None)
        if self.followed is None:
            self._token_sizes.append(sizes)
            self.followed = number = len(self._token_sizes)
            new = (Factor(2 * number, sizes[0]),), (Factor(2 * number + 1, sizes[1]),)
            self._notes.set_note(tokens, Note((*new, *note.axes[2:]), note.lost | frozenset(sets)))

    def token_axes(self, x: Tensor) -> TokenAxes | None:
        """Return where the positions of the followed tokens lie in `x`.

        Returns:
            The axes. None if the values of `x` do not belong to token positions. BY_SHAPE if they come from tokens in a way
                that could not be followed, or if no tokens are followed.
        """
        return self._token_axes(self._note_of(x), has_notes(x))

    def evidence(self, x: Tensor) -> Evidence:
        """Return all that is known of `x`, in a third of the time that it takes to ask for each."""
        number = storage_number(x)
        storage = None if number is None else self._notes.storages.get(number)
        if storage is None:
            return Evidence(None, None, self._token_axes(None, number is not None))
        note = note_in(storage, x)
        axis = None if note is None else channel_axis_of(note.axes)
        sharding = storage.shardings.get(place_of(x)) if storage.shardings else None
        return Evidence(axis, sharding, self._token_axes(note, True))

    def keep(self, outputs: object) -> None:
        """Forget all notes but those of the tensors in the nested `outputs`, which may be inputs of what is followed next.

        Tensors that were kept before stay known as long as they exist. No tensor is kept alive.
        """
        self._notes.keep([x for x in tree_leaves(outputs) if isinstance(x, Tensor) and has_notes(x)])

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow the operators, and the tensors that are taken out of DTensors, inside the block.

        It can be entered again afterwards. What `keep` has kept is known then.
        """
        with shown_local_tensors(self._take_out), entered(self):
            yield

    def run_layer(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a layer. If its output is known to hold the same as in an earlier call, its operators are not followed.

        Args:
            module: the layer.
            original: the function that runs it, as original(module, *args, **kwargs).
            args: the positional arguments of the call.
            kwargs: its keyword arguments.
        """
        call = self._layer_call(module, args, kwargs)
        if call is None:
            return original(module, *args, **kwargs)
        known = self._layers.get(module)
        if known is not None and known.call == call:
            y = self._run_aside(original, module, *args)
            self._set_note(y, known.shape, known.note)
            return y
        y = original(module, *args)
        self._learn(module, call, y)
        return y

    def run_elementwise(self, x: Tensor, run: Callable[[], Any]) -> Any:
        """Run a function whose output has each entry at the place that it has in `x`, without following its operators.

        Args:
            x: the tensor that the function reads. The function writes into no other tensor.
            run: the function.
        """
        given = self._look_at(x) if type(x) is Tensor and is_only_mode(self) else None
        if given is None or not _is_ordinary(given):
            return run()
        y = self._run_aside(run)
        if y is not x:
            self._set_note(y, given.shape, given.note)
        return y

    def _layer_call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LayerCall | None:
        """Return what decides what the output of a layer holds; None if that may not decide it."""
        try:
            x = layer_input(module, args, kwargs) if is_only_mode(self) else None
            given = None if x is None else self._look_at(x)
            return layer_call(given.x, given.note) if given is not None and _is_ordinary(given) else None
        except Exception:  # whatever it is, the model must not see it
            self._fail()
            return None

    def _learn(self, module: nn.Module, call: LayerCall, y: Any) -> None:
        """Remember what the output of a layer holds, whose operators were followed."""
        try:
            if type(y) is Tensor and _is_ordinary(made := self._look_at(y)):
                self._layers[module] = LayerOutput(call, made.x.shape, made.note)
        except Exception:  # whatever it is, the model must not see it
            self._fail()

    def _run_aside(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a function without following its operators. The tracker is the only mode that is active."""
        try:
            step_aside()
            return run(*args)
        finally:
            step_back(self)

    def _set_note(self, y: Any, shape: Sequence[int], note: Note | None) -> None:
        """Set the note about an output that has the given shape. If it has another shape, nothing is known of it."""
        try:
            if note is not None and type(y) is Tensor and y.shape == shape:
                self._notes.set_note(y, note)
        except Exception:  # whatever it is, the model must not see it
            self._fail()

    def _note_of(self, x: Tensor) -> Note | None:
        """Return the note about a tensor."""
        return self._notes.note(x) if has_notes(x) else None

    def _token_axes(self, note: Note | None, is_noted: bool) -> TokenAxes | None:
        """Return where the positions of the followed tokens lie in a tensor with a note; see `token_axes`.

        Args:
            note: the note.
            is_noted: whether something can be noted about the tensor.
        """
        if self.followed is None:
            return BY_SHAPE
        if note is None:
            return BY_SHAPE if self._has_failed or not is_noted else None
        axes = self._axes_of_set(note, self.followed)
        if axes is not None:
            return TokenAxes(*axes)
        return BY_SHAPE if self.followed in note.lost or self._has_failed else None

    def _axes_of_set(self, note: Note, number: int) -> tuple[int, int] | None:
        """Return the axes of the batch and the tokens of a set of token sequences."""
        return token_axes_of(note.axes, number, self._token_sizes[number - 1])

    def _take_out(self, x: Any, local: Tensor) -> None:
        """Note how `local` is divided among ranks: it is the plain tensor that was taken out of the DTensor `x`."""
        sharding = Sharding.of(x)
        self._notes.set_sharding(local, sharding)
        if sharding.is_divided or not self._notes.is_weight(x):
            self.meshes.add(sharding.mesh)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note what is known of its outputs. Only the operator itself raises."""
        kwargs = kwargs or {}
        call, inputs = self._read(func, args, kwargs)
        composed = call.operator.composed if call is not None else None
        if composed is not None and not any(given.is_opaque for given in inputs):
            # In inference mode, an operator that PyTorch composes of others arrives here whole. Otherwise only its parts do.
            with entered(self):
                return composed(*args, **kwargs)
        outputs = func(*args, **kwargs)
        try:
            if call is not None:
                self._note_outputs(call, inputs, outputs)
        except Exception:  # whatever it is, the model must not see it
            self._fail()
        return outputs

    def _read(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call | None, list[Input]]:
        """Return an operator with its arguments, and what is known of its tensors; (None, []) if this fails."""
        try:
            call = Call(describe(func), args, kwargs)
            inputs: list[Input] = []
            for value in args:
                if isinstance(value, Tensor):
                    inputs.append(self._look_at(value))
                elif isinstance(value, (list, tuple)):
                    inputs += [self._look_at(x) for x in tensors_in(value)]
            if kwargs:
                read = [value for name, value in kwargs.items() if name not in call.operator.writes_only]
                inputs += [self._look_at(x) for x in tensors_in(read)]
        except Exception:  # whatever it is, the model must not see it
            self._fail()
            return None, []
        return call, inputs

    def _fail(self) -> None:
        """Forget all notes, because those about the outputs of an operator could not be made."""
        self._has_failed = True
        self._notes.clear()
        self._layers.clear()

    def _look_at(self, x: Tensor) -> Input:
        """Return what is known of a tensor that an operator reads."""
        kind = type(x)
        is_weight = kind is not Tensor and (kind is nn.Parameter or isinstance(x, nn.Parameter))
        number = storage_number(x)
        if number is None:
            return Input(x, (), None, is_weight, None, True)
        storage = self._notes.storages.get(number)
        if storage is None:
            return Input(x, x.shape, None, is_weight, None, False)
        sharding = storage.shardings.get(place_of(x)) if storage.shardings and not is_dtensor(x) else None
        return Input(x, x.shape, note_in(storage, x), is_weight or storage.is_weight, sharding, False)

    def _note_outputs(self, call: Call, inputs: list[Input], outputs: Any) -> None:
        """Note what is known of the outputs of an operator, and of the tensors that it has written into."""
        operator = call.operator
        ys = [outputs] if type(outputs) is Tensor else list(tensors_in((outputs,)))
        for name, place in operator.written:
            value = call.args[place] if place < len(call.args) else call.kwargs.get(name)
            ys += [x for x in tensors_in((value,)) if not any(x is y for y in ys)]
        from_weights, is_divided, is_opaque, has_subclass = bool(inputs), False, False, False
        for given in inputs:
            from_weights &= given.is_weight
            is_divided |= given.sharding is not None
            is_opaque |= given.is_opaque
            has_subclass |= type(given.x) is not Tensor
        if has_subclass and not from_weights:  # weights alone tell nothing: FSDP divides them among data-parallel ranks
            self.meshes.update(given.x.device_mesh for given in inputs if is_dtensor(given.x))
        is_written = bool(operator.written) and not operator.changes_view
        for y in ys:
            number = storage_number(y)
            if number is None:
                self._vanished |= frozenset().union(*(sets_of(given.note) for given in inputs))
                continue
            # Of several outputs with different shapes, such as a norm with its statistics, only the first is followed.
            is_main = y is ys[0] or isinstance(outputs, list) or y.shape == ys[0].shape
            note = output_note(call, inputs, y.shape) if is_main else None
            if is_opaque and self._vanished:
                note = note or Note(unlabelled(y.shape))
                note = Note(note.axes, note.lost | self._vanished)
            if note is not None:  # else what is known of this memory, if it is not new, still holds
                self._notes.set_note(y, note, is_written)
            if is_divided:
                self._notes.set_sharding(y, output_sharding(call, inputs, y))
            storage = self._notes.storages.get(number)
            if from_weights or (storage is not None and storage.is_weight):
                self._notes.mark_weight(y, from_weights)


def _is_ordinary(given: Input) -> bool:
    """Return whether a tensor can be followed, is no weight, and is not divided among ranks."""
    return not (given.is_opaque or given.is_weight or given.sharding is not None)
