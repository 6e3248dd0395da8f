"""tensorrt_rtx seen as a published version of `tensorrt`: only the names that its bindings have,
and only calls that they would take (published_api.json, which make_published_api.py wrote).

What a version has and tensorrt_rtx has not (weak typing's flags and precisions) does nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorrt_rtx

_TABLE: Mapping[str, Any] = json.loads((Path(__file__).parent / "published_api.json").read_text())
VERSIONS = ("8.6", "10.0", "10.8", "10.13", "10.14", "10.15", "10.16", "11.1")
# Classes that are inherited from, or made by hand, as they are.
_AS_THEY_ARE = ("ILogger", "IProgressMonitor", "IStreamWriter", "Weights", "Permutation", "Dims")


class NotPublished(AttributeError):
    """The version's bindings have no such name."""


class WrongCall(TypeError):
    """The version's bindings take no such arguments."""


class Api:
    """The names of one version."""

    def __init__(self, version: str) -> None:
        assert version in VERSIONS, version
        self.version = version
        self.used: set[str] = set()

    def forms(self, cls: str, name: str) -> list[str]:
        """How a member may be used: "(a, b=)" of a method, "" of a property or an enumerator.
        Raises NotPublished."""
        for owner in self._line(cls):
            versions = _TABLE[owner]["members"].get(name, {})
            if forms := [f for f, known in versions.items() if not known or self.version in known]:
                self.used.add(f"{owner}.{name}")
                return forms
        raise NotPublished(f"tensorrt {self.version} has no {cls}.{name}")

    def has_class(self, cls: str) -> bool:
        members = _TABLE.get(cls, {"members": {}})["members"]
        return not members or any(
            not known or self.version in known
            for forms in members.values()
            for known in forms.values()
        )

    def _line(self, cls: str) -> list[str]:
        """The class and what it inherits from."""
        if cls not in _TABLE:
            raise NotPublished(f"tensorrt {self.version} has no {cls}")
        return [cls, *_TABLE[cls]["bases"]]

    def check_call(self, what: str, forms: list[str], given: tuple[Any, ...], names: Any) -> None:
        """Raises WrongCall where none of the forms takes these arguments."""
        for form in forms:
            wanted = [part for part in form[1:-1].split(", ") if part]
            plain = [part.rstrip("=") for part in wanted]
            left = plain[len(given) :]
            required = [p for p in wanted[len(given) :] if not p.endswith("=")]
            if (
                len(given) <= len(wanted)
                and set(names) <= set(left)
                and set(required) <= set(names)
            ):
                return
        raise WrongCall(f"{what} takes {' or '.join(forms)}, got {len(given)} and {list(names)}")


class Module:
    """The module `tensorrt` of a version."""

    def __init__(self, version: str) -> None:
        self.api = Api(version)
        self.__version__ = f"{version}.0"

    def __getattr__(self, name: str) -> Any:
        if name in _AS_THEY_ARE and self.api.has_class(name):
            return getattr(tensorrt_rtx, name)
        if name not in _TABLE or not self.api.has_class(name):
            raise NotPublished(f"tensorrt {self.api.version} has no {name}")
        return Class(self.api, name)


class Class:
    """A class or an enumeration: what stands on it."""

    def __init__(self, api: Api, name: str) -> None:
        self._api, self._name = api, name
        self._real = getattr(tensorrt_rtx, name, None)

    def __getattr__(self, name: str) -> Any:
        self._api.forms(self._name, name)
        return getattr(self._real, name, _number(self._name, name))

    def __call__(self, *given: Any, **named: Any) -> Any:
        """An object of the class."""
        made = self._real(*map(bare, given), **{k: bare(v) for k, v in named.items()})
        return Shown(self._api, made, self._name)


_numbers: dict[tuple[str, str], int] = {}
_next = itertools.count(10_000)  # beyond any index or flag


def _number(cls: str, name: str) -> int:
    """A number for an enumerator that tensorrt_rtx does not have."""
    return _numbers.setdefault((cls, name), next(_next))


class Shown:
    """An object of which only what the version has can be reached."""

    def __init__(self, api: Api, real: Any, cls: str | None = None) -> None:
        name = cls or type(real).__name__
        object.__setattr__(self, "_parts", (api, real, name))
        object.__setattr__(self, "_extra", {})

    def __getattr__(self, name: str) -> Any:
        api, real, cls = self._parts
        forms = api.forms(cls, name)
        if not forms[0]:  # a property
            return shown(api, getattr(real, name, self._extra.get(name)))

        def call(*given: Any, **named: Any) -> Any:
            api.check_call(f"{cls}.{name}", forms, given, named)
            if not hasattr(real, name):
                return None
            if any(_is_foreign(value) for value in (*given, *named.values())):
                return None
            result = getattr(real, name)(
                *map(bare, given), **{key: bare(value) for key, value in named.items()}
            )
            return shown(api, result)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        api, real, cls = self._parts
        if api.forms(cls, name) != [""]:
            raise NotPublished(f"{cls}.{name} is a method")
        if getattr(getattr(type(real), name, None), "fset", None) is not None:
            setattr(real, name, bare(value))
        else:
            self._extra[name] = value

    def __eq__(self, other: object) -> bool:
        return bool(bare(self) == bare(other))

    def __hash__(self) -> int:
        return hash(bare(self))


def _is_foreign(value: Any) -> bool:
    return isinstance(value, int) and value in _numbers.values()


def shown(api: Api, value: Any) -> Any:
    """A TensorRT object, or the emulation of one (which says what it is `published_as`), as the
    version shows it; anything else as it is."""
    cls = type(value)
    if name := getattr(cls, "published_as", None):
        return Shown(api, value, name)
    module = cls.__module__ or ""
    if module.startswith("tensorrt_rtx") and not hasattr(cls, "__members__"):
        if cls.__name__ in ("Dims", "Permutation", "Weights"):
            return value
        return Shown(api, value)
    return value


def bare(value: Any) -> Any:
    """The object itself."""
    if isinstance(value, Shown):
        return value._parts[1]
    if isinstance(value, (list, tuple)):
        return type(value)(bare(item) for item in value)
    return value
