"""checkpoint → engine: check, plan, then compile each rank for the target."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge import __version__
from llmforge.artifact import GB, Manifest, Progress, Warn, no_progress, no_warning
from llmforge.artifact_writer import ArtifactWriter
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.params import parameters
from llmforge.checkpoint.store import Checkpoint
from llmforge.engine.apart import RankJob, compile_apart
from llmforge.engine.graphs import rank_graphs
from llmforge.engine.memory import MemoryPlan, largest_step, nbytes
from llmforge.engine.step import Limits
from llmforge.engine.store import FORMAT_VERSION, KIND, MANIFEST, rank_directory
from llmforge.engine.target import Checksums, Target
from llmforge.engine.target import target as find_target
from llmforge.engine.weights import Array, RankWeights
from llmforge.errors import BuildError, MemoryLimitError, SettingsError
from llmforge.model.definition import Definition, OwnPass, load_pass
from llmforge.model.graph import Graph, Parameter
from llmforge.parallel import Topology
from llmforge.settings import BuildSettings
from llmforge.settings_reading import check_target_options

DEFAULT_TARGET = "cpu"
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DEFAULT_BLOCK_SIZE = 32
# A slot of a linear cache holds a multiple of this many tokens, so that each starts at an address
# as aligned as accelerators want it.
SLOT_GRANULE = 16


def build(
    checkpoint_directory: Path,
    output: Path,
    settings: BuildSettings,
    *,
    definition: Definition | None = None,
    progress: Progress = no_progress,
    warn: Warn = no_warning,
    on_plan: Callable[[Sequence[MemoryPlan]], None] = lambda plans: None,
) -> Manifest:
    """Compile the checkpoint into `output` and return the engine's manifest. `definition`: the
    model's, where it is not built in.

    Everything that cannot work is refused before the first byte is written: BuildError (layout
    or limits), MemoryLimitError, TargetError, StoreError (checkpoint), OutputError,
    DefinitionError.
    """
    work = _planned(checkpoint_directory, settings, definition, warn)
    on_plan(work.plans)
    _check_memory(work.plans, settings.memory_limit_gb)
    with ArtifactWriter(output, MANIFEST, overwrite=settings.overwrite) as writer:
        writer.require_space(sum(work.on_disk))
        for rank in range(work.topology.world_size):
            rank_directory(writer.directory, rank).mkdir()
        for rank, checksums in enumerate(_compiled(work, writer.directory, progress)):
            for file, (size, checksum) in checksums.items():
                writer.record(
                    f"{rank_directory(writer.directory, rank).name}/{file}", size, checksum
                )
        tokenizer = work.checkpoint.directory / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, writer.directory / "tokenizer")
        return writer.commit(_manifest(work))


@dataclass(frozen=True)
class _Work:
    """What is to be built: the whole of it, and for each rank its prepared graph, the memory that
    it will need and the size of its weights. settings: with the target's name."""

    checkpoint: Checkpoint
    settings: BuildSettings
    target: Target
    topology: Topology
    limits: Limits
    definition: Definition | None
    passes: Sequence[OwnPass]
    graphs: Sequence[Graph]
    plans: Sequence[MemoryPlan]
    on_disk: Sequence[int]


def _planned(
    checkpoint_directory: Path,
    settings: BuildSettings,
    definition: Definition | None,
    warn: Warn,
) -> _Work:
    name = settings.target or DEFAULT_TARGET
    found = find_target(name)
    check_target_options(settings, name)
    target = found.configured(settings)
    checkpoint = Checkpoint.open(checkpoint_directory)
    config = checkpoint.config
    topology = Topology(
        settings.tensor_parallel, settings.pipeline_parallel, settings.expert_parallel
    )
    check_topology(config, topology)
    limits = resolve_limits(config, settings, warn, linear_cache=target.linear_cache)
    passes = [load_pass(named) for named in settings.passes]
    traced = rank_graphs(config, topology, definition, passes, warn)
    graphs = [target.prepare(graph) for graph in traced]
    sizes = largest_step(limits)
    return _Work(
        checkpoint,
        dataclasses.replace(settings, target=name),
        target,
        topology,
        limits,
        definition,
        passes,
        graphs,
        plans=[target.memory(graph, limits) for graph in graphs],
        on_disk=[sum(nbytes(p, sizes) for p in graph.parameters) for graph in graphs],
    )


def _compiled(work: _Work, engine: Path, progress: Progress) -> list[Checksums]:
    """What each rank's `compile` returned, once all have filled their directories."""
    target = work.target
    directories = [rank_directory(engine, rank) for rank in range(work.topology.world_size)]
    if target.compiles_apart:
        jobs = [
            RankJob(
                work.checkpoint.directory.resolve(),
                work.topology,
                rank,
                graph,
                work.settings,
                work.limits,
                directories[rank].resolve(),
                work.on_disk[rank],
                target.compile_peak(work.plans[rank]),
            )
            for rank, graph in enumerate(work.graphs)
        ]
        return compile_apart(jobs, progress)
    compiled = []
    total = sum(work.on_disk)
    for rank, (graph, directory) in enumerate(zip(work.graphs, directories, strict=True)):
        source = RankWeights(work.checkpoint, work.topology, rank)
        weights = _Reported(source, progress, rank, sum(work.on_disk[:rank]), total)
        compiled.append(target.compile(graph, weights, work.limits, directory))
    return compiled


def _manifest(work: _Work) -> dict[str, Any]:
    created_from: dict[str, Any] = {"checkpoint": work.checkpoint.digest}
    if work.definition is not None:
        created_from["definition"] = work.definition.origin
    if work.passes:
        created_from["passes"] = {own.name: own.digest for own in work.passes}
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "llmforge": __version__,
        "created_from": created_from,
        "target": work.target.name,
        "target_details": work.target.details(),
        "topology": dataclasses.asdict(work.topology),
        "limits": dataclasses.asdict(work.limits),
        "memory": [dataclasses.asdict(plan) for plan in work.plans],
        "config": work.checkpoint.config.to_dict(),
    }


class _Reported:
    """Weights that report how much of them has been read, or how far the target says it is."""

    def __init__(
        self, weights: RankWeights, progress: Progress, rank: int, start: int, total: int
    ) -> None:
        self._weights, self._progress = weights, progress
        self._label, self._total = f"building rank {rank}", total
        self._done = start

    def read(self, parameter: Parameter) -> Array:
        return self._advance(self._weights.read(parameter))

    def map(self, parameter: Parameter) -> Array:
        return self._advance(self._weights.map(parameter))

    def release(self) -> None:
        self._weights.release()

    def report(self, fraction: float) -> None:
        """Reading is what takes time here."""

    def _advance(self, array: Array) -> Array:
        self._done += array.nbytes
        self._progress(self._label, self._done, self._total)
        return array


def check_topology(config: ModelConfig, topology: Topology) -> None:
    """Raises BuildError where the model does not divide among the ranks."""
    stages, layers = topology.pipeline_parallel, config.num_layers
    if stages > layers:
        raise BuildError(
            f"pipeline_parallel {stages} is more than the model's {layers} layers; "
            f"use at most {layers}"
        )
    ranks, groups = topology.tensor_parallel, topology.expert_parallel
    shards = {spec.shard for spec in parameters(config).values()}

    def divides(ranks: int, groups: int) -> bool:
        # A query head on several ranks would be summed several times.
        whole = ranks <= config.num_heads and ranks % groups == 0
        return whole and all(shard.divides(ranks, groups) for shard in shards)

    _check_expert_parallel(config, topology)
    if not divides(ranks, groups):
        allowed = [str(n) for n in range(1, config.num_heads + 1) if divides(n, groups)]
        sizes = f"intermediate size {config.intermediate_size}"
        if moe := config.moe:
            sizes += f", {moe.num_experts} experts of size {moe.expert_size}"
        among = f" with expert_parallel {groups}" if groups > 1 else ""
        raise BuildError(
            f"tensor_parallel {ranks}{among} does not divide this model "
            f"({config.num_heads} attention heads, {config.num_kv_heads} kv heads, {sizes}); "
            f"allowed: {', '.join(allowed) or 'none'}"
        )


def _check_expert_parallel(config: ModelConfig, topology: Topology) -> None:
    ranks, groups = topology.tensor_parallel, topology.expert_parallel
    if groups == 1:
        return
    if config.moe is None:
        raise BuildError(
            f"expert_parallel {groups} is for mixtures of experts, and this model has no experts; "
            "leave it out"
        )
    experts = config.moe.num_experts
    if ranks % groups or experts % groups:
        allowed = [str(n) for n in range(1, ranks + 1) if ranks % n == 0 == experts % n]
        raise BuildError(
            f"expert_parallel {groups} must divide tensor_parallel ({ranks}) and the model's "
            f"{experts} experts; allowed: {', '.join(allowed)}"
        )


def resolve_limits(
    config: ModelConfig, settings: BuildSettings, warn: Warn, *, linear_cache: bool = False
) -> Limits:
    """The engine's limits, with what was left open decided. Raises SettingsError.
    linear_cache: as of the target."""
    max_seq_len = settings.max_seq_len or min(config.max_position, 4096)
    if max_seq_len > config.max_position:
        warn(
            f"max_seq_len {max_seq_len} is beyond the {config.max_position} positions that the "
            "model was made for: its output may degrade there"
        )
    if config.learned_positions and max_seq_len > config.learned_positions:
        raise SettingsError(
            f"max_seq_len {max_seq_len} is beyond the {config.learned_positions} positions that "
            "this model has embeddings for; give at most that"
        )
    batch = settings.max_batch_size
    max_num_tokens = settings.max_num_tokens or max(min(max_seq_len, 2048), batch)
    if max_num_tokens < batch:
        raise SettingsError(
            f"max_num_tokens {max_num_tokens} is less than max_batch_size {batch}, so a step could "
            "not hold one token of each sequence; raise it or lower max_batch_size"
        )
    if linear_cache:
        capacity = -(-max_seq_len // SLOT_GRANULE) * SLOT_GRANULE
        return Limits(batch, max_seq_len, max_num_tokens, capacity, num_blocks=batch)
    block_size = settings.block_size or DEFAULT_BLOCK_SIZE
    num_blocks = _num_blocks(settings, block_size, batch, max_seq_len)
    return Limits(batch, max_seq_len, max_num_tokens, block_size, num_blocks)


def _num_blocks(settings: BuildSettings, block_size: int, batch: int, max_seq_len: int) -> int:
    if block_size not in BLOCK_SIZES:
        raise SettingsError(
            f"block_size {block_size} is not allowed; allowed: {', '.join(map(str, BLOCK_SIZES))}"
        )
    blocks_per_seq = -(-max_seq_len // block_size)
    if settings.kv_cache_tokens is None:
        return batch * blocks_per_seq
    num_blocks = -(-settings.kv_cache_tokens // block_size)
    if num_blocks < blocks_per_seq:
        raise SettingsError(
            f"kv_cache_tokens {settings.kv_cache_tokens} cannot hold one sequence of "
            f"max_seq_len {max_seq_len}; give at least {blocks_per_seq * block_size}"
        )
    return num_blocks


def _check_memory(plans: Sequence[MemoryPlan], limit_gb: float | None) -> None:
    rank, plan = max(enumerate(plans), key=lambda item: item[1].total)
    if limit_gb is not None and plan.total > limit_gb * GB:
        raise MemoryLimitError(
            f"rank {rank} needs {plan.total / GB:.2f} GB (weights {plan.weights / GB:.2f}, KV "
            f"cache {plan.kv_cache / GB:.2f}, activations {plan.activations / GB:.2f}), more than "
            f"the limit of {limit_gb:g} GB; use more ranks, or lower max_batch_size, max_seq_len, "
            "max_num_tokens or kv_cache_tokens"
        )
