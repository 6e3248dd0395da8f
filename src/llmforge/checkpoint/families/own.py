"""A family that is not built in, as `convert` sees it; model/definition.py has the rest of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmforge.checkpoint.config import ModelConfig, OwnModel
from llmforge.checkpoint.families.base import Family
from llmforge.checkpoint.params import ParamSpec
from llmforge.errors import DefinitionError


@dataclass(frozen=True, kw_only=True)
class OwnFamily:
    """family: how its config.json and its tensors are read. parameters: every parameter of the
    model with a config, in the order in which they are stored; None: those of the built-in
    decoder. file, digest: where it comes from, filled in as it is loaded."""

    family: Family
    parameters: Callable[[ModelConfig], Iterable[ParamSpec]] | None = None
    file: str = ""
    digest: str = ""

    @property
    def origin(self) -> dict[str, str]:
        """For manifests."""
        return {"file": self.file, "digest": self.digest}

    def recorded(self, config: ModelConfig) -> ModelConfig:
        """The config with what a checkpoint keeps of this definition. Raises DefinitionError."""
        if self.parameters is None:
            return config
        specs = list(self.parameters(config))
        if wrong := [spec for spec in specs if not isinstance(spec, ParamSpec)]:
            raise DefinitionError(f"{self.file}: parameters gives {wrong[0]!r}, not a ParamSpec")
        names = [spec.name for spec in specs]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise DefinitionError(f"{self.file}: parameters lists {', '.join(twice)} twice")
        rows = tuple(spec.to_dict() for spec in specs)
        return dataclasses.replace(config, own=OwnModel(self.file, self.digest, rows))
