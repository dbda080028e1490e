"""Old public names, which go on working for one release with a warning that gives the new one."""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional


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


def renamed_property(old: str, new: str) -> property:
    """A property under its former name, which reads the one of the name ``new``."""

    def get(self: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    return property(get)


class RenamedOption(argparse.Action):
    """A command-line option under its former name, absent from ``--help``.

        threshold = parser.add_argument("--confidence-threshold", type=float, default=0.5)
        parser.add_argument("--score", action=RenamedOption, option=threshold)

    Args:
        option: The option that replaced it, as ``add_argument`` returned it. It must not be a
            required one, which the former name would not satisfy.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, option: argparse.Action
    ) -> None:
        super().__init__(
            option_strings,
            option.dest,
            nargs=option.nargs,
            default=argparse.SUPPRESS,
            type=option.type,
            choices=option.choices,
            help=argparse.SUPPRESS,
        )
        self._option = option

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Optional[str] = None,
    ) -> None:
        """Warn, and store the value as the option that replaced this one does."""
        warn_renamed(str(option_string), self._option.option_strings[-1])
        self._option(parser, namespace, values, option_string)
