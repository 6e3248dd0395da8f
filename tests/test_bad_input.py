"""Bad input, from the command line: one line that says what is wrong, a non-zero status, and
nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmforge.cli.errors import guard
from llmforge.cli.main import cli

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
Q_NAME = "model.layers.0.self_attn.q_proj.weight"


def llmforge(*arguments: object) -> int:
    words = [str(argument) for argument in arguments]
    return guard(lambda: cli.main(words, prog_name="llmforge", standalone_mode=False))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model (`hf`), its checkpoint, and engines of one and two ranks."""
    directory = tmp_path_factory.mktemp("made")
    hf = directory / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(CONFIG))
    sizes = {
        "model.embed_tokens.weight": (61, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (61, 32),
    }
    for layer in range(2):
        for name, shape in {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (48, 32),
            "mlp.up_proj": (48, 32),
            "mlp.down_proj": (32, 48),
        }.items():
            sizes[f"model.layers.{layer}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    half = len(tensors) // 2
    shards = {
        "model-00001-of-00002.safetensors": dict(list(tensors.items())[:half]),
        "model-00002-of-00002.safetensors": dict(list(tensors.items())[half:]),
    }
    weight_map = {name: file for file, part in shards.items() for name in part}
    for file, part in shards.items():
        save_file(part, hf / file)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert llmforge("convert", hf, "-o", directory / "checkpoint") == 0
    for ranks in (1, 2):
        output = directory / f"engine{ranks}"
        arguments = ("--tensor-parallel", ranks, "--max-seq-len", 32, "--max-batch-size", 2)
        assert llmforge("build", directory / "checkpoint", "-o", output, *arguments) == 0
    return directory


@dataclass(frozen=True)
class World:
    """A case's own copy of what `made` has, and where it may write."""

    hf: Path
    checkpoint: Path
    engine1: Path
    engine2: Path
    out: Path

    def edit_config(self, **values: object) -> None:
        config = json.loads((self.hf / "config.json").read_text())
        (self.hf / "config.json").write_text(json.dumps({**config, **values}))

    def edit_index(self, name: str, file: str) -> None:
        path = self.hf / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][name] = file
        path.write_text(json.dumps(index))

    def edit_shard(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Rewrite the shard that holds `Q_NAME`."""
        index = json.loads((self.hf / "model.safetensors.index.json").read_text())
        path = self.hf / index["weight_map"][Q_NAME]
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
        index["weight_map"].update(dict.fromkeys(tensors, path.name))
        gone = [n for n, f in index["weight_map"].items() if f == path.name and n not in tensors]
        for name in gone:
            del index["weight_map"][name]
        (self.hf / "model.safetensors.index.json").write_text(json.dumps(index))

    def edit_manifest(self, path: Path, **values: object) -> None:
        data = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**data, **values}))

    def convert(self, *more: object) -> list[object]:
        return ["convert", self.hf, "-o", self.out, *more]

    def build(self, *more: object) -> list[object]:
        return ["build", self.checkpoint, "-o", self.out, *more]

    def run(self, prompts: str, *more: object) -> list[object]:
        path = self.hf.parent / "prompts.jsonl"
        path.write_text(prompts)
        return ["run", self.engine1, "--prompts", path, *more]


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


Case = Callable[[World], list[object]]
CASES: dict[str, tuple[Case, str]] = {}


def case(expected: str) -> Callable[[Case], Case]:
    """Registers a case: what it does to its world, the command it gives, and words of the line."""

    def register(function: Case) -> Case:
        CASES[function.__name__] = (function, expected)
        return function

    return register


# -- convert -------------------------------------------------------------------------------------


@case("nowhere")
def source_is_missing(w: World) -> list[object]:
    return ["convert", w.hf.parent / "nowhere", "-o", w.out]


@case("config.json")
def source_has_no_config(w: World) -> list[object]:
    (w.hf / "config.json").unlink()
    return w.convert()


@case("config.json")
def config_is_not_json(w: World) -> list[object]:
    (w.hf / "config.json").write_text("{")
    return w.convert()


@case("hidden_size")
def config_field_has_the_wrong_type(w: World) -> list[object]:
    w.edit_config(hidden_size="many")
    return w.convert()


@case("LlamaForCausalLM, ")
def unsupported_architecture_lists_the_supported(w: World) -> list[object]:
    w.edit_config(architectures=["MambaForCausalLM"], model_type="mamba")
    return w.convert()


@case("gptq")
def quantized_source(w: World) -> list[object]:
    w.edit_config(quantization_config={"quant_method": "gptq", "bits": 4})
    return w.convert()


@case("su-rope")
def unknown_rope_scaling(w: World) -> list[object]:
    w.edit_config(rope_scaling={"rope_type": "su-rope", "factor": 2.0})
    return w.convert()


@case("truncated")
def truncated_safetensors(w: World) -> list[object]:
    truncate(w.hf / "model-00002-of-00002.safetensors", 2000)
    return w.convert()


@case("truncated")
def empty_safetensors(w: World) -> list[object]:
    truncate(w.hf / "model-00001-of-00002.safetensors", 0)
    return w.convert()


@case("git lfs pull")
def git_lfs_pointer(w: World) -> list[object]:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n"
    (w.hf / "model-00001-of-00002.safetensors").write_text(pointer)
    return w.convert()


@case("model-00009")
def index_names_a_missing_file(w: World) -> list[object]:
    w.edit_index(Q_NAME, "model-00009-of-00002.safetensors")
    return w.convert()


@case("../secret")
def index_leaves_the_directory(w: World) -> list[object]:
    w.edit_index(Q_NAME, "../secret.safetensors")
    return w.convert()


@case(Q_NAME)
def missing_tensor(w: World) -> list[object]:
    w.edit_shard(lambda tensors: tensors.pop(Q_NAME))
    return w.convert()


@case("model.layers.0.surprise")
def extra_tensor(w: World) -> list[object]:
    w.edit_shard(lambda tensors: tensors.update({"model.layers.0.surprise": torch.ones(3)}))
    return w.convert()


@case("[32, 33]")
def wrong_shape(w: World) -> list[object]:
    w.edit_shard(lambda tensors: tensors.update({Q_NAME: torch.ones(32, 33)}))
    return w.convert()


@case("int")
def integer_weights(w: World) -> list[object]:
    w.edit_shard(lambda tensors: tensors.update({Q_NAME: torch.ones(32, 32, dtype=torch.int8)}))
    return w.convert()


@case("float64")
def dtype_that_is_not_offered(w: World) -> list[object]:
    return w.convert("--dtype", "float64")


@case("not a directory")
def output_below_a_file(w: World) -> list[object]:
    (w.out.parent / "file").write_text("")
    return ["convert", w.hf, "-o", w.out.parent / "file" / "checkpoint"]


@case("something else")
def output_holds_something_else_even_with_overwrite(w: World) -> list[object]:
    w.out.mkdir()
    (w.out / "thesis.txt").write_text("mine")
    return w.convert("--overwrite")


@case("--overwrite")
def output_exists(w: World) -> list[object]:
    return ["convert", w.hf, "-o", w.checkpoint]


# -- build ---------------------------------------------------------------------------------------


@case("llmforge convert")
def build_from_a_model_that_was_not_converted(w: World) -> list[object]:
    return ["build", w.hf, "-o", w.out]


@case("corrupt")
def corrupt_checkpoint_manifest(w: World) -> list[object]:
    (w.checkpoint / "manifest.yaml").write_text("kind: [")
    return w.build()


@case("format")
def checkpoint_of_a_newer_format(w: World) -> list[object]:
    w.edit_manifest(w.checkpoint / "manifest.yaml", format_version=99)
    return w.build()


@case("model-00001")
def truncated_checkpoint(w: World) -> list[object]:
    truncate(w.checkpoint / "model-00001-of-00001.safetensors", 5000)
    return w.build()


@case("allowed: 1, 2, 4")
def tensor_parallel_does_not_divide(w: World) -> list[object]:
    return w.build("--tensor-parallel", 3)


@case("2 layers")
def more_stages_than_layers(w: World) -> list[object]:
    return w.build("--pipeline-parallel", 3)


@case("limit of")
def memory_limit(w: World) -> list[object]:
    return w.build("--memory-limit-gb", "0.00001")


@case("max_batch_size")
def step_smaller_than_the_batch(w: World) -> list[object]:
    return w.build("--max-num-tokens", 4, "--max-batch-size", 8)


@case("kv_cache_tokens")
def cache_smaller_than_a_sequence(w: World) -> list[object]:
    return w.build("--kv-cache-tokens", 8)


@case("block_size")
def odd_block_size(w: World) -> list[object]:
    return w.build("--block-size", 24)


@case("option --arch; it is for cuda")
def option_of_another_target(w: World) -> list[object]:
    return w.build("--arch", "sm_89")


@case("architecture 'sm_7'")
def unknown_architecture(w: World) -> list[object]:
    return w.build("--target", "cuda", "--arch", "sm_90,sm_7")


@case("allowed")
def unknown_target(w: World) -> list[object]:
    return w.build("--target", "abacus")


# -- run -----------------------------------------------------------------------------------------


@case("llmforge build")
def run_a_checkpoint(w: World) -> list[object]:
    return ["run", w.checkpoint, "--prompt", "x"]


@case("format")
def engine_of_a_newer_format(w: World) -> list[object]:
    w.edit_manifest(w.engine1 / "engine.yaml", format_version=2)
    return w.run('{"token_ids": [1]}')


@case("engine.yaml is corrupt (memory is None); build the engine again")
def engine_with_a_field_of_the_wrong_kind(w: World) -> list[object]:
    w.edit_manifest(w.engine1 / "engine.yaml", memory=None)
    return ["inspect", w.engine1]


@case("engine.yaml is corrupt (the manifest's model config is not valid")
def engine_with_a_bad_config(w: World) -> list[object]:
    w.edit_manifest(w.engine1 / "engine.yaml", config={"family": "llama"})
    return w.run('{"token_ids": [1]}')


@case("files beside its own, which would be lost: thesis.txt")
def output_holds_files_of_others(w: World) -> list[object]:
    (w.checkpoint / "thesis.txt").write_text("mine")
    return ["convert", w.hf, "-o", w.checkpoint, "--overwrite"]


@case("corrupt")
def engine_with_a_corrupt_graph(w: World) -> list[object]:
    size = (w.engine1 / "rank0/graph.json").stat().st_size
    (w.engine1 / "rank0/graph.json").write_text("x" * size)
    return w.run('{"token_ids": [1]}')


@case("does not hold the weights")
def engine_with_weights_of_another(w: World) -> list[object]:
    shutil.copy(w.engine2 / "rank0/weights.safetensors", w.engine1 / "rank0/weights.safetensors")
    return w.run('{"token_ids": [1]}')


@case("max_seq_len")
def prompt_longer_than_max_seq_len(w: World) -> list[object]:
    return w.run(json.dumps({"token_ids": [1] * 32}))


@case("empty")
def empty_prompt(w: World) -> list[object]:
    return w.run('{"token_ids": []}')


@case("vocabulary")
def token_outside_of_the_vocabulary(w: World) -> list[object]:
    return w.run('{"token_ids": [61]}')


@case("tokenizer")
def text_without_a_tokenizer(w: World) -> list[object]:
    return w.run('{"prompt": "hello"}')


@case("temperature")
def unknown_request_field_names_the_nearest(w: World) -> list[object]:
    return w.run('{"token_ids": [1], "temprature": 1}')


@case("line 2")
def prompts_that_are_not_json(w: World) -> list[object]:
    return w.run('{"token_ids": [1]}\n{"token_ids": ')


@case("cannot read prompts")
def missing_prompts_file(w: World) -> list[object]:
    return ["run", w.engine1, "--prompts", w.out.parent / "none.jsonl"]


@case("no prompt")
def no_prompt(w: World) -> list[object]:
    return ["run", w.engine1]


@case("mpirun -n 2")
def wrong_number_of_ranks(w: World) -> list[object]:
    return ["run", w.engine2, "--prompts", w.run('{"token_ids": [1]}')[3]]


@case("max_seq_len")
def bench_longer_than_the_engine(w: World) -> list[object]:
    return ["bench", w.engine1, "--input-len", 30, "--output-len", 30]


# -- verify, inspect, YAML -----------------------------------------------------------------------


@case("model-00001")
def a_changed_byte_is_found(w: World) -> list[object]:
    flip_byte(w.checkpoint / "model-00001-of-00001.safetensors")
    return ["verify", w.checkpoint]


@case("nowhere is not a directory: --against takes the directory of the original model")
def compared_with_nothing(w: World) -> list[object]:
    return ["verify", w.engine1, "--against", w.out.parent / "nowhere"]


@case("has no config.json: --against takes")
def compared_with_a_checkpoint(w: World) -> list[object]:
    return ["verify", w.checkpoint, "--against", w.checkpoint]


@case("rank1/weights.safetensors")
def a_changed_byte_of_an_engine_is_found(w: World) -> list[object]:
    flip_byte(w.engine2 / "rank1/weights.safetensors")
    return ["verify", w.engine2]


@case("--rank must be from 0 to 1")
def graph_of_a_rank_that_is_not_there(w: World) -> list[object]:
    return ["inspect", w.engine2, "--graph", "--rank", 5]


@case("tensor_parallel")
def unknown_yaml_key_names_the_nearest(w: World) -> list[object]:
    path = w.out.parent / "c.yaml"
    path.write_text("build:\n  tensor_paralel: 2\n")
    return ["build", "-c", path]


@case("whole number")
def yaml_value_of_the_wrong_type(w: World) -> list[object]:
    path = w.out.parent / "c.yaml"
    path.write_text("build:\n  tensor_parallel: two\n")
    return ["build", "-c", path]


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare, expected = CASES[name]
    for part in made.iterdir():
        shutil.copytree(part, tmp_path / part.name)
    (tmp_path / "outputs").mkdir()
    directories = (tmp_path / n for n in ("hf", "checkpoint", "engine1", "engine2"))
    world = World(*directories, out=tmp_path / "outputs" / "result")
    if name == "wrong_number_of_ranks":  # as mpirun would say it, without starting it
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    arguments = prepare(world)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    code = llmforge(*arguments)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code in (1, 2)
    assert len(errors) == 1 and "internal" not in err and "Traceback" not in err, err
    assert errors[0] == err.splitlines()[-1] and expected in errors[0], err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
    if arguments[0] in ("run", "bench"):
        assert out == ""


def test_there_are_at_least_25_cases() -> None:
    assert len(CASES) >= 25


def test_nan_weights_are_a_warning(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path / "hf", tmp_path, tmp_path, tmp_path, tmp_path / "checkpoint")
    shutil.copytree(made / "hf", world.hf)
    world.edit_shard(lambda tensors: tensors[Q_NAME].__setitem__((3, 4), np.nan))
    assert llmforge(*world.convert()) == 0
    err = capsys.readouterr().err
    assert "warning: NaN or infinite values" in err and "layers.0.attention.q.weight" in err
