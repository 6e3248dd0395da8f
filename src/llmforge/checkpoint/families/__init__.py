"""Every model family that llmforge reads, as tables. No other part knows a model's name.

A family is a row of `FAMILIES`: the names by which config.json announces it, how its config is
read into a `ModelConfig`, and which of its tensors become which of our parameters. To add one,
add a row; where it has a feature that `ModelConfig` cannot express, that comes first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import Family
from llmforge.checkpoint.families.deepseek import DEEPSEEK_FAMILIES
from llmforge.checkpoint.families.gemma import GEMMA_FAMILIES
from llmforge.checkpoint.families.gpt import GPT_FAMILIES
from llmforge.checkpoint.families.gpt_oss import GPT_OSS_FAMILIES
from llmforge.checkpoint.families.layer_norm import LAYER_NORM_FAMILIES
from llmforge.checkpoint.families.llama import LLAMA_FAMILIES
from llmforge.checkpoint.families.moe import MOE_FAMILIES
from llmforge.checkpoint.families.own import OwnFamily
from llmforge.checkpoint.families.positions import POSITION_FAMILIES
from llmforge.checkpoint.families.remote import REMOTE_FAMILIES
from llmforge.checkpoint.hf_config import Fields, read_json
from llmforge.checkpoint.mapping import Ignore, Plan, make_plan
from llmforge.checkpoint.quantized import FP8_BLOCK
from llmforge.errors import DefinitionError, SourceError, UnsupportedModelError
from llmforge.safetensors_io import TensorInfo

__all__ = ["FAMILIES", "Family", "plan_for", "read_config", "supported_architectures"]

FAMILIES: tuple[Family, ...] = (
    *LLAMA_FAMILIES,
    *GEMMA_FAMILIES,
    *LAYER_NORM_FAMILIES,
    *GPT_FAMILIES,
    *POSITION_FAMILIES,
    *REMOTE_FAMILIES,
    *MOE_FAMILIES,
    *DEEPSEEK_FAMILIES,
    *GPT_OSS_FAMILIES,
)

_TIED_HEAD = "the output head is tied to the embedding"


def supported_architectures() -> list[str]:
    return [family.architectures[0] for family in FAMILIES]


def read_config(path: Path, own: OwnFamily | None = None) -> tuple[Family, ModelConfig]:
    """The family and the config of a config.json; end-of-sequence tokens of a
    generation_config.json beside it join in. With `own`, the model is of that family. Raises
    SourceError and UnsupportedModelError."""
    fields = Fields(path, read_json(path))
    family = _find_family(fields, FAMILIES if own is None else (own.family,))
    _refuse_quantized(fields, family)
    config = family.read_config(family, dataclasses.replace(fields, aliases=family.aliases))
    generation = path.with_name("generation_config.json")
    if generation.is_file():
        more = Fields(generation, read_json(generation)).token_ids("eos_token_id", ())
        eos = tuple(dict.fromkeys((*config.eos_token_ids, *more)))
        config = dataclasses.replace(config, eos_token_ids=eos)
    return family, config if own is None else own.recorded(config)


def _find_family(fields: Fields, families: Sequence[Family]) -> Family:
    architectures = fields.data.get("architectures") or []
    if not isinstance(architectures, list):
        raise fields.bad("architectures", "a list of names")
    model_type = fields.data.get("model_type")
    for family in families:
        if architectures and any(name in family.architectures for name in architectures):
            return family
        if not architectures and model_type in family.model_types:
            return family
    supported = f"supported: {', '.join(family.architectures[0] for family in families)}"
    if not architectures and model_type is None:
        raise SourceError(
            f"{fields.path} names no architecture (field architectures or model_type); {supported}"
        )
    name = ", ".join(map(str, architectures)) or f"model type {model_type}"
    code = ""
    if fields.has("auto_map"):
        code = " (it comes with code of its own, which llmforge never executes)"
    raise UnsupportedModelError(
        f"{fields.path}: the architecture {name} is not supported{code}; {supported}"
    )


def _refuse_quantized(fields: Fields, family: Family) -> None:
    """FP8 with scales by block is converted for all families, what else the family can."""
    if quantization := fields.table("quantization_config"):
        method = quantization.data.get("quant_method", "unknown method")
        block = quantization.data.get("weight_block_size")
        if method == "fp8" and block == [FP8_BLOCK, FP8_BLOCK]:
            return
        if method in family.quantizations:
            return
        raise UnsupportedModelError(
            f"{fields.path}: the weights are quantized ({method}), which is not supported; "
            "use the model's unquantized weights"
        )


def plan_for(
    family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo], where: str
) -> Plan:
    """Which tensors of the source become which parameters. Raises SourceError, see make_plan."""
    prefix, rules = family.base_prefix, family.rules_for(config)
    if tensors and not any(name.startswith(prefix) for name in tensors):
        rules = tuple(
            dataclasses.replace(r, theirs=tuple(name.removeprefix(prefix) for name in r.theirs))
            for r in rules
        )
    ignored = family.ignored(config) if callable(family.ignored) else family.ignored
    if config.tied_embeddings:
        heads = {name for rule in rules for name in rule.theirs if "head.weight" in rule.ours}
        ignored += tuple(Ignore(re.escape(name), _TIED_HEAD) for name in heads)
    try:
        return make_plan(config, rules, ignored, tensors, where)
    except AssertionError as error:
        if config.own is None:
            raise
        raise DefinitionError(
            f"{config.own.file}: its rules and its list of parameters do not agree on {error}"
        ) from error
