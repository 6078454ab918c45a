"""Read the variables of functions that are running."""

import inspect
import sys
from types import FrameType
from typing import Any

#: The references to the dict of a frame in `local_variable`: of the frame, the variable, and the argument of getrefcount.
_OWN_REFERENCES = 3


def local_variable(frame: FrameType, name: str) -> Any:
    """Return the value of a local variable of a running function, or None if it has none of that name.

    Before Python 3.13, a frame keeps the dict of all its variables that it was asked for, and so the tensors in it, even if the
    function assigns other values later. The dict is emptied here, unless somebody else has it too, or the frame is traced: then
    Python writes the dict back.
    """
    variables = frame.f_locals
    value = variables.get(name)
    is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if sys.version_info < (3, 13) and is_function and frame.f_trace is None and sys.getrefcount(variables) <= _OWN_REFERENCES:
        variables.clear()
    return value
