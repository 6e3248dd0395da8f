"""What runs on machines with GPUs only, from end to end on emulated ones: benchmarks/cuda_ranks.py,
whose figures mean nothing there, and the steps that compute-sanitizer watches."""

from __future__ import annotations

import dataclasses
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_models import LIMITS, MODELS, RandomWeights, of_dtype
from emulation.build import unavailable
from emulation.device import Device, EmulatedLaunch, EmulatedMemory
from emulation.executable import emulated, emulated_gpu
from thread_comm import run_ranks

from llmforge.comm import Comm, LocalComm
from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.target import CudaTarget, engine_kernels
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

MODEL = dataclasses.replace(
    of_dtype(MODELS["wide"], "bfloat16"), num_layers=1, sliding_window=(None,)
)


class Torch:
    """torch on a machine with a GPU for each thread."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            get_device_name=lambda: "an emulated GPU",
            get_device_properties=lambda device: SimpleNamespace(uuid=threading.get_ident()),
            empty_cache=lambda: None,
            synchronize=lambda: None,
        )
        self.distributed = SimpleNamespace(all_reduce=lambda x: None)

    def __getattr__(self, name: str) -> Any:
        made = getattr(torch, name)
        if name not in ("randn", "ones", "zeros"):
            return made
        return lambda *shape, device, **options: made(*shape, **options)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks that share memory, or NCCL's part of an exchange by their `Comm`."""

    comm: Comm
    topology: Topology
    device: Any
    shared: bool = True

    def transfer(self, call: Any, x: torch.Tensor, parts: torch.Tensor) -> None:
        gathered = np.zeros((self.comm.size, x.numel()), np.int16)
        self.comm.all_gather(x.reshape(-1).view(torch.int16).numpy().copy(), gathered)
        whole = torch.from_numpy(gathered.reshape(-1)).view(x.dtype)
        parts.view(x.dtype)[: whole.numel()].copy_(whole)


def load(graph: Any, weights: Any, limits: Any, ranks: Ranks | None) -> CudaExecutable:
    comm, topology = (ranks.comm, ranks.topology) if ranks else (LocalComm(), Topology())
    return emulated(graph, weights, limits, "sm_90", comm, topology)


class Weights:
    """Any values of a rank's parameters."""

    def __init__(self, graph: Any) -> None:
        self._rng = np.random.default_rng(0)

    def read(self, parameter: Any) -> Any:
        return 0.05 * self._rng.standard_normal(parameter.shape)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path("benchmarks").absolute()), *sys.path])
    import cuda_ranks
    import cuda_speed

    def bound(self: Any, made: Any) -> EmulatedLaunch:
        module = Device().module(made.launch.kernel)
        return EmulatedLaunch(made.launch, module, self._address, self._sizes)

    def replayed(calls: Any) -> Any:
        for call in calls:
            call(0)
        return lambda: 1e-3

    replaced = {
        "torch": Torch(), "MODELS": {"tiny": MODEL}, "Ranks": Ranks, "load": load,
        "take_device": lambda comm: None, "read_bandwidth": lambda: 4e12, "replayed": replayed,
        "random_weights": Weights, "DriverMemory": EmulatedMemory, "REPEAT": 1,
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(cuda_ranks, name, value)
    monkeypatch.setattr(cuda_speed, "torch", replaced["torch"])
    monkeypatch.setattr(cuda_ranks.Sums, "_bound", bound)
    monkeypatch.setattr(CudaExecutable, "time_decode", lambda self, step, repeat: 1e-3)
    return cuda_ranks


def test_ranks_beside_one(benchmark: ModuleType) -> None:
    with emulated_gpu():
        reports = run_ranks(2, lambda comm: benchmark.measure(comm, "tiny", (1, 2), (6, 4)))
    report = reports[0]
    cases = [(case["exchange"], case["ranks"], case["batch"]) for case in report["cases"]]
    names = (("shared memory", 2), ("nccl", 2), ("none", 1))
    assert cases == [(*name, batch) for name in names for batch in (1, 2)]
    for case in report["cases"]:
        assert case["device_step_ms"] == 1.0
        assert case["tpot_over_floor"] == pytest.approx(case["tpot_ms"] / case["floor_ms"])
    whole, shared = (
        next(c["floor_ms"] for c in report["cases"] if c["ranks"] == ranks) for ranks in (1, 2)
    )
    assert shared == pytest.approx(whole / 2)
    assert [row["rows"] for row in report["all_reduce_us"]] == [1, 2] and report["gpus"] == 2
    for row in report["all_reduce_us"]:
        assert row["one shot"] == row["nccl all-reduce"] == pytest.approx(1e3 / 2)


def test_sanitized_steps(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "path", [str(Path("tests/cuda").absolute()), *sys.path])
    import sanitized_steps

    def loaded(config: Any, choice: Any) -> tuple[CudaExecutable, set[str]]:
        graph = CudaTarget().prepare(trace(config, Topology(), 0))
        names = {spec.entry for spec in engine_kernels(graph, LIMITS, "sm_90", choice).values()}
        return emulated(graph, RandomWeights(config, seed=3), LIMITS, choice=choice), names

    monkeypatch.setattr(sanitized_steps, "loaded", loaded)
    monkeypatch.setattr(sys, "argv", ["sanitized_steps.py", "few"])
    with emulated_gpu():
        sanitized_steps.main()
    kernels = capsys.readouterr().out.splitlines()[-1]
    for name in ("stream_gemm", "gemv", "rows_gemm", "wide_gemm", "decode_attention", "sample"):
        assert name in kernels
