"""convert's time and peak memory by the layout that it reads, at several sizes.

Writes the same random model (bfloat16, Llama shapes of an 8B model, as many layers as make the
size) in the Hugging Face layout, as a TensorRT-LLM checkpoint of two ranks, and as a NeMo 2 torch
distributed checkpoint, and converts each in a process of its own. The weights must come out the
same, bit for bit. Sources are read from the disk, not from the page cache.

    python benchmarks/convert_sources.py --scratch /big/disk
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from convert import CONFIG, GB, LAYER_BYTES, OUTER_BYTES, machine, run, versions, write_model

RANKS = 2
HEADS, KV_HEADS = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]


def _parameters(directory: Path, layers: int) -> Any:
    """A function that gives the model's parameters, as `write_model` writes them, by our names."""
    from llmforge.checkpoint.sources.random import RandomSource

    path = directory / "shape.json"
    path.write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return RandomSource(path)


def write_huggingface(directory: Path, layers: int) -> None:
    write_model(directory, layers)


def write_trtllm(directory: Path, layers: int) -> None:
    """Two ranks; each row-parallel weight is cut by columns, q, k and v are merged a rank."""
    import numpy as np

    from llmforge.safetensors_io import SafetensorsWriter

    directory.mkdir()
    source = _parameters(directory, layers)

    def tensors(rank: int) -> Iterator[tuple[str, Any]]:
        def part(name: str, axis: int = 0) -> Any:
            return np.split(source.read(name), RANKS, axis)[rank]

        yield "transformer.vocab_embedding.weight", source.read("embed.weight")
        for i in range(layers):
            ours, theirs = f"layers.{i}.", f"transformer.layers.{i}."
            qkv = [part(f"{ours}attention.{x}.weight") for x in "qkv"]
            yield f"{theirs}input_layernorm.weight", source.read(f"{ours}attention_norm.weight")
            yield f"{theirs}attention.qkv.weight", np.concatenate(qkv)
            yield f"{theirs}attention.dense.weight", part(f"{ours}attention.o.weight", 1)
            yield f"{theirs}post_layernorm.weight", source.read(f"{ours}mlp_norm.weight")
            yield f"{theirs}mlp.fc.weight", part(f"{ours}mlp.gate.weight")
            yield f"{theirs}mlp.gate.weight", part(f"{ours}mlp.up.weight")
            yield f"{theirs}mlp.proj.weight", part(f"{ours}mlp.down.weight", 1)
        yield "transformer.ln_f.weight", source.read("final_norm.weight")
        yield "lm_head.weight", part("head.weight")

    shapes = _shapes_of_ranks(layers)
    for rank in range(RANKS):
        entries = [(name, "bfloat16", shape) for name, shape in shapes.items()]
        path = directory / f"rank{rank}.safetensors"
        with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
            for name, array in tensors(rank):
                writer.write(name, np.ascontiguousarray(array))
            writer.close()
    config = {
        **{key: value for key, value in CONFIG.items() if type(value) is int},
        "architecture": "LlamaForCausalLM",
        "num_hidden_layers": layers,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "mapping": {"tp_size": RANKS, "pp_size": 1},
    }
    (directory / "config.json").write_text(json.dumps(config))


def _shapes_of_ranks(layers: int) -> dict[str, tuple[int, ...]]:
    hidden, size = CONFIG["hidden_size"], CONFIG["intermediate_size"] // RANKS
    vocabulary = CONFIG["vocab_size"]
    qkv = hidden * (HEADS + 2 * KV_HEADS) // HEADS // RANKS
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.vocab_embedding.weight": (vocabulary, hidden)
    }
    for i in range(layers):
        prefix = f"transformer.layers.{i}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}attention.qkv.weight": (qkv, hidden),
            f"{prefix}attention.dense.weight": (hidden, hidden // RANKS),
            f"{prefix}post_layernorm.weight": (hidden,),
            f"{prefix}mlp.fc.weight": (size, hidden),
            f"{prefix}mlp.gate.weight": (size, hidden),
            f"{prefix}mlp.proj.weight": (hidden, size),
        }
    shapes["transformer.ln_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary // RANKS, hidden)
    return shapes


def write_nemo(directory: Path, layers: int) -> None:
    """weights/ with layers stacked, a chunk a layer and, of gate and up, half; context/."""
    import numpy as np
    import torch
    import yaml
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    (directory / "weights").mkdir(parents=True)
    (directory / "context").mkdir()
    source = _parameters(directory, layers)
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    file_name = "__0_0.distcp"

    def add(file: Any, name: str, whole: tuple[int, ...], offsets: list[int], array: Any) -> None:
        name = f"module.{name}"
        bits = np.ascontiguousarray(array).view(np.uint8)
        tensor = torch.from_numpy(bits).view(torch.bfloat16).view(array.shape)
        start = file.tell()
        torch.save(tensor, file)
        stored[MetadataIndex(name, offsets)] = _StorageInfo(file_name, start, file.tell() - start)
        entry = described.setdefault(
            name,
            TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(whole), []),
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(array.shape)))

    def stack(file: Any, i: int, name: str, array: Any, row: int = 0, rows: int = 0) -> None:
        whole = (layers, rows or array.shape[0], *array.shape[1:])
        offsets = [i, row, *(0 for _ in array.shape[1:])]
        add(file, f"decoder.layers.{name}", whole, offsets, array[None])

    with open(directory / "weights" / file_name, "wb") as file:
        for ours, theirs in (
            ("embed", "embedding.word_embeddings"),
            ("final_norm", "decoder.final_layernorm"),
            ("head", "output_layer"),
        ):
            array = source.read(f"{ours}.weight")
            add(file, f"{theirs}.weight", array.shape, [0] * array.ndim, array)
        for i in range(layers):
            ours = f"layers.{i}."
            q, k, v = (source.read(f"{ours}attention.{x}.weight") for x in "qkv")
            groups = [x.reshape(KV_HEADS, -1, x.shape[1]) for x in (q, k, v)]
            qkv = np.concatenate(groups, 1).reshape(-1, q.shape[1])
            stack(file, i, "self_attention.linear_qkv.weight", qkv)
            for theirs, name in (
                ("self_attention.linear_qkv.layer_norm_weight", "attention_norm"),
                ("mlp.linear_fc1.layer_norm_weight", "mlp_norm"),
                ("self_attention.linear_proj.weight", "attention.o"),
                ("mlp.linear_fc2.weight", "mlp.down"),
            ):
                stack(file, i, theirs, source.read(f"{ours}{name}.weight"))
            for half, name in enumerate(("mlp.gate", "mlp.up")):
                array = source.read(f"{ours}{name}.weight")
                rows = array.shape[0]
                stack(file, i, "mlp.linear_fc1.weight", array, half * rows, 2 * rows)
    (directory / "weights/.metadata").write_bytes(pickle.dumps(Metadata(described, None, stored)))
    config = {
        "num_layers": layers,
        "hidden_size": CONFIG["hidden_size"],
        "ffn_hidden_size": CONFIG["intermediate_size"],
        "num_attention_heads": HEADS,
        "num_query_groups": KV_HEADS,
        "vocab_size": CONFIG["vocab_size"],
        "seq_length": 2048,
        "normalization": "RMSNorm",
        "activation_func": "torch.nn.functional.silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    (directory / "context/model.yaml").write_text(yaml.safe_dump({"config": config}))


LAYOUTS: dict[str, Callable[[Path, int], None]] = {
    "huggingface": write_huggingface,
    "tensorrt-llm": write_trtllm,
    "nemo": write_nemo,
}


def measure(layout: str, layers: int, scratch: Path) -> dict[str, Any]:
    """Write the model, convert it, and remove both."""
    import yaml

    with tempfile.TemporaryDirectory(dir=scratch, prefix="llmforge-bench-") as directory:
        model, output = Path(directory) / "model", Path(directory) / "output"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(LAYOUTS[layout], (model, layers))
        os.sync()
        files = [path for path in model.rglob("*") if path.is_file()]
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        command = [sys.executable, "-m", "llmforge", "convert", str(model), "-o", str(output)]
        seconds, rss = run(command)
        manifest = yaml.safe_load((output / "manifest.yaml").read_text())
        weights = {n: f for n, f in manifest["files"].items() if n.endswith(".safetensors")}
        return {
            "layout": layout,
            "layers": layers,
            "source_gb": round(sum(path.stat().st_size for path in files) / GB, 3),
            "checkpoint_gb": round(sum(f["size"] for f in weights.values()) / GB, 3),
            "seconds": round(seconds, 1),
            "peak_rss_gb": round(rss / GB, 3),
            "weights": weights,
        }


@click.command()
@click.option("--size-gb", type=float, multiple=True, default=(1.0, 4.0), show_default=True)
@click.option("--layout", type=click.Choice(list(LAYOUTS)), multiple=True, default=list(LAYOUTS))
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path(tempfile.gettempdir()),
    help="Directory on the disk to measure; needs twice the largest size.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).parent / "results" / "convert_sources.json",
)
def main(size_gb: tuple[float, ...], layout: tuple[str, ...], scratch: Path, output: Path) -> None:
    """Measure and write the report as JSON."""
    runs = []
    for size in size_gb:
        layers = max(1, round((size * GB - OUTER_BYTES) / LAYER_BYTES))
        same = None
        for name in layout:
            free = shutil.disk_usage(scratch).free
            if free < 2.1 * size * GB:
                raise click.ClickException(f"{scratch} has {free / GB:.0f} GB free: too little")
            found = measure(name, layers, scratch)
            weights = found.pop("weights")
            if weights != (same := same or weights):
                raise click.ClickException(f"{name} at {size} GB gives other weights")
            click.echo(json.dumps(found), err=True)
            runs.append({**found, "load_average_after": round(os.getloadavg()[0], 2)})
    result = {"machine": machine(), "versions": versions(), "runs": runs}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(f"written: {output}")


if __name__ == "__main__":
    main()
