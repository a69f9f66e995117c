"""Result lines that remember what was computed of them: a report asks for the same mean in several places."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

from kne_easyedit.benchmark.result_line import ResultLine

Function = TypeVar("Function", bound=Callable[..., Any])


class MethodLines(tuple[ResultLine, ...]):
    """The lines of one method on one data set. They are not changed."""

    @cached_property
    def remembered(self) -> dict[tuple, Any]:
        """(function, its other arguments) -> result."""
        return {}


def of_lines(function: Function) -> Function:
    """A function whose first argument are result lines, computed once for the same `MethodLines` and arguments.

    Its results are shared: the caller does not change them. Other sequences of lines are computed every time.
    """

    @wraps(function)
    def once(lines: Any, *arguments: Any) -> Any:
        if not isinstance(lines, MethodLines):
            return function(lines, *arguments)
        key = (function, *arguments)
        if key not in lines.remembered:
            lines.remembered[key] = function(lines, *arguments)
        return lines.remembered[key]

    return cast(Function, once)
