"""Writes a model as NeMo saves it (github.com/NVIDIA/NeMo and github.com/NVIDIA/Megatron-LM; see
checkpoint/sources/nemo_weights.py for where each layout is defined): NeMo 1 and 2, every form of
the weights, archives and directories."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from parts import Parts, State
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

# Neutral name → Megatron Core's, and how ranks share it.
MCORE = {
    "attention_norm": ("self_attention.linear_qkv.layer_norm_", "same"),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_", "same"),
    "q_norm": ("self_attention.q_layernorm.", "same"),
    "k_norm": ("self_attention.k_layernorm.", "same"),
    "qkv": ("self_attention.linear_qkv.", "rows"),
    "fc1": ("mlp.linear_fc1.", "halves"),
    "up": ("mlp.linear_fc1.", "rows"),
    "o": ("self_attention.linear_proj.", "columns"),
    "down": ("mlp.linear_fc2.", "columns"),
}
LEGACY = {
    "attention_norm": ("input_layernorm.", "same"),
    "mlp_norm": ("post_attention_layernorm.", "same"),
    "qkv": ("self_attention.query_key_value.", "rows"),
    "fc1": ("mlp.dense_h_to_4h.", "halves"),
    "up": ("mlp.dense_h_to_4h.", "rows"),
    "gate": ("mlp.dense_h_to_4h.", "rows"),
    "second": ("mlp.dense_h_to_4h_2.", "rows"),
    "o": ("self_attention.dense.", "columns"),
    "down": ("mlp.dense_4h_to_h.", "columns"),
}
LOCAL = {
    **MCORE,
    "attention_norm": ("input_layernorm.", "same"),
    "mlp_norm": ("pre_mlp_layernorm.", "same"),
}
OUTER = {
    "embed": ("embedding.word_embeddings.", "rows"),
    "positions": ("embedding.position_embeddings.", "same"),
    "final_norm": ("decoder.final_layernorm.", "same"),
    "head": ("output_layer.", "rows"),
}
LEGACY_OUTER = {**OUTER, "final_norm": ("encoder.final_layernorm.", "same")}


def interleaved(layer: State, parts: Parts, x: str) -> torch.Tensor:
    """For each kv head: the q heads that read it, its k, its v."""
    q, k, v = (layer[f"{part}.{x}"] for part in "qkv")
    groups = parts.kv_heads
    return torch.cat([t.view(groups, -1, *t.shape[1:]) for t in (q, k, v)], 1).reshape(
        -1, *q.shape[1:]
    )


def merged(layer: State, parts: Parts, apart: bool) -> State:
    """With qkv, and gate and up unless `apart`, as one."""
    found = {n: t for n, t in layer.items() if n.split(".")[0] not in ("q", "k", "v")}
    for x in ("weight", "bias"):
        if f"q.{x}" in layer:
            found[f"qkv.{x}"] = interleaved(layer, parts, x)
        if f"gate.{x}" in layer:
            gate, up = found.pop(f"gate.{x}"), found.pop(f"up.{x}")
            if apart:
                found[f"gate.{x}"], found[f"second.{x}"] = gate, up
            else:
                found[f"fc1.{x}"] = torch.cat([gate, up])
    return found


def share(tensor: torch.Tensor, how: str, tp: int, rank: int) -> torch.Tensor:
    if how == "same" or (how == "columns" and tensor.ndim == 1):
        return tensor
    if how == "columns":
        return tensor.chunk(tp, 1)[rank]
    if how == "halves":
        return torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(tp)[rank]


class NemoWriter:
    """A model's tensors, named, and written in one form or another into a dict of files."""

    def __init__(
        self, parts: Parts, names: str = "mcore", padded_to: int = 1, apart: bool = False
    ) -> None:
        legacy = names == "legacy"
        table = {"mcore": MCORE, "legacy": LEGACY, "local": LOCAL}[names]
        outer = LEGACY_OUTER if legacy else OUTER
        self.prefix = "model.language_model." if legacy else "model."
        stem = "encoder.layers" if legacy else "decoder.layers"
        self.stem = f"{self.prefix}{stem}"
        self.layers: list[dict[str, tuple[torch.Tensor, str]]] = []
        for layer in parts.layers:
            named = {}
            for name, tensor in merged(layer, parts, apart).items():
                part, x = name.split(".")
                theirs, how = table[part]
                named[f"{theirs}{x}"] = (tensor, how)
            self.layers.append(named)
        self.outer = {}
        for name, tensor in parts.outer.items():
            part, x = name.split(".")
            theirs, how = outer[part]
            if part in ("embed", "head"):
                rows = -tensor.shape[0] % padded_to
                tensor = torch.cat([tensor, tensor.new_full((rows, tensor.shape[1]), 7.0)])
            self.outer[f"{self.prefix}{theirs}{x}"] = (tensor, how)

    def ranks(self, tp: int, pp: int, extra: dict[str, Any] | None = None) -> dict[str, bytes]:
        """model_weights.ckpt, in directories of ranks where there are several."""
        per_stage = -(-len(self.layers) // pp)
        files = {}
        for stage in range(pp):
            layers = self.layers[stage * per_stage : (stage + 1) * per_stage]
            for rank in range(tp):
                state: dict[str, Any] = {
                    f"{self.stem}.{index}.{name}": share(tensor, how, tp, rank).clone()
                    for index, layer in enumerate(layers)
                    for name, (tensor, how) in layer.items()
                }
                for name, (tensor, how) in self.outer.items():
                    first = "embedding" in name
                    if stage == (0 if first else pp - 1):
                        state[name] = share(tensor, how, tp, rank).clone()
                tied = not any("output_layer" in name for name in self.outer)
                if tied and pp > 1 and stage == pp - 1:
                    embedding, how = next(v for n, v in self.outer.items() if "word_embed" in n)
                    name = "model.word_embeddings.weight"
                    if "language_model" not in self.prefix:
                        name = "model.output_layer.weight"
                    state[name] = share(embedding, how, tp, rank).clone()
                state["model.rotary_pos_emb.inv_freq"] = torch.ones(3)
                state |= extra or {}
                folder = ""
                if pp > 1:
                    folder = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/"
                elif tp > 1:
                    folder = f"mp_rank_{rank:02d}/"
                files[f"{folder}model_weights.ckpt"] = saved(state)
        return files

    def chunked(
        self, tp: int, stacked: bool, singleton: bool
    ) -> dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], torch.Tensor]]]]:
        """Name → whole shape and chunks (offsets, values), as Megatron Core cuts them."""
        found: dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], torch.Tensor]]]] = {}

        def add(name: str, tensor: torch.Tensor, how: str, before: tuple[int, ...]) -> None:
            if singleton and how == "halves":
                for suffix, half in zip("wv", tensor.chunk(2), strict=True):
                    add(f"{name}_{suffix}", half, "rows", before)
                return
            shape = (len(self.layers), *tensor.shape) if before else tuple(tensor.shape)
            chunks = found.setdefault(name, (shape, []))[1]
            count = 2 * tp if how == "halves" else tp
            dim = 1 if how == "columns" and tensor.ndim == 2 else 0
            if how == "same" or (how == "columns" and tensor.ndim == 1):
                count = 1
            start = 0
            for piece in tensor.chunk(count, dim):
                offsets = tuple(start if i == dim else 0 for i in range(tensor.ndim))
                start += piece.shape[dim]
                chunks.append((before + offsets, piece[None] if before else piece))

        for index, layer in enumerate(self.layers):
            for name, (tensor, how) in layer.items():
                if stacked:
                    add(f"{self.stem}.{name}", tensor, how, (index,))
                else:
                    add(f"{self.stem}.{index}.{name}", tensor, how, ())
        for name, (tensor, how) in self.outer.items():
            add(name, tensor, how, ())
        return found

    def torch_dist(
        self, tp: int = 1, *, stacked: bool = True, singleton: bool = False
    ) -> dict[str, bytes]:
        described: dict[str, Any] = {}
        stored: dict[Any, Any] = {}
        files = {f"__{rank}_0.distcp": b"" for rank in range(tp)}
        for name, (shape, chunks) in self.chunked(tp, stacked, singleton).items():
            name = name.replace("model.", "module.", 1)
            dtype = chunks[0][1].dtype
            boxes = []
            for index, (offsets, values) in enumerate(chunks):
                file = f"__{index % tp}_0.distcp"
                blob = saved(values.clone(memory_format=torch.contiguous_format))
                stored[MetadataIndex(name, offsets, index)] = _StorageInfo(
                    file, len(files[file]), len(blob)
                )
                files[file] += blob
                boxes.append(ChunkStorageMetadata(torch.Size(offsets), values.shape))
            described[name] = TensorStorageMetadata(
                TensorProperties(dtype), torch.Size(shape), boxes
            )
        # What else there is: FP8 scales as bytes, and the optimizer.
        blob = saved(io.BytesIO(b"scales"))
        key = "module.decoder.layers.self_attention.linear_qkv._extra_state/shard_0_3"
        described[key] = BytesStorageMetadata()
        stored[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", len(files["__0_0.distcp"]), 1)
        files["__0_0.distcp"] += blob
        described["optimizer.state.exp_avg.module.x"] = TensorStorageMetadata(
            TensorProperties(torch.float32),
            torch.Size([4]),
            [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))],
        )
        metadata: Any = Metadata(described, {"planner": "data"}, stored)
        metadata.mcore_data = {"module.x": {"nd_reformulated_orig_global_shape": (3, 4)}}
        files[".metadata"] = pickle.dumps(metadata)
        files["common.pt"] = saved({"checkpoint_version": 3.0})
        files["metadata.json"] = json.dumps(
            {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        ).encode()
        return files

    def zarr(self, tp: int = 1) -> dict[str, bytes]:
        files = {"metadata.json": json.dumps({"sharded_backend": "zarr"}).encode()}
        for name, (shape, chunks) in self.chunked(tp, True, False).items():
            sizes = chunks[0][1].shape
            dtype = {torch.bfloat16: "bfloat16", torch.float16: "<f2", torch.float32: "<f4"}
            header = {
                "chunks": list(sizes),
                "compressor": None,
                "dtype": dtype[chunks[0][1].dtype],
                "fill_value": None,
                "filters": None,
                "order": "C",
                "shape": list(shape),
                "zarr_format": 2,
            }
            files[f"{name}/.zarray"] = json.dumps(header).encode()
            for offsets, values in chunks:
                if values.shape != sizes:  # the last one is stored whole
                    missing = sizes[0] - values.shape[0]
                    values = torch.cat([values, values.new_zeros(missing, *sizes[1:])])
                index = ".".join(str(o // s) for o, s in zip(offsets, sizes, strict=True))
                files[f"{name}/{index}"] = values.contiguous().view(torch.uint8).numpy().tobytes()
        files["model.decoder.layers.self_attention.linear_qkv._extra_state/shard_0_3.pt"] = b"x"
        return files


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def as_yaml(config: dict[str, Any]) -> bytes:
    return yaml.safe_dump(config).encode()


def pack(path: Path, files: dict[str, bytes], container: str, prefix: str = "./") -> Path:
    """As "directory", "tar" or "gz"."""
    if container == "directory":
        for name, data in files.items():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return path
    path = path.with_suffix(".nemo")
    with tarfile.open(path, "w:gz" if container == "gz" else "w:") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{prefix}{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def nemo1_config(parts: Parts, **fields: Any) -> dict[str, Any]:
    """Of a Llama-type model, with what `fields` change."""
    return {
        "target": "nemo.collections.nlp.models.megatron_gpt_model.MegatronGPTModel",
        "mcore_gpt": True,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "encoder_seq_length": 64,
        "max_position_embeddings": "${.encoder_seq_length}",
        "num_layers": len(parts.layers),
        "hidden_size": parts.outer["embed.weight"].shape[1],
        "ffn_hidden_size": parts.layers[0]["up.weight"].shape[0],
        "num_attention_heads": parts.heads,
        "num_query_groups": parts.kv_heads,
        "kv_channels": parts.head_dim,
        "normalization": "rmsnorm",
        "layernorm_epsilon": 1e-6,
        "bias": False,
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": "head.weight" not in parts.outer,
        "make_vocab_size_divisible_by": 1,
        "virtual_pipeline_model_parallel_size": None,
        "tokenizer": {"library": "huggingface", "type": "meta-llama/Llama", "model": None},
        "precision": "bf16",
        **fields,
    }
