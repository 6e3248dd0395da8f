"""What convert refuses of NeMo's files, and what an archive cannot do."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo_layout import NemoWriter, as_yaml, below, nemo1_config, pack, saved
from parts import model_parts

from llmforge.checkpoint.convert import convert
from llmforge.errors import SourceError
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]
Files = dict[str, bytes]
GPT = "nemo.collections.nlp.models.language_modeling"


@pytest.fixture
def writer(hf: Hf) -> NemoWriter:
    _, config, state = hf("llama")
    parts = model_parts(config, state)
    writer = NemoWriter(parts, padded_to=2)
    writer.config = nemo1_config(parts)  # type: ignore[attr-defined]
    return writer


def refused(path: Path, message: str) -> None:
    output = path.parent / "outputs" / "out"
    with pytest.raises(SourceError, match=message) as caught:
        convert(path, output, ConvertSettings())
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not output.parent.exists()


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"target": f"{GPT}.megatron_t5_model.MegatronT5Model"}, "class .*T5Model is not supported"),
    ({"activation": "approx-gelu"}, "activation = 'approx-gelu' is not supported; supported: gelu"),
    ({"normalization": "scalenorm"}, "normalization = 'scalenorm' is not supported; supported: la"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi' is not supported"),
    ({"num_moe_experts": 8}, "num_moe_experts = 8 is not supported"),
    ({"transformer_block_type": "normformer"}, "transformer_block_type = 'normformer' is not supp"),
    ({"megatron_legacy": True}, "megatron_legacy = True is not supported; supported: False"),
    ({"rotary_interleaved": True}, "rotary_interleaved = True is not supported"),
    (
        {"mcore_customization_config": {"final_logit_softcapping": 30.0}},
        r"final_logit_softcapping = 30\.0 is not supported; supported: to leave it out",
    ),
    ({"rotary_percentage": 0.3}, "rotary_percentage must be such that an even number of 12"),
    ({"num_layers": "many"}, "num_layers must be a positive whole number, not 'many'"),
    ({"num_layers": "${oc.env:LAYERS}"}, "num_layers must be a positive whole number, not"),
    ({"num_query_groups": 3}, r"num_query_groups must be a divisor of num_attention_heads \(4\)"),
    ({"num_layers": 2}, "unexpected tensors"),
    ({"num_layers": 4}, r"missing tensors .*decoder\.layers\.3\."),
    ({"hidden_size": 64, "kv_channels": 12}, "wrong shapes"),
    ({"num_query_groups": 4}, r"linear_qkv\.weight .* has 96 rows, but .* asks for 144"),
    ({"ffn_hidden_size": 80}, r"linear_fc1\.weight\[gate\] \(is \[88, 48\], must be \[80, 48\]\)"),
    ({"bias": True}, r"missing tensors .*linear_qkv\.bias\[q\]"),
    ({"window_size": 5}, "window_size must be two numbers, not 5"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_configs(writer: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    files = writer.ranks(1, 1)
    files["model_config.yaml"] = as_yaml({**writer.config, **change})
    refused(pack(tmp_path / "model", files, "tar"), message)


@pytest.mark.parametrize(
    ("tp", "pp", "lost", "message"),
    [
        (2, 1, "mp_rank_01/", r"ranks' files these are missing: tp 1 pp 0"),
        (2, 2, "tp_rank_00_pp_rank_001/", r"ranks' files these are missing: tp 0 pp 1"),
        (1, 2, "", r"size 2, but of the ranks' files these are missing: tp 1 pp 0, tp 1 pp 1"),
    ],
)
def test_missing_ranks(
    writer: Any, tmp_path: Path, tp: int, pp: int, lost: str, message: str
) -> None:
    files = {n: d for n, d in writer.ranks(tp, pp).items() if not lost or not n.startswith(lost)}
    fields = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": pp}
    files["model_config.yaml"] = as_yaml({**writer.config, **fields})
    refused(pack(tmp_path / "model", files, "tar"), message)


class Evil:
    """Would touch a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", ["directory", "tar", "gz"])
def test_code_in_a_checkpoint_is_not_run(writer: Any, tmp_path: Path, container: str) -> None:
    trap = tmp_path / "trap"
    files = writer.ranks(1, 1, {"evil": Evil(trap)})
    files["model_config.yaml"] = as_yaml(writer.config)
    message = r"model_weights\.ckpt.*: it holds more than tensors, and loading the rest could"
    refused(pack(tmp_path / "model", files, container), message)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files, trap: {".metadata": pickle.dumps(Evil(trap))}, "it names posix.mkdir"),
        (
            lambda files, trap: {".metadata": pickle.dumps(torch.nn.Linear)},
            r"it names torch\.nn\.modules\.linear\.Linear",
        ),
        (lambda files, trap: {".metadata": pickle.dumps([1, 2])}, "holds more than a checkpoint"),
        (
            lambda files, trap: {".metadata": files[".metadata"][:-40]},
            "cannot read .*it is damaged",
        ),
        (lambda files, trap: {"__1_0.distcp": None}, r"has no __1_0\.distcp"),
        (lambda files, trap: {"__1_0.distcp": files["__1_0.distcp"][:-9999]}, "is truncated"),
        (
            lambda files, trap: {
                ".metadata": files[".metadata"].replace(b"__1_0.distcp", b"../_0.distcp")
            },
            r"names a file outside of its directory: '\.\./_0\.distcp'",
        ),
        (
            lambda files, trap: {"metadata.json": b'{"sharded_backend": "fsdp_dtensor"}'},
            "backend 'fsdp_dtensor' is not supported; supported: torch_dist, zarr",
        ),
        (lambda files, trap: {"metadata.json": b"{"}, r"metadata\.json is not valid JSON"),
    ],
)
def test_torch_dist(
    writer: Any, tmp_path: Path, change: Callable[..., dict[str, Any]], message: str
) -> None:
    trap = tmp_path / "trap"
    files = writer.torch_dist(2)
    files |= change(files, trap)
    files = below("model_weights", {n: d for n, d in files.items() if d is not None})
    files["model_config.yaml"] = as_yaml(writer.config)
    refused(pack(tmp_path / "model", files, "directory"), message)
    assert not trap.exists()


def header(files: Files, **change: Any) -> Files:
    name = "model.decoder.final_layernorm.weight/.zarray"
    return {name: json.dumps({**json.loads(files[name]), **change}).encode()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files: header(files, compressor={"id": "zstd"}),
            "compressor = .*zstd.* is not supp",
        ),
        (lambda files: header(files, zarr_format=3), "zarr_format = 3 is not supported, only 2"),
        (lambda files: header(files, dtype="<c8"), "dtype '<c8' is not supported; supported: bfl"),
        (lambda files: header(files, chunks=[0]), r"chunks of \[0\] do not divide"),
        (lambda files: header(files, shape=[49]), r"lacks chunks \(1\): 1"),
        (
            lambda files: {"model.decoder.final_layernorm.weight/.zarray": b"{}"},
            "not the header of a zarr array",
        ),
        (
            lambda files: {"model.decoder.final_layernorm.weight/0": b"ab"},
            "has 2 bytes; it must have 96",
        ),
        (
            lambda files: {"model.decoder.layers.mlp.linear_fc2.weight/2.0.1": None},
            r"linear_fc2\.weight lacks chunks \(1\): 2\.0\.1",
        ),
    ],
)
def test_zarr(
    writer: Any, tmp_path: Path, change: Callable[[Files], dict[str, Any]], message: str
) -> None:
    files: dict[str, Any] = writer.zarr(2)
    files |= change(files)
    files = below("model_weights", {n: d for n, d in files.items() if d is not None})
    files["model_config.yaml"] = as_yaml(writer.config)
    refused(pack(tmp_path / "model", files, "directory"), message)


def member(name: str, data: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (member("../escaped"), r"lie outside of it: '\.\./escaped'"),
        (member("a/../../escaped"), "lie outside of it"),
        (member("/tmp/escaped"), "lie outside of it: '/tmp/escaped'"),
        (
            member("link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "not a plain file.*link",
        ),
        (member("link", b"", type=tarfile.LNKTYPE, linkname="a"), "not a plain file.*link"),
        (member("pipe", b"", type=tarfile.FIFOTYPE), "not a plain file.*pipe"),
        (member("./model_config.yaml"), "holds model_config.yaml twice"),
    ],
)
def test_archives_that_reach_out(
    writer: Any, tmp_path: Path, mode: Any, entry: Any, message: str
) -> None:
    path = tmp_path / "model.nemo"
    with tarfile.open(path, mode) as tar:
        tar.addfile(*member("model_config.yaml", as_yaml(writer.config)))
        entry[1].seek(0)
        tar.addfile(*entry)
    refused(path, message)
    assert not (tmp_path / "escaped").exists() and not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("container", ["tar", "gz"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_truncated_archives(writer: Any, tmp_path: Path, container: str, keep: float) -> None:
    files = {"model_config.yaml": as_yaml(writer.config), **writer.ranks(1, 1)}
    path = pack(tmp_path / "model", files, container)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    where = ": it ends in the middle of model_" if container == "tar" else ""
    refused(path, rf"model\.nemo is truncated{where}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"BZh91AY", "compressed with bzip2; supported: tar, alone or compressed with gzip"),
        (b"PK\x03\x04....", "compressed with zip"),
        (b"not a tar archive at all" * 100, "truncated or not a tar archive"),
        (b"", "truncated or not a tar archive|has neither"),
    ],
)
def test_files_that_are_no_archives(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(data)
    refused(path, message)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model_config.yaml": b"a: [", "x": b""}, r"model_config\.yaml.* is not valid YAML"),
        ({"model_config.yaml": b"just text", "x": b""}, "is not a table of settings"),
        ({"model_config.yaml": b"!!python/object:os.system {}", "x": b""}, "is not valid YAML"),
        ({"something": b"", "else": b""}, r"has neither model_config\.yaml \(NeMo 1\) nor"),
        (
            {"context/io.json": b"{}", "weights/.metadata": b""},
            r"has context/io\.json but no context/model\.yaml: .*; load it with a later NeMo",
        ),
        ({"context/model.yaml": b"a: 1", "weights/x": b""}, "has no section config"),
        (
            {
                "context/model.yaml": as_yaml({"config": {"activation_func": "torch.tanh"}}),
                "x": b"",
            },
            r"activation_func = 'tanh' is not supported; supported: silu, gelu",
        ),
    ],
)
def test_other_directories(tmp_path: Path, files: Files, message: str) -> None:
    refused(pack(tmp_path / "model", files, "tar", ""), message)


def test_no_weights(writer: Any, tmp_path: Path) -> None:
    files = {"model_config.yaml": as_yaml(writer.config), "x": b""}
    refused(pack(tmp_path / "model", files, "directory"), "has no weights: neither model_weights")


def test_a_table_of_other_things(writer: Any, tmp_path: Path) -> None:
    files = {"model_config.yaml": as_yaml(writer.config), "model_weights.ckpt": saved([1])}
    refused(pack(tmp_path / "model", files, "tar"), "is not a table of tensors by name")


def test_nothing_of_a_compressed_archive_is_left(writer: Any, tmp_path: Path) -> None:
    files = {"model_config.yaml": as_yaml({**writer.config, "num_layers": 9}), **writer.ranks(1, 1)}
    refused(pack(tmp_path / "model", files, "gz"), "missing tensors")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "model.nemo"}
