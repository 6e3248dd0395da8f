"""Whatever stands in a config, convert converts or says in one line why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from meta_layout import write_meta
from nemo_layout import NemoWriter, as_yaml, nemo1_config, pack
from parts import model_parts
from test_trtllm import llama_fields
from trtllm_layout import write_trtllm

from llmforge.checkpoint.convert import convert
from llmforge.errors import LlmforgeError
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]
VALUES = (None, -1, 0, 3, 1.5, float("nan"), "x", [1], {"a": 1}, True, 10**30)
NEMO = ("window_size", "rotary_base", "qk_layernorm", "override_vocab_size", "tokenizer")


@pytest.mark.parametrize("layout", ["nemo", "tensorrt-llm", "granite of tensorrt-llm", "meta"])
@pytest.mark.slow
def test_odd_values(hf: Hf, tmp_path: Path, layout: str) -> None:
    _, config, state = hf("llama")
    path = tmp_path / "model"
    if layout == "nemo":
        parts = model_parts(config, state)
        pack(path, NemoWriter(parts).ranks(1, 1), "directory")
        values, file, encode = nemo1_config(parts), "model_config.yaml", as_yaml
        values |= dict.fromkeys(NEMO)
    elif layout == "meta":
        write_meta(path, config, state, rope_theta=1e4, use_scaled_rope=False)
        file, encode = "params.json", lambda data: json.dumps(data).encode()
        values = json.loads((path / file).read_bytes())
    else:
        fields = {**llama_fields(config), "output_multiplier_scale": 1.0, "rotary_pct": 1.0}
        if "granite" in layout:
            fields |= {"architecture": "GraniteForCausalLM", "attention_multiplier": 1.0}
        write_trtllm(path, config, state, 2, fields=fields)
        file, encode = "config.json", lambda data: json.dumps(data).encode()
        values = json.loads((path / file).read_bytes())
    said = set()
    for key in values:
        for value in VALUES:
            (path / file).write_bytes(encode({**values, key: value}))
            try:
                convert(path, tmp_path / "out", ConvertSettings(overwrite=True))
            except LlmforgeError as error:
                assert "\n" not in str(error)
                said.add(str(error))
    assert len(said) > 2 * len(values) / 3, "hardly anything was refused"
