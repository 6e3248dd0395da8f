"""TensorRT-LLM checkpoints: config.json and rankN.safetensors, one a rank of a layout of tensor-
and pipeline-parallel ranks. The ranks are joined again.

Layout: PretrainedModel.from_checkpoint and Mapping in https://github.com/NVIDIA/TensorRT-LLM
(tensorrt_llm/models/modeling_utils.py, tensorrt_llm/mapping.py): rank = stage * tp_size + tp_rank,
and each stage counts its layers from zero. A rank's qkv is its q, its k, its v, kv heads that are
fewer than the ranks being repeated; biases behind row-parallel products count on the first rank.
Experts: trtllm_experts.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmforge.artifact import Warn, listed, no_warning
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families import FAMILIES
from llmforge.checkpoint.hf_config import Fields, read_json
from llmforge.checkpoint.mapping import Ignore
from llmforge.checkpoint.sources.blocks import Pieced, cut, whole
from llmforge.checkpoint.sources.pieced import (
    TIED_HEAD,
    PiecedSource,
    expect_rows,
    join_ranks,
    on_all_ranks,
    tied,
)
from llmforge.checkpoint.sources.tokens import tokens
from llmforge.checkpoint.sources.trtllm_experts import (
    EXPERTS,
    expert_groups,
    join_experts,
    join_up_and_gate,
    read_moe,
)
from llmforge.checkpoint.sources.trtllm_families import (
    ACTIVATIONS,
    ARCHITECTURES,
    COMMON,
    Architecture,
)
from llmforge.errors import SourceError, UnsupportedModelError
from llmforge.safetensors_io import SafetensorsFile

CONFIG = "config.json"
_EMBEDDING, _HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.*)")
# Names that differ by model or release → those that are read here.
_SPELLINGS = (
    ("transformer.embedding.", "transformer."),
    (".post_attention_layernorm.", ".post_layernorm."),
    (".mlp_layernorm.", ".post_layernorm."),
)
_QKV = re.compile(r".*\.attention\.qkv\.(weight|bias)")
_FC = re.compile(r".*\.mlp\.fc\.(weight|bias)")
_SHARED_FC = re.compile(r".*\.shared_expert\.fc\.weight")
_ROWS = re.compile(r".*\.mlp\.(fc|gate)\.(weight|bias)|lm_head\.(weight|bias)")
_COLUMNS = re.compile(r".*\.(attention\.dense|mlp\.proj|shared_expert\.proj)\.weight")
_PARALLEL_TABLE = re.compile(r"transformer\.(vocab|position)_embedding\.weight")
Joiner = Callable[[str, Sequence[Pieced]], dict[str, Pieced]]
"""Called as joined(name, the parts of a stage's ranks): what they make up, by name."""
_KV_SCALES = Ignore(r".*kv_cache_(rcp_)?scaling_factor", "the scales of a quantized KV cache")
_REFUSED = ("residual_mlp", "is_pruned", "use_logn_attn", "inner_layernorm", "embedding_scale")
_QWEN_TYPES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def is_trtllm(directory: Path) -> bool:
    """Whether this looks like a checkpoint of TensorRT-LLM, whose config names one architecture,
    where Hugging Face's lists them."""
    path = directory / CONFIG
    return path.is_file() and isinstance(read_json(path).get("architecture"), str)


def trtllm_source(directory: Path, warn: Warn = no_warning) -> PiecedSource:
    """Open a directory with a checkpoint. Raises SourceError and UnsupportedModelError."""
    path = directory / CONFIG
    data = read_json(path)
    architecture = _architecture(path, data)
    fields = _fields(path, data, architecture)
    _refuse(fields, architecture, warn)
    where = str(directory)
    mapping = fields.table("mapping") or Fields(path, {}, "mapping")
    tp, pp = mapping.integer("tp_size", 1), mapping.integer("pp_size", 1)
    paths = [directory / f"rank{rank}.safetensors" for rank in range(tp * pp)]
    if missing := [file.name for file in paths if not file.is_file()]:
        raise SourceError(
            f"{where} is not whole: its config asks for {tp} x {pp} ranks (tp_size x pp_size), and "
            f"these are missing ({len(missing)}): {listed(missing)}"
        )
    files = [SafetensorsFile(file, SourceError) for file in paths]
    try:
        joiner = functools.partial(_joined, fields=fields, where=where)
        if architecture.mixture:
            joiner = functools.partial(_joined_mixture, fields=fields, where=where)
        pieces = _join([_tensors(file) for file in files], tp, joiner, where)
        config = _config(architecture, fields, pieces)
        fused = architecture.fused_mlp is not None and not any(".mlp.gate." in n for n in pieces)
        rules = architecture.fused_mlp if fused else architecture.rules
        head = (Ignore(re.escape(_HEAD), TIED_HEAD),) if config.tied_embeddings else ()
        if architecture.warning:
            warn(architecture.warning)
        return _TrtllmSource(
            files,
            kind=f"TensorRT-LLM checkpoint, {data['architecture']}, tp_size {tp}, pp_size {pp}",
            config=config,
            pieces=pieces,
            rules=rules or (),
            ignored=(_KV_SCALES, *head),
            description={
                "source": "tensorrt-llm",
                "name": directory.resolve().name,
                "family": config.family,
                "config_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "weights": {file.name: file.stat().st_size for file in paths},
            },
            tokenizer_directory=directory,
            where=where,
            warn=warn,
        )
    except BaseException:
        for file in files:
            file.close()
        raise


class _TrtllmSource(PiecedSource):
    def __init__(self, files: Sequence[SafetensorsFile], **parts: Any) -> None:
        super().__init__(**parts)
        self._files = files

    def close(self) -> None:
        for file in self._files:
            file.close()


# -- config ----------------------------------------------------------------------------------------


def _architecture(path: Path, data: Mapping[str, Any]) -> Architecture:
    name = data["architecture"]
    wanted = {name, f"{name}:{data.get('gpt_variant')}"}
    if name == "QWenForCausalLM":
        # Before the classes of Hugging Face were named, this one said what it is in a field.
        wanted = {_QWEN_TYPES.get(str(data.get("qwen_type")), name)}
    for architecture in ARCHITECTURES:
        if wanted & set(architecture.names):
            return architecture
    variant = f" (gpt_variant {data['gpt_variant']})" if data.get("gpt_variant") else ""
    supported = ", ".join(names.names[0] for names in ARCHITECTURES)
    raise UnsupportedModelError(
        f"{path}: the architecture {name}{variant} of TensorRT-LLM is not supported; "
        f"supported: {supported}"
    )


def _fields(path: Path, data: Mapping[str, Any], architecture: Architecture) -> Fields:
    """The config with TensorRT-LLM's defaults, and with what the class implies."""
    plain = Fields(path, data)
    heads, hidden = plain.integer("num_attention_heads"), plain.integer("hidden_size")
    defaults: dict[str, Any] = {
        "num_key_value_heads": heads,
        "intermediate_size": 4 * hidden,
        "head_size": hidden // heads,
        "hidden_act": "gelu",
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
    }
    present = {key: value for key, value in data.items() if value is not None}
    values = {**data, **defaults, **present}
    values["hidden_act"] = ACTIVATIONS.get(str(values["hidden_act"]), values["hidden_act"])
    scaling = values.get("rotary_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "llama3":
        values["rotary_scaling"] = {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            **scaling,
        }
    fixed = architecture.fixed(Fields(path, values))
    # A config of TensorRT-LLM leaves these to the tokenizer.
    found = tokens(path.parent)
    values |= {"bos_token_id": found.bos, "eos_token_id": list(found.eos), **fixed}
    aliases = {**COMMON, **architecture.aliases}
    aliases = {ours: theirs for ours, theirs in aliases.items() if ours not in fixed}
    return Fields(path, values, aliases=aliases)


def _refuse(fields: Fields, architecture: Architecture, warn: Warn) -> None:
    """Raises UnsupportedModelError for what cannot be read, by name."""
    quantization = fields.table("quantization") or Fields(fields.path, {}, "quantization")
    algorithm = quantization.data.get("quant_algo")
    if quantization.data.get("use_weight_only"):
        algorithm = f"weight-only {quantization.data.get('weight_only_precision')}"
    if algorithm:
        raise UnsupportedModelError(
            f"{fields.path}: the weights are quantized ({algorithm}), which is not supported; "
            "supported: checkpoints that are not quantized"
        )
    if cache := quantization.data.get("kv_cache_quant_algo"):
        warn(f"the KV cache's quantization ({cache}) is left out; the weights have none")
    positions = fields.text("position_embedding_type", "learned_absolute")
    if positions not in architecture.positions:
        raise UnsupportedModelError(
            f"{fields.path}: position_embedding_type = {positions!r} is not supported for "
            f"{fields.data['architecture']}; supported: {', '.join(architecture.positions)}"
        )
    refused = {name: fields.data.get(name) for name in _REFUSED}
    if not architecture.mixture:
        refused["moe.num_experts"] = read_moe(fields).data.get("num_experts")
    mapping = fields.table("mapping")
    refused["mapping.auto_parallel"] = mapping and mapping.data.get("auto_parallel")
    if not architecture.qk_norm:
        refused["qk_layernorm"] = fields.data.get("qk_layernorm")
    for name, value in refused.items():
        if value:
            raise UnsupportedModelError(
                f"{fields.path}: {name} = {value!r} is not supported; supported: to leave it out"
            )


def _config(
    architecture: Architecture, fields: Fields, pieces: Mapping[str, Pieced]
) -> ModelConfig:
    family = next(row for row in FAMILIES if row.name == architecture.family)
    data = {**fields.data, "tie_word_embeddings": tied(pieces, _EMBEDDING, _HEAD)}
    return family.read_config(family, dataclasses.replace(fields, data=data))


# -- tensors ---------------------------------------------------------------------------------------


def _tensors(file: SafetensorsFile) -> dict[str, Pieced]:
    tensors = {}
    for name, info in file.tensors.items():
        spelled = name
        for theirs, ours in _SPELLINGS:
            spelled = spelled.replace(theirs, ours)
        tensors[spelled] = whole(info, functools.partial(file.fill, name))
    return tensors


def _join(
    ranks: Sequence[Mapping[str, Pieced]], tp: int, joined: Joiner, where: str
) -> dict[str, Pieced]:
    """The whole model's tensors, by names that count its layers from the first to the last."""
    pieces: dict[str, Pieced] = {}
    layers = 0
    for stage in range(0, len(ranks), tp):
        of_stage = ranks[stage : stage + tp]
        names = {name: None for rank in of_stage for name in rank}
        on_all_ranks(of_stage, names, where)
        local = {int(match[1]) for name in names if (match := _LAYER.fullmatch(name))}
        for name in names:
            match = _LAYER.fullmatch(name)
            full = f"transformer.layers.{layers + int(match[1])}.{match[2]}" if match else name
            if full in pieces:
                continue  # a table that more than one stage has
            parts = [rank[name] for rank in of_stage]
            pieces |= joined(full, parts)
        layers += max(local, default=-1) + 1
    return pieces


def _joined_mixture(
    name: str, parts: Sequence[Pieced], fields: Fields, where: str
) -> dict[str, Pieced]:
    """`_joined` of a model whose every layer is a mixture of experts."""
    if EXPERTS.fullmatch(name):
        groups = expert_groups(fields, len(parts))
        return join_experts(name, parts, fields.integer("num_experts"), groups, where)
    if _SHARED_FC.fullmatch(name):
        return join_up_and_gate(name, parts, where)
    return _joined(name, parts, fields, where)


def _joined(name: str, parts: Sequence[Pieced], fields: Fields, where: str) -> dict[str, Pieced]:
    if _QKV.fullmatch(name):
        return _split_qkv(name, parts, fields, where)
    if _FC.fullmatch(name) and _is_fused(parts, fields):
        return join_up_and_gate(name, parts, where)
    if _ROWS.fullmatch(name):
        return {name: _without_padding(name, join_ranks(name, parts, False, where), fields)}
    if _COLUMNS.fullmatch(name):
        return {name: join_ranks(name, parts, True, where)}
    if _PARALLEL_TABLE.fullmatch(name) and fields.flag("use_parallel_embedding", False):
        columns = fields.data.get("embedding_sharding_dim", 0) == 1
        return {name: _without_padding(name, join_ranks(name, parts, columns, where), fields)}
    return {name: parts[0]}


def _is_fused(parts: Sequence[Pieced], fields: Fields) -> bool:
    """Whether the product gives gate and up: its rows are twice the intermediate size."""
    rows = sum(part.shape[0] for part in parts)
    return rows == 2 * fields.integer("intermediate_size")


def _without_padding(name: str, tensor: Pieced, fields: Fields) -> Pieced:
    """A vocabulary is padded where it does not divide by the ranks."""
    vocabulary = fields.integer("vocab_size")
    is_table = name.startswith("lm_head.") or name == _EMBEDDING
    return tensor.rows(0, vocabulary) if is_table and tensor.shape[0] > vocabulary else tensor


def _split_qkv(name: str, parts: Sequence[Pieced], fields: Fields, where: str) -> dict[str, Pieced]:
    tp = len(parts)
    heads, kv_heads = (fields.integer(f"num_{x}_heads") for x in ("attention", "key_value"))
    head_dim = fields.integer("head_dim")
    copies = max(tp // kv_heads, 1)
    if heads % tp or kv_heads * copies % tp:
        raise SourceError(
            f"{fields.path}: {heads} heads and {kv_heads} kv heads cannot be shared by tp_size {tp}"
        )
    q, kv = heads // tp * head_dim, kv_heads * copies // tp * head_dim
    split = []
    for rank, part in enumerate(parts):
        expect_rows(f"{name} (rank {rank} of its stage)", part, q + 2 * kv, where)
        split.append(cut(part, [q, kv, kv]))
    return {
        f"{name}[q]": join_ranks(name, [part[0] for part in split], False, where),
        f"{name}[k]": join_ranks(name, [part[1] for part in split[::copies]], False, where),
        f"{name}[v]": join_ranks(name, [part[2] for part in split[::copies]], False, where),
    }
