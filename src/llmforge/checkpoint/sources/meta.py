"""Meta's own Llama files: params.json, consolidated.NN.pth (one a rank), tokenizer.model.

Layout: https://github.com/meta-llama/llama-models, models/llama3/model.py and args.py (names, which
layer is parallel along what, rotation of neighbouring elements, `use_scaled_rope`), and
https://github.com/meta-llama/llama for the first two versions, whose embedding is cut along the
hidden dimension.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmforge.artifact import Warn, listed, no_warning
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import (
    Family,
    Rules,
    converted,
    halved,
    read_common,
    rename,
)
from llmforge.checkpoint.hf_config import Fields, read_json
from llmforge.checkpoint.mapping import Ignore
from llmforge.checkpoint.sources.blocks import Pieced, whole
from llmforge.checkpoint.sources.files import whole_file
from llmforge.checkpoint.sources.meta_tokenizer import MODEL, unpack_tokenizer
from llmforge.checkpoint.sources.pieced import (
    TIED_HEAD,
    PiecedSource,
    join_ranks,
    on_all_ranks,
    tied,
)
from llmforge.checkpoint.sources.torch_file import TorchFile
from llmforge.errors import SourceError, UnsupportedModelError

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_FIRST_Q = "layers.0.attention.wq.weight"
# How the ranks share a tensor; what is not named here is the same on all of them.
_ROWS = re.compile(r"output\.weight|.*\.(wq|w1|w3)\.weight")
_HEADS = re.compile(r".*\.(wk|wv)\.weight")
_COLUMNS = re.compile(r".*\.(wo|w2)\.weight")

_RULES: Rules = (
    rename(_EMBEDDING, "embed.weight"),
    rename("layers.{i}.attention_norm.weight", "layers.{i}.attention_norm.weight"),
    *converted("layers.{i}.attention.wq", "layers.{i}.attention.q", halved),
    *converted("layers.{i}.attention.wk", "layers.{i}.attention.k", halved),
    rename("layers.{i}.attention.wv.weight", "layers.{i}.attention.v.weight"),
    rename("layers.{i}.attention.wo.weight", "layers.{i}.attention.o.weight"),
    rename("layers.{i}.ffn_norm.weight", "layers.{i}.mlp_norm.weight"),
    rename("layers.{i}.feed_forward.w1.weight", "layers.{i}.mlp.gate.weight"),
    rename("layers.{i}.feed_forward.w3.weight", "layers.{i}.mlp.up.weight"),
    rename("layers.{i}.feed_forward.w2.weight", "layers.{i}.mlp.down.weight"),
    rename("norm.weight", "final_norm.weight"),
    rename(_HEAD, "head.weight"),
)
_IGNORED = (Ignore(r"rope\.freqs", "rotary frequencies are computed from the config"),)
_FAMILY = Family(
    "llama",
    (),
    (),
    lambda family, fields: read_common(family, fields),
    _RULES,
    "",
    _IGNORED,
    {"norm_eps": 1e-5, "eos_token_id": ()},
    {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
    },
)
_REFUSED = {
    "moe": "mixture-of-experts models",
    "moe_args": "mixture-of-experts models",
    "vision_chunk_size": "vision models",
    "vision_args": "vision models",
    "quantization_args": "quantized weights",
    "lora_args": "adapters",
    "sliding_window": "sliding windows",
}


def is_meta(directory: Path) -> bool:
    return (directory / PARAMS).is_file() and bool(_shards(directory))


def meta_source(directory: Path, scratch: Path, warn: Warn = no_warning) -> PiecedSource:
    """Open a directory of Meta's files. The tokenizer's are made in `scratch`, which the caller
    removes. Raises SourceError and UnsupportedModelError."""
    paths = _shards(directory)
    numbers = sorted(paths)
    if numbers != list(range(len(numbers))):
        absent = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        names = [f"consolidated.{number:02d}.pth" for number in absent]
        raise SourceError(f"{directory} lacks {listed(names)}; download the model again")
    where = str(directory)
    data = read_json(directory / PARAMS)
    for name, what in _REFUSED.items():
        if data.get(name):
            raise UnsupportedModelError(
                f"{directory / PARAMS}: {name} is set: {what} are not supported in Meta's layout; "
                "use the model in the Hugging Face layout"
            )
    fields = Fields(directory / PARAMS, data, aliases=_FAMILY.aliases)
    pieces = _join([TorchFile(whole_file(paths[number])) for number in numbers], fields, where)
    config = _config(fields, pieces, where, warn)
    ignored = (
        *_IGNORED,
        *([Ignore(re.escape(_HEAD), TIED_HEAD)] if config.tied_embeddings else []),
    )
    return PiecedSource(
        kind=f"Meta's Llama files, {len(paths)} shard{'s' if len(paths) > 1 else ''}",
        config=config,
        pieces=pieces,
        rules=_RULES,
        ignored=ignored,
        description={
            "source": "meta",
            "name": directory.resolve().name,
            "family": config.family,
            "config_sha256": hashlib.sha256((directory / PARAMS).read_bytes()).hexdigest(),
            "weights": {path.name: path.stat().st_size for path in paths.values()},
        },
        tokenizer_directory=unpack_tokenizer(
            directory / MODEL, scratch / "tokenizer", fields.flag("use_scaled_rope", False), warn
        ),
        where=where,
        warn=warn,
    )


def _shards(directory: Path) -> dict[int, Path]:
    """Rank → file."""
    matches = ((_SHARD.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _join(files: Sequence[TorchFile], fields: Fields, where: str) -> dict[str, Pieced]:
    ranks = [
        {
            name: whole(info, functools.partial(file.fill, name))
            for name, info in file.tensors.items()
        }
        for file in files
    ]
    names = {name: None for of_rank in ranks for name in of_rank}
    on_all_ranks(ranks, names, where)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    if hidden % heads:
        raise fields.bad("num_attention_heads", f"a divisor of dim ({hidden})")
    rows = sum(part[_FIRST_Q].shape[0] for part in ranks if _FIRST_Q in part)
    if rows != hidden:
        raise SourceError(
            f"{where} is not whole: its consolidated files ({len(files)}) hold {rows} of the "
            f"{hidden} rows of {_FIRST_Q}; download the model again"
        )
    kv_heads = fields.integer("num_key_value_heads", heads)
    kv_size = kv_heads * (hidden // heads)
    pieces = {}
    for name in names:
        parts = [of_rank[name] for of_rank in ranks]
        if name == _EMBEDDING:
            pieces[name] = join_ranks(name, parts, parts[0].shape[-1] != hidden, where)
        elif _HEADS.fullmatch(name):
            pieces[name] = join_ranks(name, _distinct(parts, kv_size), False, where)
        elif _ROWS.fullmatch(name) or _COLUMNS.fullmatch(name):
            pieces[name] = join_ranks(name, parts, bool(_COLUMNS.fullmatch(name)), where)
        else:
            pieces[name] = parts[0]
    return pieces


def _distinct(parts: Sequence[Pieced], rows: int) -> Sequence[Pieced]:
    """Without the copies of kv heads that are fewer than the ranks."""
    copies, rest = divmod(sum(part.shape[0] for part in parts), rows)
    return parts[::copies] if copies > 1 and not rest else parts


def _config(fields: Fields, pieces: Mapping[str, Pieced], where: str, warn: Warn) -> ModelConfig:
    """params.json leaves out what the weights' shapes tell, and what the code that came with each
    version fixed."""
    needed = (_EMBEDDING, "layers.0.feed_forward.w1.weight")
    if absent := [name for name in needed if name not in pieces]:
        raise SourceError(f"the weights of {where} lack {listed(absent)}")
    vocabulary = pieces[_EMBEDDING].shape[0]
    if fields.data.get("vocab_size", -1) not in (-1, vocabulary):  # -1: the tokenizer's
        raise fields.bad("vocab_size", f"{vocabulary}, as the weights' shapes are")
    is_tied = tied(pieces, _EMBEDDING, _HEAD)
    positions, rope = _positions(fields, is_tied)
    warn(f"{PARAMS} does not say how long sequences may be: {positions} positions are assumed")
    tokens = _token_ids(vocabulary, scaled="rope_scaling" in rope)
    data = {
        **fields.data,
        **tokens,
        **rope,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "intermediate_size": pieces[needed[1]].shape[0],
        "tie_word_embeddings": is_tied,
    }
    return read_common(_FAMILY, dataclasses.replace(fields, data=data))


def _positions(fields: Fields, is_tied: bool) -> tuple[int, dict[str, Any]]:
    """The trained length and the rope's scaling of the version that params.json looks like
    (transformers, models/llama/convert_llama_weights_to_hf.py, has the same table by version).
    Of those with scaled rope the small ones, whose head is tied, stretch it further."""
    if fields.flag("use_scaled_rope", False):
        factor = fields.number("rope_scaling_factor", 32.0 if is_tied else 8.0)
        high = fields.number("rope_high_freq_factor", 4.0)
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }
        return 131072, {"rope_scaling": scaling}
    theta = fields.number("rope_theta", 10000.0)
    if theta == 500000.0:
        return 8192, {}
    if theta == 1e6:  # Code Llama
        return 16384, {}
    return (2048 if fields.number("norm_eps", 1e-5) < 5e-6 else 4096), {}


def _token_ids(vocabulary: int, scaled: bool) -> dict[str, Any]:
    """Begin and end of text: fixed by Meta's tokenizers. From version 3 on the end of a turn, and
    of a message to a tool, end a text as well."""
    if vocabulary == 128256:
        ends = [128001, 128008, 128009] if scaled else [128001, 128009]
        return {"bos_token_id": 128000, "eos_token_id": ends}
    return {"bos_token_id": 1, "eos_token_id": [2]}
