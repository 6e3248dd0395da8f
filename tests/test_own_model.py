"""A model of the user's own: the example in examples/own_model, and what can go wrong with it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from thread_comm import run_ranks

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.store import Checkpoint
from llmforge.cli import errors
from llmforge.cli.main import cli
from llmforge.comm import Comm, LocalComm
from llmforge.engine.build import build
from llmforge.engine.step import StepBatch
from llmforge.engine.store import Engine
from llmforge.engine.target import target
from llmforge.errors import DefinitionError, SourceError
from llmforge.model.definition import load_definition, load_pass
from llmforge.runtime.generate import follow, generate
from llmforge.runtime.requests import Request
from llmforge.settings import BuildSettings, ConvertSettings

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_model"
DEFINITION = EXAMPLE / "parallax.py"
PASS = f"{EXAMPLE / 'passes.py'}:cap_logits"
TORCH = runpy.run_path(str(EXAMPLE / "plain_torch.py"))
WEIGHTS = TORCH["random_weights"](TORCH["CONFIG"])
PROMPTS = ([7], [1, 2, 3, 4, 5], list(range(20, 43)))

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    TORCH["save"](directory / "weights", TORCH["CONFIG"], WEIGHTS)
    own = load_definition(DEFINITION)
    convert(str(directory / "weights"), directory / "checkpoint", ConvertSettings(), own=own)
    return directory / "checkpoint"


def plain_logits(tokens: list[int]) -> torch.Tensor:
    result: torch.Tensor = TORCH["logits"](TORCH["CONFIG"], WEIGHTS, tokens)
    return result


def greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain_logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def generated(engine_directory: Path) -> list[list[int]]:
    engine = Engine.open(engine_directory)

    def rank(comm: Comm) -> list[list[int]]:
        executable = target("cpu").load(
            engine.rank_directory(comm.rank), engine.topology, engine.limits, comm
        )
        if comm.rank != 0:
            follow(executable, comm)
            return []
        requests = [Request(i, tuple(p), max_new_tokens=9) for i, p in enumerate(PROMPTS)]
        done = generate(executable, comm, requests, vocab_size=engine.config.vocab_size)
        return [list(completion.token_ids) for completion in done]

    return run_ranks(engine.topology.world_size, rank)[0]


# Four ranks hold copies of two kv heads, and padding of the vocabulary.
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_every_layout_gives_the_tokens_of_plain_torch(
    checkpoint: Path, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    settings = BuildSettings(
        tensor_parallel=tensor, pipeline_parallel=pipeline, max_num_tokens=16, block_size=4
    )
    build(checkpoint, tmp_path / "engine", settings, definition=load_definition(DEFINITION))
    assert generated(tmp_path / "engine") == [greedy(prompt, 9) for prompt in PROMPTS]


def llmforge(*arguments: str) -> int:
    return errors.guard(lambda: cli.main(list(arguments), "llmforge", standalone_mode=False))


def test_the_commands_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """docs/model_definition.md: convert, build with a pass, look at the graph, run."""
    monkeypatch.chdir(tmp_path)
    TORCH["save"](tmp_path / "weights", TORCH["CONFIG"], WEIGHTS)
    Path("own.yaml").write_text(
        f"model: {{source: weights, definition: {DEFINITION}}}\nworkdir: work\n"
        f"build: {{passes: ['{PASS}']}}\n"
    )
    assert llmforge("convert", "-c", "own.yaml") == 0
    assert llmforge("build", "-c", "own.yaml", "--target", "cpu", "--tensor-parallel", "1") == 0
    assert "soft_cap" not in capsys.readouterr().out
    assert llmforge("inspect", "work/engine", "--graph") == 0
    assert "soft_cap" in capsys.readouterr().out
    graph = ("inspect", "work/checkpoint", "--graph", "--json", "--definition", str(DEFINITION))
    for passes, expected in (((), 0), (("--pass", PASS), 1)):
        assert llmforge(*graph, *passes) == 0
        nodes = json.loads(capsys.readouterr().out)["nodes"]
        assert [node["op"] for node in nodes].count("soft_cap") == expected
    assert llmforge("inspect", "work/checkpoint") == 0
    out = capsys.readouterr().out
    assert "15 parameters" in out and "settings.block_scales" in out
    Path("p.jsonl").write_text('{"token_ids": [1, 2, 3, 4, 5], "max_new_tokens": 4}\n')
    # The engine needs neither definition nor pass.
    assert llmforge("run", "work/engine", "--prompts", "p.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == greedy([1, 2, 3, 4, 5], 4)
    origin = Engine.open(tmp_path / "work/engine").manifest.data["created_from"]
    assert origin["definition"] == load_definition(DEFINITION).origin
    assert origin["passes"] == {"passes.py:cap_logits": load_pass(PASS).digest}


def test_random_weights(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TORCH["CONFIG"]))
    random = ("--from-config", str(tmp_path / "config.json"), "--random-weights")
    own = ("--definition", str(DEFINITION))
    assert llmforge("convert", *random, *own, "-o", str(tmp_path / "c")) == 0
    assert Checkpoint.open(tmp_path / "c").read("blocks.1.norm.weight").mean() > 0.9


def test_it_builds_for_cuda_without_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    settings = BuildSettings(target="cuda", arch=("sm_90",))
    build(checkpoint, tmp_path / "engine", settings, definition=load_definition(DEFINITION))
    assert list((tmp_path / "engine/rank0/kernels").glob("*.sm_90.cubin"))


def test_it_builds_for_tensorrt(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    settings = BuildSettings(target="tensorrt-rtx", passes=(PASS,), max_batch_size=1)
    build(checkpoint, tmp_path / "engine", settings, definition=load_definition(DEFINITION))
    assert "soft_cap" in (tmp_path / "engine/rank0/graph.json").read_text()
    assert list((tmp_path / "engine/rank0").glob("*.engine"))


def test_a_pass_changes_what_the_engine_computes(checkpoint: Path, tmp_path: Path) -> None:
    definition = load_definition(DEFINITION)
    settings = BuildSettings(passes=(PASS,))
    build(checkpoint, tmp_path / "engine", settings, definition=definition)
    engine = Engine.open(tmp_path / "engine")
    executable = target("cpu").load(
        engine.rank_directory(0), engine.topology, engine.limits, LocalComm()
    )
    tokens = [1, 2, 3, 4, 5, 6]
    got = executable.step(one_sequence(tokens)).logits
    assert got is not None
    expected = 4.0 * torch.tanh(plain_logits(tokens) / 4.0)
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-5)


def one_sequence(tokens: list[int]) -> StepBatch:
    """A step of these tokens of a sequence, the logits of all of which are wanted."""
    count = len(tokens)
    return StepBatch(
        token_ids=np.array(tokens, np.int32),
        positions=np.arange(count, dtype=np.int32),
        query_starts=np.array([0, count], np.int32),
        kv_lens=np.array([count], np.int32),
        block_table=np.zeros((1, 1), np.int32),
        prompt_lens=np.array([count], np.int32),
        logit_rows=np.arange(count, dtype=np.int32),
    )


# -- what can go wrong -----------------------------------------------------------------------------


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = DEFINITION.read_text()
    assert old in text
    path = tmp_path / "changed.py"
    path.write_text(text.replace(old, new))
    return path


def test_build_without_the_definition_names_it(checkpoint: Path, tmp_path: Path) -> None:
    digest = load_definition(DEFINITION).digest
    with pytest.raises(DefinitionError, match=rf"parallax.py \({digest}\): give that file with"):
        build(checkpoint, tmp_path / "engine", BuildSettings())
    assert not (tmp_path / "engine").exists()


def test_a_definition_that_has_changed_is_told(checkpoint: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    path = changed(tmp_path, '"it is not a weight"', '"no weight"')
    definition = load_definition(path)
    build(checkpoint, tmp_path / "e", BuildSettings(), definition=definition, warn=warnings.append)
    assert len(warnings) == 1 and "has changed since the model was converted" in warnings[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mlp_width", "mlp", "the field mlp is missing"),
        ('rename("h{i}.w_mix"', 'rename("h{i}.w_mixed"', r"missing tensors \(3\): h0.w_mixed"),
        (
            '    rename("gain", "norm.weight"),\n',
            "",
            "rules and its list of parameters do not agree",
        ),
        ("arrays[0].T]", "arrays[0].Q]", r"changed.py, line \d+: AttributeError: .*'Q'"),
        ("arrays[0].T]", "arrays[0]]", r"give blocks.0.fused.weight the shape \[64, 224\]"),
        ('"ParallaxForCausalLM",', '"OtherForCausalLM",', "supported: OtherForCausalLM"),
        ("norm_eps=fields", "no_eps=fields", r"changed.py, line \d+: TypeError: .*no_eps"),
        ('blocks.{i}.down.weight", (', 'blocks.{i}.mix.weight", (', "lists blocks.0.mix.weight, "),
        ("DEFINITION =", "OTHER =", "it must set DEFINITION"),
        ("def trace(", "def trace((", r"changed.py, line \d+: SyntaxError"),
    ],
)
def test_mistakes_are_told_by_convert(
    checkpoint: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = changed(tmp_path, old, new)
    with pytest.raises((DefinitionError, SourceError), match=message):
        convert(
            str(checkpoint.with_name("weights")),
            tmp_path / "c",
            ConvertSettings(),
            own=load_definition(path),
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(q_size, kv_size, kv_size, mlp_size)", "(q_size, kv_size, mlp_size)", "line .*: split"),
        ("(hidden, mlp), cut(1, mlp)", "(hidden, mlp)", "lists other parameters than when"),
        ("return g.finish(", "return g.graph([x]) or (", "must be the logits .rows, 101., not"),
        ("g.scale(both,", "g.scale(both if g.tensor_rank else g.all_reduce(both),", "do not meet"),
        ("return g.send_hidden(x)", "return g.graph([])", "rank 0: its output must be the logits"),
        ('g.weight("norm.weight")', "g.parameter('n', (64,), 'float32')", "no parameters for: n"),
        (
            'g.weight("logits.weight")',
            "g.parameter('logits.weight', (101, 64), 'float32')",
            r"shape \[101, 64\]; this rank's share of it is \[51, 64\]",
        ),
        ("both = g.total(", "return 3\n    both = g.total(", "AttributeError"),
    ],
)
def test_mistakes_are_told_by_build(
    checkpoint: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    definition = load_definition(changed(tmp_path, old, new))
    settings = BuildSettings(tensor_parallel=2, pipeline_parallel=1 + ("send" in old))
    with pytest.raises(DefinitionError, match=message):
        build(checkpoint, tmp_path / "engine", settings, definition=definition)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*own_pass.py: No such file"),
        ("x = 1\n", "has no function f to use as a pass"),
        ("def f(graph):\n    return 1 / 0\n", "own_pass.py, line 2: ZeroDivisionError"),
        ("def f(graph):\n    return None\n", "gives NoneType for a Graph"),
        (
            "def f(graph):\n    return graph.with_nodes(list(graph.nodes[:-1]))\n",
            "the graph of rank 0: the outputs .* are never computed",
        ),
    ],
)
def test_mistakes_in_a_pass(
    checkpoint: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "own_pass.py"
    if text is not None:
        path.write_text(text)
    settings = BuildSettings(passes=(f"{path}:f",))
    with pytest.raises(DefinitionError, match=message):
        build(checkpoint, tmp_path / "e", settings, definition=load_definition(DEFINITION))
    with pytest.raises(DefinitionError, match=r"named as FILE\.py:FUNCTION, not 'f'"):
        load_pass("f")


def test_a_file_is_executed_only_where_it_is_named(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    TORCH["save"](weights, TORCH["CONFIG"], WEIGHTS)
    for name in ("definition.py", "parallax.py", "modeling_parallax.py"):
        (weights / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    convert(str(weights), tmp_path / "c", ConvertSettings(), own=load_definition(DEFINITION))
    with pytest.raises(SourceError, match="the architecture ParallaxForCausalLM is not supported"):
        convert(str(weights), tmp_path / "d", ConvertSettings())
    assert not (tmp_path / "executed").exists()
