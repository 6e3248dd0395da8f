"""`llmforge verify --ops` on an emulated GPU: a right engine, and one with a kernel that is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_models import MODELS, RandomWeights
from emulation.build import unavailable
from emulation.executable import emulated, emulated_gpu

from llmforge.cli import errors
from llmforge.cli.main import cli
from llmforge.engine.cuda import checking
from llmforge.engine.cuda.target import CudaTarget
from llmforge.engine.step import Limits
from llmforge.engine.store import Engine
from llmforge.model.decoder import trace
from llmforge.parallel import Topology
from llmforge.runtime import loading

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

LIMITS = Limits(max_batch_size=2, max_seq_len=40, max_num_tokens=60, block_size=16, num_blocks=6)
MODEL = Path(__file__).parents[2] / "examples" / "drama-3m"
Capture = pytest.CaptureFixture[str]


def llmforge(*arguments: str) -> int:
    return errors.guard(lambda: cli.main(list(arguments), "llmforge", standalone_mode=False))


@pytest.fixture
def executable() -> Iterator[Any]:
    config = MODELS["llama"]
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    with emulated_gpu():
        yield emulated(graph, RandomWeights(config, seed=2), LIMITS)


@pytest.fixture
def engine(tmp_path: Path, executable: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine's directory; what is loaded from it is the executable."""
    assert llmforge("convert", str(MODEL), "-o", str(tmp_path / "c")) == 0
    assert llmforge("build", str(tmp_path / "c"), "-o", str(tmp_path / "e")) == 0
    found = Engine.open(tmp_path / "e")
    stands_in = SimpleNamespace(
        target="cuda", topology=Topology(), manifest=found.manifest, config=MODELS["llama"]
    )
    monkeypatch.setattr(Engine, "open", lambda path: stands_in)
    monkeypatch.setattr(loading, "load_executable", lambda engine, comm: executable)
    monkeypatch.setattr(executable, "close", lambda: None)
    return tmp_path / "e"


def break_instruction(executable: Any, index: int, value: float) -> str:
    """Let an instruction of decode steps of two sequences leave something else; its kernel."""
    runner = executable._decodes[2]
    instruction, right = runner.program.instructions[index], runner._calls[index]

    def wrong(stream: int) -> None:
        right(stream)
        runner.tensor(instruction.tensors[0], {"tokens": 2, "rows": 2})[1] *= value

    runner._calls[index] = wrong
    return str(instruction.call.kernel.entry)


def test_a_right_engine_passes(engine: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert llmforge("verify", str(engine), "--ops") == 0
    *_, prompts, one, two = capsys.readouterr().out.splitlines()
    assert prompts.startswith("prompts of ") and " instructions agree; nearest" in prompts
    assert one.startswith("decode of 1: ") and two.startswith("decode of 2: ")


def test_the_first_wrong_instruction_is_named(
    engine: Path, executable: Any, capsys: Capture
) -> None:
    index = 7
    kernel = break_instruction(executable, index, 1.01)
    capsys.readouterr()
    assert llmforge("verify", str(engine), "--ops") == 1
    error = capsys.readouterr().err
    assert f"error: decode of 2: instruction {index} ({kernel}: " in error
    assert llmforge("verify", str(engine), "--ops", "--stop-after", str(index - 1)) == 0
    assert f"  instruction {index - 1} (" in capsys.readouterr().out
    assert llmforge("verify", str(engine), "--ops", "--json") == 1
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert steps[-1]["step"] == "decode of 2"
    assert [check["passed"] for check in steps[-1]["checks"]][-2:] == [True, False]


def test_the_executable_is_closed_where_a_check_raises(
    engine: Path, executable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    closed: list[bool] = []
    monkeypatch.setattr(executable, "close", lambda: closed.append(True))
    monkeypatch.setattr(checking, "check_instructions", out_of_memory)
    assert llmforge("verify", str(engine), "--ops") == 1
    assert closed == [True]


def test_nan_is_wrong(engine: Path, executable: Any, capsys: Capture) -> None:
    break_instruction(executable, 4, math.nan)
    capsys.readouterr()
    assert llmforge("verify", str(engine), "--ops", "--json") == 1
    assert json.loads(capsys.readouterr().out)["steps"][-1]["checks"][-1]["error"] is None


def test_errors_do_not_add_up_and_one_row_is_enough(executable: Any) -> None:
    """An instruction is judged by what those before it gave; and by each row for itself."""
    break_instruction(executable, 5, 1.01)
    (batch,) = (
        batch for name, batch in checking.steps_to_check(executable, 300) if name == "decode of 2"
    )
    checks = list(checking.check_instructions(executable, batch))
    assert [check.index for check in checks if not check.passed] == [5]


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        Limits(5, 9, 7, 16, 3),
        Limits(64, 4096, 8192, 32, 70),
        Limits(1, 1, 1, 16, 1),
    ],
    ids=str,
)
def test_steps_keep_to_the_limits(limits: Limits) -> None:
    ran: list[Any] = []
    stands_in: Any = SimpleNamespace(limits=limits, step=ran.append)
    ran += [batch for _, batch in checking.steps_to_check(stands_in, 300)]
    for batch in ran:
        assert 0 < batch.num_tokens <= limits.max_num_tokens
        assert batch.num_sequences <= limits.max_batch_size
        assert batch.kv_lens.max() <= limits.max_seq_len
        assert batch.block_table.max() < limits.num_blocks
        assert len(set(batch.block_table.flat)) == batch.block_table.size
        assert (batch.kv_lens <= batch.block_table.shape[1] * limits.block_size).all()


def test_what_it_does_not_check(tmp_path: Path, capsys: Capture) -> None:
    assert llmforge("convert", str(MODEL), "-o", str(tmp_path / "c")) == 0
    assert llmforge("verify", str(tmp_path / "c"), "--ops") == 1
    assert "is a checkpoint; build it with --target cuda" in capsys.readouterr().err
    assert llmforge("build", str(tmp_path / "c"), "-o", str(tmp_path / "e")) == 0
    assert llmforge("verify", str(tmp_path / "e"), "--ops") == 1
    assert "is for the target cpu and 1 rank" in capsys.readouterr().err
    assert llmforge("verify", str(tmp_path / "e"), "--stop-after", "3") == 2
    assert "give --ops with it" in capsys.readouterr().err
    assert llmforge("verify", str(tmp_path / "e"), "--ops", "--against", str(MODEL)) == 2
    assert "give one at a time" in capsys.readouterr().err
