"""The weights of NeMo's GPT-type models, from each form in which they are saved, under Megatron
Core's names and as one model.

Layouts, in https://github.com/NVIDIA/NeMo and https://github.com/NVIDIA/Megatron-LM: directories
of ranks from inject_model_parallel_rank (nemo/utils/model_utils.py); names of NeMo's own and of
Megatron Core's modules from scripts/checkpoint_converters/convert_llama_hf_to_nemo.py, which also
has the order in qkv (for each kv head: the q heads that read it, its k, its v) and in fc1 (gate,
then up); distributed forms from megatron/core/dist_checkpointing, which stacks layers along the
first dimension, and of fc1 (apply_swiglu_sharded_factory, transformer/mlp.py) has all of gate,
then up.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence

from llmforge.artifact import listed
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import Rules, both, plus_one, rename
from llmforge.checkpoint.mapping import Ignore, Rule
from llmforge.checkpoint.sources.blocks import (
    Chunk,
    Pieced,
    by_group,
    cut,
    from_chunks,
    layers_from_chunks,
    whole,
)
from llmforge.checkpoint.sources.files import Tree
from llmforge.checkpoint.sources.nemo_config import NemoConfig
from llmforge.checkpoint.sources.pieced import expect_rows, join_ranks, on_all_ranks
from llmforge.checkpoint.sources.torch_dist import METADATA, torch_dist_chunks
from llmforge.checkpoint.sources.torch_file import TorchFile
from llmforge.checkpoint.sources.zarr import ARRAY, zarr_chunks
from llmforge.errors import SourceError, UnsupportedModelError

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
_CHECKPOINT = "model_weights.ckpt"
_RANK = re.compile(r"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/model_weights\.ckpt")
_PREFIXES = ("model.", "module.", "language_model.")
# Names of NeMo's own modules, and of those of Megatron Core without Transformer Engine, → those of
# Megatron Core with it.
_SPELLINGS = (
    ("encoder.layers.", "decoder.layers."),
    ("encoder.final_layernorm.", "decoder.final_layernorm."),
    (".self_attention.query_key_value.", ".self_attention.linear_qkv."),
    (".self_attention.dense.", ".self_attention.linear_proj."),
    (".mlp.dense_h_to_4h.", ".mlp.linear_fc1."),
    (".mlp.dense_4h_to_h.", ".mlp.linear_fc2."),
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".post_attention_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.*)")
_QKV = re.compile(r".*\.self_attention\.linear_qkv\.(weight|bias)")
_FC1 = re.compile(r".*\.mlp\.linear_fc1\.(weight|bias)")
# One of two products where gate and up are apart.
_SECOND = re.compile(r"(.*\.mlp)\.dense_h_to_4h_2\.(weight|bias)")
_HALF = re.compile(r"(.*\.mlp\.linear_fc1\.(?:weight|bias))_([wv])")
_ROWS = re.compile(rf".*linear_qkv\.(weight|bias)|{EMBEDDING}|{HEAD}")
_COLUMNS = re.compile(r".*(linear_proj|linear_fc2)\.weight")
_NOT_WEIGHTS = re.compile(r".*(_extra_state|\.scale_fwd)(/.*)?|optimizer\..*|rng_state.*")

IGNORED = (
    Ignore(r"rotary_pos_emb\.inv_freq", "rotary frequencies are computed from the config"),
    Ignore(r"word_embeddings\.weight", "the last stage's copy of the embedding"),
)
_LAYERS = "decoder.layers.{i}."


def rules(less_one: bool) -> Rules:
    """What the tensors become."""

    def norm(theirs: str, ours: str) -> Rules:
        weight = (f"{theirs}weight",), (f"{ours}.weight",)
        return (
            Rule(*weight, plus_one) if less_one else Rule(*weight),
            rename(f"{theirs}bias", f"{ours}.bias"),
        )

    return (
        rename(EMBEDDING, "embed.weight"),
        rename("embedding.position_embeddings.weight", "positions.weight"),
        *norm(f"{_LAYERS}self_attention.linear_qkv.layer_norm_", "layers.{i}.attention_norm"),
        *(
            rename(
                f"{_LAYERS}self_attention.linear_qkv.{x}[{part}]",
                f"layers.{{i}}.attention.{part}.{x}",
            )
            for part in "qkv"
            for x in ("weight", "bias")
        ),
        *norm(f"{_LAYERS}self_attention.q_layernorm.", "layers.{i}.attention.q_norm"),
        *norm(f"{_LAYERS}self_attention.k_layernorm.", "layers.{i}.attention.k_norm"),
        *both(f"{_LAYERS}self_attention.linear_proj", "layers.{i}.attention.o"),
        *norm(f"{_LAYERS}mlp.linear_fc1.layer_norm_", "layers.{i}.mlp_norm"),
        *(
            rename(f"{_LAYERS}mlp.linear_fc1.{x}[{part}]", f"layers.{{i}}.mlp.{part}.{x}")
            for part in ("gate", "up")
            for x in ("weight", "bias")
        ),
        *both(f"{_LAYERS}mlp.linear_fc2", "layers.{i}.mlp.down"),
        *norm("decoder.final_layernorm.", "final_norm"),
        rename(HEAD, "head.weight"),
    )


def nemo_weights(tree: Tree, nemo: NemoConfig) -> tuple[str, dict[str, Pieced]]:
    """The form they are saved in, for people, and the whole model's tensors. Raises
    SourceError."""
    for folder in ("weights", "model_weights"):
        inside = tree.below(folder)
        if inside.files:
            form, pieces = _distributed(inside)
            return form, _apart(pieces, nemo, tree.label)
    ranks = _ranks(tree, nemo)
    tp = len(ranks[0])
    files = [[TorchFile(tree.files[path], "_extra_state") for path in stage] for stage in ranks]
    pieces = {}
    layers = 0
    for stage in files:
        tensors = [_named(file) for file in stage]
        layers += _join(tensors, layers, nemo, tree.label, pieces)
    form = "one file" if len(files) == tp == 1 else f"ranks of tp {tp}, pp {len(files)}"
    return form, _apart(pieces, nemo, tree.label)


# -- files of ranks --------------------------------------------------------------------------------


def _ranks(tree: Tree, nemo: NemoConfig) -> list[list[str]]:
    """The files of the weights, by stage and rank."""
    if _CHECKPOINT in tree.files:
        return [[_CHECKPOINT]]
    found = {}
    for path in tree.files:
        if match := _RANK.fullmatch(path):
            found[int(match[3] or 0), int(match[1] or match[2])] = path
    if not found:
        raise SourceError(
            f"{tree.label} has no weights: neither {_CHECKPOINT}, whole or in mp_rank_XX or "
            "tp_rank_XX_pp_rank_YYY, nor a directory model_weights (NeMo 1) or weights (NeMo 2)"
        )
    pp, tp = nemo.pipeline_parallel, nemo.tensor_parallel
    wanted = [(stage, rank) for stage in range(pp) for rank in range(tp)]
    if set(wanted) != set(found):
        missing = [f"tp {rank} pp {stage}" for stage, rank in wanted if (stage, rank) not in found]
        extra = [f"tp {rank} pp {stage}" for stage, rank in found if (stage, rank) not in wanted]
        what = f"these are missing: {listed(missing)}" if missing else f"it has {listed(extra)}"
        raise SourceError(
            f"{tree.label}: its config has tensor_model_parallel_size {tp} and "
            f"pipeline_model_parallel_size {pp}, but of the ranks' files {what}"
        )
    return [[found[stage, rank] for rank in range(tp)] for stage in range(pp)]


def _named(file: TorchFile) -> dict[str, Pieced]:
    return {
        _plain_name(name): whole(info, functools.partial(file.fill, name))
        for name, info in file.tensors.items()
        if _is_weight(name)
    }


def _is_weight(name: str) -> bool:
    return not _NOT_WEIGHTS.fullmatch(name)


def _plain_name(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    for theirs, ours in _SPELLINGS:
        name = name.replace(theirs, ours)
    return name


def _join(
    ranks: Sequence[Mapping[str, Pieced]],
    first_layer: int,
    nemo: NemoConfig,
    where: str,
    pieces: dict[str, Pieced],
) -> int:
    """Add the tensors of a stage's ranks to `pieces`; gives how many layers the stage has."""
    names = {name: None for rank in ranks for name in rank}
    on_all_ranks(ranks, names, where)
    layers = 0
    for name in names:
        full = name
        if match := _LAYER.fullmatch(name):
            full = f"decoder.layers.{first_layer + int(match[1])}.{match[2]}"
            layers = max(layers, int(match[1]) + 1)
        if full in pieces:
            continue  # a tied embedding, which the last stage has too
        parts = [rank[name] for rank in ranks]
        if _FC1.fullmatch(name) and nemo.gated and not _is_half(parts, nemo):
            halves = [cut(part, [part.shape[0] // 2] * 2) for part in parts]
            for label, half in zip(("gate", "up"), zip(*halves, strict=True), strict=True):
                pieces[f"{full}[{label}]"] = join_ranks(name, half, False, where)
        elif match := _SECOND.fullmatch(full):
            up = f"{match[1]}.linear_fc1.{match[2]}[up]"
            pieces[up] = join_ranks(name, parts, False, where)
        elif _ROWS.fullmatch(name) or _FC1.fullmatch(name):
            pieces[full] = join_ranks(name, parts, False, where)
        elif _COLUMNS.fullmatch(name):
            pieces[full] = join_ranks(name, parts, True, where)
        else:
            pieces[full] = parts[0]
    return layers


def _is_half(parts: Sequence[Pieced], nemo: NemoConfig) -> bool:
    """Whether this is the gate alone, up being a product of its own."""
    return sum(part.shape[0] for part in parts) == nemo.config.intermediate_size


# -- distributed forms -----------------------------------------------------------------------------


def _distributed(tree: Tree) -> tuple[str, dict[str, Pieced]]:
    header = tree.files.get("metadata.json")
    backend = None
    if header is not None:
        try:
            backend = json.loads(header.read()).get("sharded_backend")
        except (ValueError, AttributeError) as error:
            raise SourceError(f"{header.label} is not valid JSON") from error
    elif METADATA in tree.files:
        backend = "torch_dist"
    elif any(name.endswith(f"/{ARRAY}") for name in tree.files):
        backend = "zarr"
    if backend == "torch_dist":
        tensors = torch_dist_chunks(tree, _is_weight)
    elif backend == "zarr":
        tensors = zarr_chunks(tree, _is_weight)
    else:
        raise UnsupportedModelError(
            f"{tree.label}: the checkpoint backend {backend!r} is not supported; supported: "
            "torch_dist, zarr"
        )
    pieces: dict[str, Pieced] = {}
    torn = []
    for name, (dtype, shape, chunks) in tensors.items():
        torn += _unstacked(_plain_name(name), dtype, shape, chunks, pieces)
    if torn:
        raise SourceError(
            f"{tree.label}: the chunks of these tensors do not cover them once ({len(torn)}): "
            f"{listed(torn)}"
        )
    return f"{backend} checkpoint", pieces


def _unstacked(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    chunks: Sequence[Chunk],
    pieces: dict[str, Pieced],
) -> list[str]:
    """Add a tensor, or each layer's, to `pieces`; gives the names of those that are not whole."""
    if match := _STACKED.fullmatch(name):
        found = {
            f"decoder.layers.{layer}.{match[1]}": piece
            for layer, piece in enumerate(layers_from_chunks(dtype, shape, chunks))
        }
    else:
        found = {name: from_chunks(dtype, shape, chunks)}
    pieces |= {full: piece for full, piece in found.items() if piece is not None}
    return [full for full, piece in found.items() if piece is None]


# -- the parts of merged products ------------------------------------------------------------------


def _apart(pieces: Mapping[str, Pieced], nemo: NemoConfig, where: str) -> dict[str, Pieced]:
    """q, k and v, and gate and up, by names of their own, in brackets."""
    config = nemo.config
    result: dict[str, Pieced] = {}
    for name, piece in pieces.items():
        if _QKV.fullmatch(name):
            result |= _qkv(name, piece, config, where)
        elif match := _HALF.fullmatch(name):
            result[f"{match[1]}[{'gate' if match[2] == 'w' else 'up'}]"] = piece
        elif _FC1.fullmatch(name) and not nemo.gated:
            result[f"{name}[up]"] = piece
        elif _FC1.fullmatch(name) and _is_half([piece], nemo):
            result[f"{name}[gate]"] = piece
        elif _FC1.fullmatch(name):
            size = config.intermediate_size
            expect_rows(name, piece, 2 * size, where)
            result[f"{name}[gate]"], result[f"{name}[up]"] = cut(piece, [size, size])
        else:
            result[name] = piece
    return result


def _qkv(name: str, piece: Pieced, config: ModelConfig, where: str) -> dict[str, Pieced]:
    groups, head_dim = config.num_kv_heads, config.head_dim
    sizes = [config.num_heads // groups * head_dim, head_dim, head_dim]
    expect_rows(name, piece, groups * sum(sizes), where)
    parts = zip("qkv", by_group(piece, groups, sizes), strict=True)
    return {f"{name}[{label}]": part for label, part in parts}
