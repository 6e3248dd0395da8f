"""Our safetensors reader and writer against the reference implementation."""

from __future__ import annotations

import json
import math
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from llmforge.safetensors_io import NUMPY_DTYPES, SafetensorsFile, SafetensorsWriter

SHAPES = {"a": (7, 5), "b": (3,), "scalar": (), "none": (0, 4), "deep": (2, 3, 4, 5)}


def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    return (np.arange(count) - count // 2).astype(NUMPY_DTYPES[dtype]).reshape(shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int8", "bool"])
def test_the_reference_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [(n, dtype, s) for n, s in SHAPES.items()], {"k": "v"}) as writer:
        for name, shape in SHAPES.items():
            writer.write(name, values(dtype, shape))
        size, digest = writer.close()
    raw = path.read_bytes()
    assert (size, digest) == (len(raw), xxhash.xxh3_128(raw).hexdigest())
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0
    loaded = load_file(path)
    for name, shape in SHAPES.items():
        assert str(loaded[name].dtype) == f"torch.{dtype}"
        expected = values(dtype, shape)
        assert np.array_equal(loaded[name].to(torch.float64).numpy(), expected.astype(np.float64))
    assert SafetensorsFile(path).metadata == {"k": "v"}


def test_we_read_what_the_reference_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {n: torch.randn(s).to(torch.bfloat16) for n, s in SHAPES.items()}
    tensors["f8"] = torch.ones(3).to(torch.float8_e4m3fn)
    save_file(tensors, path)
    file = SafetensorsFile(path)
    for name, tensor in tensors.items():
        array = file.read(name)
        assert array.flags.c_contiguous and array.flags.writeable
        assert array.shape == tuple(tensor.shape)
        assert np.array_equal(array.astype(np.float32), tensor.float().numpy())
    assert file.tensors["f8"].dtype == "float8_e4m3"
    assert file.read("a").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_slices(tmp_path: Path, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmforge import safetensors_io

    monkeypatch.setattr(safetensors_io, "_ROW_CHUNK", 100)
    monkeypatch.setattr(safetensors_io, "_READ_CHUNK", 64)
    path = tmp_path / "x.safetensors"
    whole = torch.arange(6 * 5 * 4 * 3, dtype=torch.float32).reshape(6, 5, 4, 3)
    save_file({"x": whole}, path)
    file = SafetensorsFile(path)
    size = whole.shape[dim]
    for start in range(size + 1):
        for stop in range(start, size + 1):
            part = file.read("x", dim, start, stop)
            assert part.flags.c_contiguous
            assert np.array_equal(part, whole.narrow(dim, start, stop - start).numpy())
    assert np.array_equal(file.read("x", dim, 1), whole.narrow(dim, 1, size - 1).numpy())
    for rows in ((0, 6), (2, 3), (1, 5), (4, 4)):
        part = file.read("x", rows=rows)
        assert np.array_equal(part, whole[slice(*rows)].numpy())
        if dim:
            part = file.read("x", dim, 1, 2, rows)
            assert np.array_equal(part, whole[slice(*rows)].narrow(dim, 1, 1).numpy())


def test_a_column_slice_needs_little_more_than_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(4096, 4096)}, path)
    file = SafetensorsFile(path)
    tracemalloc.start()
    try:
        part = file.read("x", 1, 0, 512)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < part.nbytes + (10 << 20)


def test_threads_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {str(i): torch.full((1000,), float(i)) for i in range(32)}
    save_file(tensors, path)
    file = SafetensorsFile(path)
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(n for n in tensors for _ in range(20) if not (file.read(n) == float(n)).all())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_parts_of_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data = np.arange(100, dtype=np.float32)
    released: list[int] = []
    with SafetensorsWriter(path, [("x", "float32", (10, 10))]) as writer:
        for piece in (data[:33], data[33:34], data[34:]):
            writer.write_piece("x", piece, lambda: released.append(1))
        writer.close()
    assert np.array_equal(load_file(path)["x"].numpy(), data.reshape(10, 10))
    assert len(released) == 3


def test_names_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    names = ['with "quotes"', "ünïcode", "new\nline", ""]
    with SafetensorsWriter(path, [(name, "int8", (1,)) for name in names]) as writer:
        for name in names:
            writer.write(name, np.ones(1, np.int8))
        writer.close()
    assert list(SafetensorsFile(path).tensors) == names
    header = path.read_bytes()[8:].split(b"\x01")[0]
    assert list(json.loads(header)) == names
