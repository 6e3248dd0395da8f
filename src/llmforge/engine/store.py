"""The engine directory: engine.yaml, a directory a rank, and the tokenizer.

engine.yaml            kind, format_version, target, topology, limits, model config, memory,
                       the checkpoint's digest, a checksum for every file
rank0/ ... rankN/      what the target's `compile` wrote
tokenizer/             as in the checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmforge.artifact import Manifest, read_manifest
from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.step import Limits
from llmforge.errors import StoreError
from llmforge.model.graph import Graph
from llmforge.parallel import Topology

MANIFEST = "engine.yaml"
KIND = "engine"
FORMAT_VERSION = 1
# What engine.yaml holds beside what `read_manifest` checks.
_KINDS = {
    **dict.fromkeys(("created_from", "topology", "limits", "config", "target_details"), dict),
    "memory": list,
}
GRAPH_FILE = "graph.json"  # in each rank's directory, whatever the target


def rank_directory(engine: Path, rank: int) -> Path:
    return engine / f"rank{rank}"


def read_graph(directory: Path) -> Graph:
    """The graph in a rank's directory. Raises StoreError."""
    path = directory / GRAPH_FILE
    try:
        return Graph.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is corrupt ({error}); build the engine again with: llmforge build"
        ) from error


@dataclass(frozen=True)
class Engine:
    """An engine directory, opened: its manifest is read, its weights are not."""

    directory: Path
    manifest: Manifest
    target: str
    topology: Topology
    limits: Limits
    config: ModelConfig

    @classmethod
    def open(cls, directory: Path) -> Engine:
        """Raises StoreError where it is missing, corrupt or of a newer format."""
        manifest = read_manifest(directory, MANIFEST, KIND, FORMAT_VERSION)
        data = manifest.data
        try:
            for name, kind in _KINDS.items():
                if not isinstance(data[name], kind):
                    raise StoreError(f"{name} is {data[name]!r}")
            return cls(
                directory,
                manifest,
                str(data["target"]),
                Topology(**data["topology"]),
                Limits(**data["limits"]),
                ModelConfig.from_dict(data["config"]),
            )
        except (KeyError, TypeError, StoreError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise StoreError(
                f"{directory / MANIFEST} is corrupt ({reason}); "
                "build the engine again with: llmforge build"
            ) from error

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def tokenizer_directory(self) -> Path:
        return self.directory / "tokenizer"

    def rank_directory(self, rank: int) -> Path:
        return rank_directory(self.directory, rank)
