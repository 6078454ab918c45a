"""Name the activation calls of a pass, so that a call has the same name in every pass, whatever else the pass leaves out."""

import dis
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

#: The entries of a `CallKey`. A plain tuple is made in a tenth of the time.
Key = tuple[str, bool, object, str | None]


class CallKey(NamedTuple):
    """What tells a call of an activation from other calls with the same path.

    Attributes:
        path: the path of the activation module, or of the function's calls.
        is_function: whether a function is called.
        place: the place in the code that makes the call; any hashable value.
        producer: the path of the module that ran before the call and presumably computed its input; None if it is not known.
    """

    path: str
    is_function: bool
    place: object
    producer: str | None


class Places:
    """Number the places in the code at which calls are made: a pair of integers for each."""

    def __init__(self) -> None:
        """Begin without places."""
        self._numbers: dict[CodeType, int] = {}
        self._codes: list[CodeType] = []
        # The same by identity, because the hash of a code object takes long. The code is kept alive, and so is its identity.
        self._known: dict[int, tuple[int, CodeType, list[int]]] = {}
        self._lock = threading.Lock()

    def of(self, frame: FrameType) -> tuple[int, int]:
        """Return the place in the code at which a stack frame is."""
        code = frame.f_code
        known = self._known.get(id(code))
        if known is None:
            known = self._known[id(code)] = self._number(code), code, _instructions(code)
        return known[0], known[2][frame.f_lasti >> 1]

    def code_at(self, place: object) -> object:
        """Return what a place is for others who number places: the code, held weakly, and the place in it."""
        return (weakref.ref(self._codes[place[0]]), place[1]) if isinstance(place, tuple) else place

    def place_in(self, code_at: object) -> object:
        """Return the place for which `code_at` of others has returned this."""
        return (self._number(code_at[0]()), code_at[1]) if isinstance(code_at, tuple) else code_at

    def _number(self, code: CodeType) -> int:
        """Return the number of a code."""
        with self._lock:
            if code not in self._numbers:
                self._numbers[code] = len(self._codes)
                self._codes.append(code)
            return self._numbers[code]

    def on_line(self, file: str, line: int, known: Sequence[object]) -> Sequence[object]:
        """Return those of some known places that are on a line of a file, in the order in which they run."""
        found = list[tuple[Any, ...]]()
        for place in known:
            if isinstance(place, tuple):
                code = self._codes[place[0]]
                lines = (number for start, end, number in code.co_lines() if start <= place[1] < end)
                if code.co_filename == file and next(lines, None) == line:
                    found.append(place)
        return sorted(found)


def _instructions(code: CodeType) -> list[int]:
    """Return, for every second byte of a code, where its instruction begins.

    A frame that calls a function is at the call or at the end of its inline cache. This depends on whether Dynamo is active.
    """
    begins = [0] * (len(code.co_code) // 2 + 1)
    for instruction in dis.get_instructions(code):
        begins[instruction.offset >> 1] = instruction.offset
    for index in range(1, len(begins)):
        begins[index] = begins[index] or begins[index - 1]
    return begins


@dataclass
class PassNames:
    """The names that a pass has given so far."""

    used: set[str] = field(default_factory=set)
    times: dict[Key, int] = field(default_factory=dict)  # how often the pass has made each call


class CallNames:
    """Give each call of a pass a name: its path, and a number if there are several calls with this path.

    A call keeps its name from pass to pass. It is recognised by its place in the code and by the module that ran before it.
    Calls that agree in both are told apart by their order.

    - A call of a module is the same call at another place in the code if the same module ran before it.
    - If it is not known which module ran before a call, the place decides; for modules that are called from outside, the order.
    """

    def __init__(self) -> None:
        """Begin without names."""
        self._lock = threading.Lock()
        self._names: dict[Key, list[str]] = {}
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_place: dict[tuple[str, object], list[CallKey]] = defaultdict(list)
        self._by_producer: dict[tuple[str, str], list[CallKey]] = defaultdict(list)

    def places_of(self, path: str) -> list[object]:
        """Return the places in the code at which calls of functions with this path are known, each once."""
        return list(dict.fromkeys(key[2] for key in list(self._names) if key[0] == path and key[1]))

    def known_name(self, key: Key, given: PassNames) -> str | None:
        """Return the name of the next call with this key in a pass, as `name` does; None if there is no such call yet."""
        number = given.times.get(key, 0)
        names = self._names.get(key, ())
        if number < len(names) and names[number] not in given.used:
            name: str | None = names[number]
        else:
            with self._lock:
                name = self._known(CallKey(*key), given.used)
        if name is not None:
            given.times[key] = number + 1
            given.used.add(name)
        return name

    def name(self, key: Key, given: PassNames) -> str:
        """Return the name of the next call with this key in a pass.

        Args:
            key: what is known of the call: the entries of a `CallKey`.
            given: the names that the pass has given so far. The name is added to them.
        """
        number = given.times.get(key, 0)
        given.times[key] = number + 1
        names = self._names.get(key, ())
        if number < len(names) and names[number] not in given.used:
            name = names[number]
        else:
            call = CallKey(*key)
            with self._lock:
                name = self._known(call, given.used) or self._new(call.path)
                self._remember(call, number, name)
        given.used.add(name)
        return name

    def _known(self, key: CallKey, used: set[str]) -> str | None:
        """Return the name of the same call under another key, if the pass has not given the name yet; None if there is none."""
        keys: list[CallKey] = []
        if key.producer is None:
            keys += self._by_place[key.path, key.place]
        else:
            if not key.is_function:
                keys += self._by_producer[key.path, key.producer]
            keys.append(CallKey(key.path, key.is_function, key.place, None))
        names = [name for other in keys if other != key for name in self._names.get(other, ())]
        if key.producer is None and not key.is_function:
            names += self._by_path[key.path]
        return next((name for name in names if name not in used), None)

    def _new(self, path: str) -> str:
        """Return a new name for a call with this path."""
        names = self._by_path[path]
        names.append(f"{path}:{len(names)}" if names else path)
        return names[-1]

    def _remember(self, key: CallKey, number: int, name: str) -> None:
        """Remember that the call with this key and this number in its pass has this name, unless it has another one."""
        if key not in self._names:
            self._names[key] = []
            self._by_place[key.path, key.place].append(key)
            if key.producer is not None:
                self._by_producer[key.path, key.producer].append(key)
        names = self._names[key]
        if number == len(names):
            names.append(name)
