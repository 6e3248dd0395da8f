"""What convert refuses: one sentence each, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmforge.checkpoint.convert import convert
from llmforge.errors import SettingsError, SourceError, UnsupportedModelError
from llmforge.settings import ConvertSettings

Make = Callable[..., Path]
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> Path:
    path = directory / INDEX
    index = json.loads(path.read_bytes())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return directory


def with_file(make: Make, name: str, data: bytes) -> Path:
    directory = make()
    (directory / name).write_bytes(data)
    return directory


def without_weights(make: Make, *names: str) -> Path:
    directory = make()
    (directory / "model.safetensors").unlink()
    for name in names:
        (directory / name).write_bytes(b"x")
    return directory


def with_bin(make: Make, state: Any, keep: float = 1.0) -> Path:
    directory = without_weights(make)
    torch.save(state, directory / "pytorch_model.bin")
    truncate(directory / "pytorch_model.bin", keep)
    return directory


def cut(make: Make, name: str, keep: float, shards: int = 0) -> Path:
    directory = make(shards=shards)
    truncate(directory / name, keep)
    return directory


def remove(make: Make, name: str, shards: int = 0) -> Path:
    directory = make(shards=shards)
    (directory / name).unlink()
    return directory


def link(make: Make, name: str) -> Path:
    directory = remove(make, name)
    (directory / name).symlink_to("../../blobs/0123")
    return directory


def empty(make: Make) -> Path:
    directory = make()
    shutil.rmtree(directory)
    directory.mkdir()
    return directory


def bad_header(make: Make, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return with_file(make, "model.safetensors", len(text).to_bytes(8, "little") + text + data)


def add(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: value})


def drop_all(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if "layers" in name:
            del tensors[name]


def entry(dtype: str, shape: list[Any], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Remade:
    """Makes a model and removes a file of it."""

    def __init__(self, make: Make, name: str = "model.safetensors") -> None:
        self._make, self._name = make, name

    def __call__(self) -> Path:
        return remove(self._make, self._name)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
Q = "model.layers.0.self_attn.q_proj.weight"

CASES: dict[str, tuple[Callable[[Make], Path], str]] = {
    "no such directory": (lambda make: make() / "nowhere", "nowhere does not exist"),
    "a file": (lambda make: make() / "config.json", "is a file; name the directory"),
    "empty directory": (empty, "is empty"),
    "no config": (lambda make: remove(make, "config.json"), "has no config.json"),
    "no weights": (without_weights, "has no weights; a model directory holds"),
    "no index": (
        lambda make: remove(make, INDEX, shards=2),
        f"has parts of the weights ({SHARD}, model-00002-of-00002.safetensors) without their "
        f"index, {INDEX}",
    ),
    "no index of torch files": (
        lambda make: without_weights(make, "a-1-of-2.bin", "a-2-of-2.bin"),
        "without their index, pytorch_model.bin.index.json",
    ),
    "a link to nowhere": (lambda make: link(make, "model.safetensors"), "that lead nowhere: model"),
    "config is a link to nowhere": (lambda make: link(make, "config.json"), "nowhere: config.json"),
    "gguf only": (lambda make: without_weights(make, "m.gguf"), "GGUF files are not supported"),
    "onnx only": (lambda make: without_weights(make, "m.onnx"), "ONNX files are not supported"),
    "truncated safetensors": (
        lambda make: cut(make, "model.safetensors", 0.9),
        "model.safetensors is truncated: it has",
    ),
    "truncated header": (
        lambda make: cut(make, "model.safetensors", 0.05),
        "its header ends after the file",
    ),
    "a few bytes": (lambda make: with_file(make, "model.safetensors", b"abc"), "is truncated: 3"),
    "empty weights file": (lambda make: with_file(make, "model.safetensors", b""), "truncated: 0"),
    "git lfs pointer": (
        lambda make: with_file(make, "model.safetensors", LFS),
        "is a Git LFS pointer, not the weights; fetch them with: git lfs pull",
    ),
    "git lfs pointer, bin": (
        lambda make: with_file(Remade(make), "pytorch_model.bin", LFS),
        "is a Git LFS pointer",
    ),
    "absurd header length": (
        lambda make: with_file(make, "model.safetensors", b"\xff" * 100),
        "is not a safetensors file: header of",
    ),
    "header is not JSON": (lambda make: bad_header(make, b"{nope"), "header is not valid JSON"),
    "header is a list": (lambda make: bad_header(make, [1]), "not a table of tensors"),
    "tensor twice in a header": (
        lambda make: bad_header(make, b'{"a": 1, "a": 2}'),
        "header is not valid JSON",
    ),
    "malformed entry": (lambda make: bad_header(make, {"a": {"dtype": "F32"}}), "entry is not"),
    "negative shape": (
        lambda make: bad_header(make, {"a": entry("F32", [-1], [0, 4])}),
        "shape or offsets are not whole numbers",
    ),
    "unknown dtype in a header": (
        lambda make: bad_header(make, {"a": entry("F3", [1], [0, 4])}),
        "'F3' is unknown",
    ),
    "shape and bytes disagree": (
        lambda make: bad_header(make, {"a": entry("F32", [2], [0, 4])}, b"1234"),
        "is 8 bytes, its offsets span 4",
    ),
    "overlapping tensors": (
        lambda make: bad_header(
            make, {"a": entry("F32", [2], [0, 8]), "b": entry("F32", [1], [4, 8])}, b"12345678"
        ),
        "'b': it overlaps another",
    ),
    "gap between tensors": (
        lambda make: bad_header(make, {"a": entry("F32", [1], [4, 8])}, b"12345678"),
        "follows a gap",
    ),
    "bytes after the last tensor": (
        lambda make: bad_header(make, {"a": entry("F32", [1], [0, 4])}, b"12345678"),
        "4 bytes follow the last tensor",
    ),
    "index names a missing file": (
        lambda make: remove(make, SHARD, shards=2),
        f"names files that are missing (1): {SHARD}",
    ),
    "index leaves the directory": (
        lambda make: edit_index(make(shards=2), lambda m: m.update({Q: "../../etc/passwd"})),
        "names files outside of its directory: ../../etc/passwd",
    ),
    "index names an absolute path": (
        lambda make: edit_index(make(shards=2), lambda m: m.update({Q: "/etc/passwd"})),
        "outside of its directory: /etc/passwd",
    ),
    "index without a table": (
        lambda make: with_file(Remade(make), INDEX, b"{}"),
        "has no weight_map",
    ),
    "index names a tensor that its file lacks": (
        lambda make: edit_index(make(shards=2), lambda m: m.update({"ghost": SHARD})),
        f"tensors that are not in their files (1): ghost ({SHARD})",
    ),
    "missing tensor": (
        lambda make: make(edit=lambda tensors: tensors.pop(Q)),
        f"missing tensors (1): {Q}",
    ),
    "many missing tensors": (lambda make: make(edit=drop_all), "missing tensors (18): "),
    "unexpected tensor": (
        lambda make: make(edit=add("model.layers.0.extra", torch.ones(1))),
        "unexpected tensors (1): model.layers.0.extra",
    ),
    "bias that the config has not": (
        lambda make: make(edit=add("model.layers.0.self_attn.q_proj.bias", torch.ones(16))),
        "unexpected tensors (1): model.layers.0.self_attn.q_proj.bias",
    ),
    "more layers than the config says": (
        lambda make: make(
            config={"num_hidden_layers": 1}, edit=add("model.layers.1.x", torch.ones(1))
        ),
        "unexpected tensors (1): model.layers.1.x",
    ),
    "wrong shape": (
        lambda make: make(edit=add(Q, torch.ones(5, 16))),
        f"wrong shapes (1): {Q} (is [5, 16], must be [16, 16])",
    ),
    "integer weights": (
        lambda make: make(edit=add(Q, torch.ones(16, 16, dtype=torch.int8))),
        f"unsupported dtypes (1): {Q} (int8); supported dtypes are float64, float32",
    ),
    "fp8 weights": (
        lambda make: make(edit=add(Q, torch.ones(16, 16).to(torch.float8_e4m3fn))),
        f"{Q} (float8_e4m3)",
    ),
    "bin with code in it": (
        lambda make: with_bin(make, {"a": Path("x")}),
        "loading the rest could execute code",
    ),
    "truncated bin": (
        lambda make: with_bin(make, {"a": torch.ones(999)}, 0.6),
        "is truncated or not a torch file",
    ),
    "bin of something else": (lambda make: with_bin(make, [1, 2]), "is not a table of tensors"),
    "checkpoint already": (
        lambda make: with_file(Remade(make, "config.json"), "manifest.yaml", b"kind: x"),
        "is a llmforge checkpoint already",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_source(
    hf_model: Make, output: Path, assert_nothing_left: Callable[[], None], name: str
) -> None:
    prepare, words = CASES[name]
    source = prepare(hf_model)
    with pytest.raises(SourceError) as caught:
        convert(source, output, ConvertSettings())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_nothing_left()


def test_offenders_are_counted_and_cut(hf_model: Make, output: Path) -> None:
    with pytest.raises(SourceError) as caught:
        convert(hf_model(edit=drop_all), output, ConvertSettings())
    assert str(caught.value).count("model.layers.") == 10
    assert "and 8 more" in str(caught.value)


def test_all_problems_are_in_one_message(hf_model: Make, output: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        del tensors["model.norm.weight"]
        tensors["odd"] = torch.ones(1)
        tensors[Q] = torch.ones(2, 2, dtype=torch.int32)

    with pytest.raises(SourceError) as caught:
        convert(hf_model(edit=edit), output, ConvertSettings())
    for words in ("missing tensors", "unexpected tensors", "wrong shapes", "unsupported dtypes"):
        assert words in str(caught.value)


def test_unsupported_architecture_lists_the_supported(hf_model: Make, output: Path) -> None:
    source = hf_model(config={"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UnsupportedModelError) as caught:
        convert(source, output, ConvertSettings())
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        assert f"{name}ForCausalLM" in str(caught.value)


def test_a_file_cut_while_it_is_read(
    hf_model: Make, output: Path, assert_nothing_left: Callable[[], None]
) -> None:
    source = hf_model()

    def cut_now(label: str, done: int, total: int) -> None:
        if (source / "model.safetensors").stat().st_size > 100:
            truncate(source / "model.safetensors", 0.01)

    # Of 21 parameters at most as many are read ahead as there are buffers: 8.
    with pytest.raises(SourceError, match="ends in the middle of a tensor"):
        convert(source, output, ConvertSettings(), progress=cut_now)
    assert_nothing_left()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": None}, "give a source"),
        ({"source": "a/b", "from_config": Path("c.json")}, "not both"),
        ({"source": Path("a"), "seed": 1}, "--seed is for random weights"),
        (
            {"source": Path("a"), "settings": ConvertSettings(revision="x")},
            "--revision is for models on the Hub",
        ),
    ],
)
def test_arguments_that_do_not_go_together(
    output: Path, arguments: dict[str, Any], words: str
) -> None:
    arguments = {"settings": ConvertSettings(), **arguments}
    with pytest.raises(SettingsError, match=words):
        convert(output=output, **arguments)
