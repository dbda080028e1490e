"""Former public names: they work for one more release and warn with the new name."""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional, Union


def warn_renamed(old: str, new: str) -> None:
    """Warn that ``old`` is now ``new``.

    The warning is a FutureWarning, which Python shows by default, and points to the caller of the
    function that called this one.
    """
    warnings.warn(f"{old} is now {new}; the old name will be removed.", FutureWarning, stacklevel=3)


def renamed_attributes(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Build a module's ``__getattr__`` that resolves its former names.

    Args:
        module: Name of the module, its ``__name__``.
        renamed: New name of each former one; the module defines the new names.
    """

    def __getattr__(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", renamed[name])
        return getattr(sys.modules[module], renamed[name])

    return __getattr__


def renamed_arguments(**renamed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Build a decorator that accepts the former names of a function's keyword arguments.

    Args:
        renamed: New name of each former one.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__qualname__.replace(".__init__", "")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in renamed.keys() & kwargs.keys():
                new = renamed[old]
                if new in kwargs:
                    raise TypeError(f"{name}() got both {new}= and its old name, {old}=")
                warn_renamed(f"{name}({old}=)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_property(old: str, new: str) -> property:
    """Build the property of the former name ``old``, which reads the property ``new``."""

    def get(self: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    return property(get)


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """Build the method of the former name ``old``, which calls the method ``new``."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    return call


def renamed_value(name: str, value: Any, renamed: Mapping[str, str]) -> Any:
    """Replace the former value of a setting.

    Args:
        name: Name of the setting, for the warning.
        value: Value given to the setting.
        renamed: New value of each former one.

    Returns:
        The value itself, or the one that replaces it.
    """
    if not isinstance(value, str) or value not in renamed:
        return value
    warn_renamed(f"{name} {value!r}", repr(renamed[value]))
    return renamed[value]


class RenamedOption(argparse.Action):
    """The former name of a command-line option: not listed by ``--help``; warns and works.

        check_data = parser.add_argument("--check-data", action="store_true")
        parser.add_argument("--check", action=RenamedOption, renamed=check_data)

    Args:
        option_strings: Former names, given by argparse.
        dest: Ignored; the value is stored where the renamed option stores it.
        renamed: The option under its new name, which is not a required one.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, renamed: argparse.Action
    ) -> None:
        super().__init__(
            option_strings,
            renamed.dest,
            nargs=renamed.nargs,
            type=renamed.type,
            choices=renamed.choices,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            metavar=renamed.metavar,
        )
        self._renamed = renamed

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Union[str, Sequence[Any], None],
        option_string: Optional[str] = None,
    ) -> None:
        """Warn, then do what the renamed option does."""
        warn_renamed(str(option_string), self._renamed.option_strings[-1])
        self._renamed(parser, namespace, values, option_string)
