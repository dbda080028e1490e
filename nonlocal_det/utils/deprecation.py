"""Old public names, which go on working for one release with a warning that gives the new one."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Callable


def warn_renamed(old: str, new: str) -> None:
    """Warn that ``old`` is now ``new``; a FutureWarning, which Python shows by default."""
    warnings.warn(f"{old} is now {new}; the old name will be removed.", FutureWarning, stacklevel=3)


def renamed_attributes(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that gives its former names.

    Args:
        module: ``__name__`` of the module.
        renamed: New name of each former one; both in this module.
    """

    def __getattr__(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", renamed[name])
        return getattr(sys.modules[module], renamed[name])

    return __getattr__


def renamed_arguments(**renamed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of a function some of whose keyword arguments had other names.

    Args:
        renamed: New name of each former one.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in renamed.keys() & kwargs.keys():
                warn_renamed(f"{function.__qualname__}({old}=)", f"{renamed[old]}=")
                kwargs[renamed[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """A method under its former name, which calls the one of the name ``new``."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    return call


def renamed_value(name: str, value: Any, renamed: Mapping[str, str]) -> Any:
    """The value itself, or the one that replaces it, with a warning.

    Args:
        name: Name of the setting, for the warning.
        value: Value given to the setting.
        renamed: New value of each former one.
    """
    if not isinstance(value, str) or value not in renamed:
        return value
    warn_renamed(f"{name} {value!r}", repr(renamed[value]))
    return renamed[value]
