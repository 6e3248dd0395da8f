"""convert as a whole: what it writes, and what happens when it cannot."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from llmforge import artifact_writer
from llmforge.checkpoint import families, pipeline
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.dtypes import has_nonfinite
from llmforge.checkpoint.mapping import Rule
from llmforge.checkpoint.store import Checkpoint
from llmforge.errors import OutputError, SourceError
from llmforge.settings import ConvertSettings

Make = Callable[..., Path]
Check = Callable[[], None]
Q = "model.layers.0.self_attn.q_proj.weight"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_same_input_gives_the_same_bytes(hf_model: Make, output: Path) -> None:
    source = hf_model()
    first = convert(source, output, ConvertSettings())
    before = contents(output)
    second = convert(source, output, ConvertSettings(overwrite=True))
    assert contents(output) == before
    assert first.digest == second.digest == Checkpoint.open(output).digest


def test_nothing_but_the_checkpoint_is_left(hf_model: Make, output: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    convert(hf_model(), output, ConvertSettings(), progress=lambda *call: calls.append(call))
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert {label for label, _, _ in calls} == {"converting"}
    done = [done for _, done, _ in calls]
    assert done == sorted(done) and done[-1] == calls[-1][2]


@pytest.mark.parametrize("source_dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_dtypes_are_rounded_as_torch_does(
    hf_model: Make, output: Path, source_dtype: str, dtype: str | None
) -> None:
    kept: dict[str, Any] = {}
    source = hf_model(dtype=source_dtype, edit=kept.update)
    convert(source, output, ConvertSettings(dtype=dtype))
    checkpoint = Checkpoint.open(output)
    kept_dtype = "float32" if source_dtype == "float64" else source_dtype
    assert checkpoint.config.dtype == (dtype or kept_dtype)
    expected = kept[Q].to(getattr(torch, checkpoint.config.dtype)).to(torch.float32).numpy()
    found = checkpoint.read("layers.0.attention.q.weight")
    assert np.array_equal(found.astype(np.float32), expected)


def test_mixed_dtypes_become_that_of_most(hf_model: Make, output: Path) -> None:
    warnings: list[str] = []

    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = torch.ones(16)

    convert(hf_model(edit=edit), output, ConvertSettings(), warn=warnings.append)
    assert Checkpoint.open(output).config.dtype == "bfloat16"
    assert any("those in float32 are converted to bfloat16" in warning for warning in warnings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_that_are_not_finite_are_told(
    hf_model: Make, output: Path, value: float, dtype: str
) -> None:
    warnings: list[str] = []

    def edit(tensors: dict[str, Any]) -> None:
        tensors[Q][3, 5] = value

    convert(hf_model(edit=edit, dtype=dtype), output, ConvertSettings(), warn=warnings.append)
    assert "NaN or infinite values in 1 parameters: layers.0.attention.q.weight" in warnings


def test_overflow_is_told(hf_model: Make, output: Path) -> None:
    warnings: list[str] = []

    def edit(tensors: dict[str, Any]) -> None:
        tensors[Q][0, 0] = 1e5

    source = hf_model(edit=edit)
    convert(source, output, ConvertSettings(dtype="float16"), warn=warnings.append)
    [warning] = [w for w in warnings if "too large for float16" in w]
    assert "infinite, in 1 parameters: layers.0.attention.q.weight;" in warning


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_has_nonfinite(dtype: Any) -> None:
    largest = ml_dtypes.finfo(dtype).max  # type: ignore[no-untyped-call]
    array = np.array([0, -0.0, largest, -largest, 1, -1] * 100_000).astype(dtype)
    assert not has_nonfinite(array)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        bad = array.copy()
        bad[-1] = value
        assert has_nonfinite(bad)
    assert not has_nonfinite(array[:0])


# --- output


def test_output_exists(hf_model: Make, output: Path) -> None:
    source = hf_model()
    convert(source, output, ConvertSettings())
    before = contents(output)
    with pytest.raises(OutputError, match="exists already"):
        convert(source, output, ConvertSettings())
    with pytest.raises(OutputError, match="holds something else"):
        convert(source, source, ConvertSettings(overwrite=True))
    assert contents(output) == before


def test_failed_overwrite_keeps_the_old_checkpoint(hf_model: Make, output: Path) -> None:
    convert(hf_model(), output, ConvertSettings())
    before = contents(output)
    bad = hf_model("bad", edit=lambda tensors: tensors.pop(Q))
    with pytest.raises(SourceError):
        convert(bad, output, ConvertSettings(overwrite=True))
    assert contents(output) == before


def test_too_little_space_is_refused_at_once(
    hf_model: Make, output: Path, assert_nothing_left: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_writer, "_free_space", lambda path: 1000)
    with pytest.raises(OutputError, match="not enough space"):
        convert(hf_model(), output, ConvertSettings())
    assert_nothing_left()


def test_disk_full_while_writing(
    hf_model: Make, output: Path, assert_nothing_left: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = hf_model()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="no space left while writing") as caught:
        convert(source, output, ConvertSettings())
    assert "\n" not in str(caught.value)
    assert_nothing_left()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        done = None
    if done is None or done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_disk_that_is_really_full(
    hf_model: Make, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_model(config={"vocab_size": 4000})
    with pytest.raises(OutputError, match="not enough space"):
        convert(source, small_disk / "out", ConvertSettings())
    monkeypatch.setattr(artifact_writer, "_free_space", lambda path: 10**18)
    with pytest.raises(OutputError, match="no space left while writing"):
        convert(source, small_disk / "out", ConvertSettings())
    assert list(small_disk.iterdir()) == []


# --- processes

CHILD = """
import sys
from pathlib import Path
from llmforge.checkpoint.convert import convert
from llmforge.settings import ConvertSettings
if len(sys.argv) > 4:
    import torch
def peak():
    # Not getrusage: that counts what the parent held when it started this process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
before = peak()
settings = ConvertSettings(dtype=sys.argv[4] if len(sys.argv) > 4 else None)
def stop(label, done, total):
    if sys.argv[3] == "stop" and done > total // 2:
        print("half", flush=True)
        sys.stdin.read()
convert(Path(sys.argv[1]), Path(sys.argv[2]), settings, progress=stop)
print(peak() - before)
print("torch" in sys.modules)
"""


def test_killed_in_the_middle_then_run_again(hf_model: Make, output: Path) -> None:
    source = hf_model()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(output), "stop"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "half\n"
    with pytest.raises(OutputError, match="another llmforge process is writing"):
        convert(source, output, ConvertSettings())
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    process.stdin.close()
    process.stdout.close()
    assert not output.exists()
    assert list(output.parent.iterdir()) != []
    convert(source, output, ConvertSettings())
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert len(Checkpoint.open(output).tensors) == 21


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_memory_is_bounded(
    tmp_path: Path, base_config: dict[str, Any], output: Path, dtype: str | None
) -> None:
    """A model of 200 MB: only the buffers of the pipeline are held, 16 MB and 32 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps({**base_config, **sizes}))
    random = tmp_path / "random"
    convert(None, random, ConvertSettings(shard_size_gb=1.0), from_config=tmp_path / "config.json")
    source = as_hugging_face(random, tmp_path / "hf", {**base_config, **sizes})
    assert (source / "model.safetensors").stat().st_size > 170e6
    command = [sys.executable, "-c", CHILD, str(source), str(output), "go"]
    done = subprocess.run(
        command + ([dtype] if dtype else []), capture_output=True, text=True, check=True
    )
    grown, with_torch = done.stdout.split()
    assert int(grown) * 1024 < (70 << 20)
    assert with_torch == str(dtype is not None), "torch is loaded for a change of dtype only"


def as_hugging_face(checkpoint: Path, directory: Path, config: dict[str, Any]) -> Path:
    """The checkpoint's one weight file with Hugging Face's names: the header is replaced."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    [path] = checkpoint.glob("*.safetensors")
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start].decode()
    for ours, theirs in (
        ("embed.", "model.embed_tokens."),
        ("final_norm.", "model.norm."),
        ("head.", "lm_head."),
        ("layers.", "model.layers."),
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        *((f".attention.{x}.", f".self_attn.{x}_proj.") for x in "qkvo"),
        *((f".mlp.{x}.", f".mlp.{x}_proj.") for x in ("gate", "up", "down")),
    ):
        header = header.replace(
            f'"{ours}' if ours[0] not in ".am" else ours,
            f'"{theirs}' if ours[0] not in ".am" else theirs,
        )
    text = header.encode()
    (directory / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data[start:]
    )
    return directory


# --- rules that split and merge


def split_qkv(arrays: list[Any], config: ModelConfig) -> list[Any]:
    size = config.head_dim
    sizes = [config.num_heads * size, config.num_kv_heads * size]
    return np.split(arrays[0], np.cumsum([*sizes]))


def merge_halves(arrays: list[Any], config: ModelConfig) -> list[Any]:
    return [np.concatenate(arrays)]


@pytest.fixture
def fused_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The llama family with q, k and v in one tensor, and the down projection in two."""
    [llama] = [family for family in families.FAMILIES if family.name == "llama"]
    layer = "layers.{i}."
    kept = [r for r in llama.rules if not any(f"attention.{x}.weight" in r.ours[0] for x in "qkv")]
    kept = [rule for rule in kept if "mlp.down.weight" not in rule.ours[0]]
    rules = (
        *kept,
        Rule(
            ("model.layers.{i}.qkv",),
            tuple(f"{layer}attention.{x}.weight" for x in "qkv"),
            split_qkv,
        ),
        Rule(
            ("model.layers.{i}.down.0", "model.layers.{i}.down.1"),
            (f"{layer}mlp.down.weight",),
            merge_halves,
        ),
    )
    row = families.Family(
        "fused", ("Fused",), (), llama.read_config, rules, "model.", (), llama.defaults
    )
    monkeypatch.setattr(families, "FAMILIES", (row,))


def fuse(tensors: dict[str, Any]) -> None:
    for i in range(2):
        layer = f"model.layers.{i}."
        qkv = [tensors.pop(f"{layer}self_attn.{x}_proj.weight") for x in "qkv"]
        tensors[f"{layer}qkv"] = torch.cat(qkv)
        down = tensors.pop(f"{layer}mlp.down_proj.weight")
        for half, part in enumerate(down.split(10)):
            tensors[f"{layer}down.{half}"] = part.contiguous()


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.usefixtures("fused_family")
def test_rules_split_and_merge(hf_model: Make, output: Path, dtype: str | None) -> None:
    plain: dict[str, Any] = {}

    def edit(tensors: dict[str, Any]) -> None:
        plain.update(tensors)
        fuse(tensors)

    source = hf_model(config={"architectures": ["Fused"]}, edit=edit)
    convert(source, output, ConvertSettings(dtype=dtype))
    checkpoint = Checkpoint.open(output)
    for i in range(2):
        for ours, theirs in (
            *((f"attention.{x}", f"self_attn.{x}_proj") for x in "qkv"),
            ("mlp.down", "mlp.down_proj"),
        ):
            found = checkpoint.read(f"layers.{i}.{ours}.weight").astype(np.float32)
            expected = plain[f"model.layers.{i}.{theirs}.weight"].float().numpy()
            assert np.array_equal(found, expected)


@pytest.mark.usefixtures("fused_family")
def test_a_rule_that_gives_a_wrong_shape(
    hf_model: Make, output: Path, assert_nothing_left: Check
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        fuse(tensors)
        tensors["model.layers.1.qkv"] = tensors["model.layers.1.qkv"][:-1].clone()

    source = hf_model(config={"architectures": ["Fused"]}, edit=edit)
    with pytest.raises(SourceError, match=r"layers.1.qkv give layers.1.attention.v.weight the"):
        convert(source, output, ConvertSettings())
    assert_nothing_left()


@pytest.mark.usefixtures("fused_family")
def test_read_ahead_holds_no_more_than_it_may(
    hf_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmforge.checkpoint.sources.hf import HfSource

    source = HfSource(hf_model(config={"architectures": ["Fused"]}, edit=fuse))
    monkeypatch.setattr(pipeline, "READ_AHEAD", 1500)
    monkeypatch.setattr(pipeline, "MOST_IN_FLIGHT", 1500)
    read: list[int] = []
    original = source.read

    def counted(name: str) -> Any:
        read.append(source.tensors[name].nbytes)
        return original(name)

    monkeypatch.setattr(source, "read", counted)
    groups = [group for group in source.plan.groups if group.convert]
    pool = pipeline.BufferPool(2, pipeline.PIECE)
    given = 0
    for item in pipeline.read_ahead(source, groups, pool):
        assert isinstance(item, pipeline.Whole)
        assert sum(read) - given <= max(1500, item.group.nbytes)
        given += item.group.nbytes
    assert given == sum(group.nbytes for group in groups) > 0


# --- random weights


def test_random_weights(tmp_path: Path, base_config: dict[str, Any], output: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**base_config, "hidden_size": 256, "vocab_size": 1000}))
    settings = ConvertSettings(overwrite=True)
    first = convert(None, output, settings, from_config=path, seed=3)
    before = contents(output)
    convert(None, output, settings, from_config=path, seed=3)
    assert contents(output) == before
    checkpoint = Checkpoint.open(output)
    for name, mean, std in (
        ("embed.weight", 0, 1.0),
        ("head.weight", 0, 256**-0.5),
        ("layers.0.attention.q.weight", 0, 256**-0.5),
        ("layers.1.mlp.down.weight", 0, (24 * 4) ** -0.5),
    ):
        values = checkpoint.read(name).astype(np.float64)
        assert values.mean() == pytest.approx(mean, abs=5 * std / values.size**0.5)
        assert values.std() == pytest.approx(std, rel=0.05)
    assert checkpoint.read("final_norm.weight").astype(np.float32).mean() == pytest.approx(
        1, abs=0.01
    )
    assert convert(None, output, settings, from_config=path, seed=4).digest != first.digest


def test_random_weights_do_not_depend_on_dtype(
    tmp_path: Path, base_config: dict[str, Any], output: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(base_config))
    values = {}
    for dtype in ("float32", "bfloat16"):
        settings = ConvertSettings(dtype=dtype, overwrite=True)
        convert(None, output, settings, from_config=path)
        values[dtype] = Checkpoint.open(output).read("layers.0.mlp.up.weight")
    assert np.array_equal(values["float32"].astype(ml_dtypes.bfloat16), values["bfloat16"])


def test_random_weights_need_a_good_config(
    tmp_path: Path, output: Path, assert_nothing_left: Check
) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        convert(None, output, ConvertSettings(), from_config=tmp_path / "nothing.json")
    assert_nothing_left()
