"""Model definitions and passes of the user's own: Python files that the user names.

Such a file is executed because it was named on the command line or in the settings file, never
because it lies beside weights. A definition file sets DEFINITION to a `Definition`; a pass is a
function Graph → Graph in any file. Files may import llmforge and what is installed, not their
neighbours, so that a file's digest stands for all of the definition.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.own import OwnFamily
from llmforge.checkpoint.mapping import Rule
from llmforge.errors import DefinitionError, LlmforgeError
from llmforge.model import decoder
from llmforge.model.graph import Graph
from llmforge.model.passes import Pass
from llmforge.parallel import Topology

F = TypeVar("F", bound=Callable[..., Any])
NAME = "DEFINITION"


@dataclass(frozen=True, kw_only=True)
class Definition(OwnFamily):
    """A model of the user's own: besides its family and its parameters, what a rank computes.

    trace: as decoder.trace, whose place it takes. passes: applied to every rank's graph before
    the target's own.
    """

    trace: Callable[[ModelConfig, Topology, int], Graph] = decoder.trace
    passes: tuple[Pass, ...] = ()


def load_definition(path: Path) -> Definition:
    """The DEFINITION of the file. Whatever goes wrong in its functions later is raised as a
    DefinitionError that names the file and the line. Raises DefinitionError."""
    module, digest = _execute(path)
    found = getattr(module, NAME, None)
    if not isinstance(found, Definition):
        raise DefinitionError(
            f"{path} defines no model: it must set {NAME} to an llmforge.model.definition."
            f"Definition, and {NAME} is {'missing' if found is None else repr(found)}"
        )
    guard = functools.partial(_guarded, path)
    family, rules = found.family, found.family.rules
    if callable(rules):
        make_rules = guard(rules)
        guarded: Any = lambda config: _guarded_rules(path, make_rules(config))  # noqa: E731
    else:
        guarded = _guarded_rules(path, rules)
    parameters = found.parameters
    return dataclasses.replace(
        found,
        family=dataclasses.replace(family, read_config=guard(family.read_config), rules=guarded),
        # A generator would raise only as it is read.
        parameters=parameters and guard(lambda config: list(parameters(config))),
        trace=guard(found.trace),
        passes=tuple(guard(rewrite) for rewrite in found.passes),
        file=path.name,
        digest=digest,
    )


@dataclass(frozen=True)
class OwnPass:
    """A pass and where it comes from, for manifests."""

    rewrite: Pass
    name: str
    digest: str


def load_pass(named: str) -> OwnPass:
    """The pass named ``FILE.py:FUNCTION``. Raises DefinitionError."""
    file, _, function = named.rpartition(":")
    if not file or not function:
        raise DefinitionError(f"a pass is named as FILE.py:FUNCTION, not {named!r}")
    path = Path(file)
    module, digest = _execute(path)
    found = getattr(module, function, None)
    if not callable(found):
        raise DefinitionError(f"{path} has no function {function} to use as a pass")
    return OwnPass(_guarded(path, found), f"{path.name}:{function}", digest)


def _guarded_rules(path: Path, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(
        dataclasses.replace(rule, convert=rule.convert and _guarded(path, rule.convert))
        for rule in rules
    )


def _execute(path: Path) -> tuple[ModuleType, str]:
    """The file as a module, and the digest of its text."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DefinitionError(f"cannot read {path}: {error.strerror}") from error
    digest = hashlib.sha256(text).hexdigest()
    # Dataclasses look their module up by name, so it has one that no other file has.
    name = f"llmforge_own_{path.stem}_{digest[:12]}"
    spec = importlib.util.spec_from_loader(name, None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module
    _guarded(path, lambda: exec(compile(text, str(path), "exec"), module.__dict__))()
    return module, f"sha256:{digest}"


def _guarded(path: Path, function: F) -> F:
    """The function, whose exceptions are DefinitionErrors."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except LlmforgeError:
            raise
        except Exception as error:
            raise DefinitionError(_told(path, error)) from error

    return call  # type: ignore[return-value]


def _told(path: Path, error: Exception) -> str:
    """The exception in a line, with the place in the file where it arose."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    # What the ops and the config refuse is told as they say it.
    kind = "" if isinstance(error, ValueError | AssertionError) and what else type(error).__name__
    text = ": ".join(part for part in (kind, what) if part)
    return f"{path}, line {line}: {text}" if line else f"{path}: {text}"
