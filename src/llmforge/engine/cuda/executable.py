"""A rank's engine on the GPU.

Decode steps run as one CUDA graph a batch bucket: the network and sampling. Other steps launch the
same kinds of kernels one by one. Either way kernels fetch what the host wrote for the step and
deliver what was drawn, and the host waits once. It may begin the next step before it waits: a token
that the step before draws is then read where that step leaves it on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmforge.comm import Comm
from llmforge.engine.cuda.bound import BoundHeadMatmul, BoundMatmul, BoundTransfer
from llmforge.engine.cuda.buffers import Memory, Staging
from llmforge.engine.cuda.modules import load_modules
from llmforge.engine.cuda.program import HeadMatmul, Instruction, Matmul, Program, Transfer
from llmforge.engine.cuda.ranks import Ranks, take_device
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.step_ends import deliver_launch, fetch_launch, sampling_launch
from llmforge.engine.cuda.target import WEIGHTS_FILE, programs
from llmforge.engine.cuda.weights import load_weights
from llmforge.engine.device_sampling import GREEDY, PARAMS
from llmforge.engine.step import Int32, Limits, StepBatch, StepResult
from llmforge.engine.store import read_graph
from llmforge.kernels.collectives import GROUP_SLOT, MAIL_SLOT, TENSOR_RANK
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.images import of_engine
from llmforge.kernels.launch import Launch
from llmforge.model.graph import Graph
from llmforge.parallel import Topology

Tensor = torch.Tensor
Call = Callable[[int], None]
SIZES = (
    "tokens", "sequences", "rows", "longest_query", "processors",
    TENSOR_RANK, GROUP_SLOT, MAIL_SLOT,
)  # fmt: skip
STEP_ARRAYS = (
    "token_ids", "positions", "query_starts", "kv_lens", "prompt_lens", "logit_rows",
)  # fmt: skip


class CudaExecutable:
    """One rank on one GPU."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Tensor],
        modules: Mapping[str, Module],
        arch: str,
        limits: Limits,
        ranks: Ranks,
        choice: KernelChoice = MEASURED,
    ) -> None:
        """`weights` are the graph's parameters on the current device, `modules` its kernels for
        `arch` and `choice`."""
        self.limits = limits
        self.ranks = ranks
        self.graph = graph
        self.device = torch.device("cuda", torch.cuda.current_device())
        # float32 means float32: no product may be rounded to TensorFloat-32.
        torch.backends.cuda.matmul.allow_tf32 = False
        self._modules = modules
        self._stream = torch.cuda.Stream(self.device)
        self.side_stream = torch.cuda.Stream(self.device)  # of instructions beside others
        self.sizes = Sizes(SIZES)
        properties = torch.cuda.get_device_properties(self.device)
        self.sizes.set("processors", properties.multi_processor_count)
        self._last: _Runner | None = None
        lowered = programs(graph, limits, arch, ranks.links, choice)
        shared = ranks.connect(lowered, self.sizes)
        self.memory = Memory(graph, limits, weights, lowered, self.device, shared)
        # What fills weights and memory is on the caller's stream, and may not have happened yet.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            runners = [_Runner(program, self) for program in self.memory.programs]
            self._general = [r for r in runners if not r.program.shape.decode]
            self._decodes = {
                r.program.shape.sequences: r for r in runners if r.program.shape.decode
            }
            for size in sorted(self._decodes, reverse=True):
                self._decodes[size].capture()
        self._stream.synchronize()

    @classmethod
    def open(
        cls, directory: Path, topology: Topology, limits: Limits, comm: Comm
    ) -> CudaExecutable:
        """The engine in a rank's directory. Raises StoreError where a file of it is corrupt,
        TargetError where ranks cannot reach each other."""
        device = take_device(comm)
        graph = read_graph(directory)
        modules, arch = load_modules(directory, device)
        weights = load_weights(directory / WEIGHTS_FILE, graph, device)
        ranks = Ranks(comm, topology, device)
        return cls(graph, weights, modules, arch, limits, ranks)

    def step(self, batch: StepBatch) -> StepResult:
        """Tokens where `batch` says how to sample, else logits."""
        with torch.cuda.stream(self._stream):
            staging = self._begin(batch)
            staging.done.synchronize()
            if self.ranks.rank != 0:
                return StepResult()
            rows = len(batch.logit_rows)
            if batch.sampling or not rows:
                return StepResult(tokens=staging.tokens(batch))
            return StepResult(logits=self.last_logits(rows))

    def begin(self, batch: StepBatch) -> Callable[[], Int32]:
        """See `RunsAhead`."""
        with torch.cuda.stream(self._stream):
            staging = self._begin(batch)
        return lambda: self._tokens(staging, batch)

    def _begin(self, batch: StepBatch) -> Staging:
        """Put a step on the stream."""
        runner = self._runner_of(batch)
        staging = self.memory.next_staging()
        if batch.sampling:
            self.memory.fill_sampling(staging, runner.program, batch)
        runner.run(batch, staging)
        staging.done.record()
        self._last = runner
        return staging

    def _tokens(self, staging: Staging, batch: StepBatch) -> Int32:
        """What the step drew, once it is over. Rank 0 has it."""
        if self.ranks.rank == 0:
            return staging.tokens(batch)
        staging.done.synchronize()
        return np.zeros(0, np.int32)

    def last_logits(self, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The first `rows` rows of the logits of the last step, in float32."""
        logits: np.ndarray[Any, np.dtype[np.float32]]
        assert self._last is not None, "no step has run"
        logits = self._last.outputs(rows)[0].float().cpu().numpy()
        return logits

    def run(self, batch: StepBatch, *, stop_after: int | None = None) -> dict[str, Tensor]:
        """Run a step without a CUDA graph, up to and with instruction `stop_after`, and return the
        graph's tensors which that instruction computed (None: the outputs), to find the first
        one that differs from another target's."""
        runner = self._runner_of(batch)
        with torch.cuda.stream(self._stream):
            names = runner.run_eagerly(batch, stop_after)
            rows = {"tokens": batch.num_tokens, "rows": len(batch.logit_rows)}
            copies = {name: runner.tensor(name, rows).clone() for name in names}
            # The caller reads them on another stream, which does not wait for this one.
            self._stream.synchronize()
            return copies

    def time_decode(self, batch: StepBatch, repeat: int) -> float:
        """Seconds of device time that a decode step of this batch takes: the median of `repeat`."""
        graph = self._runner_of(batch).graph
        assert graph is not None, "only decode steps are graphs"
        times: list[float] = []
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # both areas that the graph fetches from hold this step
                self._begin(batch)
            for _ in range(repeat):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.memory.next_staging()  # as it was filled
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / 1e3)
        return sorted(times)[repeat // 2]

    def instructions(self, batch: StepBatch) -> tuple[Instruction, ...]:
        """What `run` would execute for this batch."""
        return self._runner_of(batch).program.instructions

    def close(self) -> None:
        self._stream.synchronize()
        # Their graphs hold on to NCCL's communicators.
        self._decodes.clear()
        self._last = None
        self.ranks.close()
        del self._general, self.memory, self._modules
        torch.cuda.empty_cache()

    def _runner_of(self, batch: StepBatch) -> _Runner:
        count = batch.num_sequences
        every_row = np.arange(count, dtype=np.int32)
        if batch.num_tokens == count and np.array_equal(batch.logit_rows, every_row):
            sizes = [size for size in self._decodes if size >= count]
            if sizes:
                return self._decodes[min(sizes)]
        fitting = [r for r in self._general if r.program.shape.tokens >= batch.num_tokens]
        return min(fitting, key=lambda runner: runner.program.shape.tokens)

    # -- what runners need ------------------------------------------------------------------------

    def bind(self, instruction: Instruction, program: Program, *, overlap: bool = True) -> Call:
        """The instruction as a function of a stream. overlap: its kernel, if it is one of ours, may
        start while the one before still runs."""
        call = instruction.call
        if isinstance(call, Matmul):
            return BoundMatmul(call, self.memory, program, self.sizes)
        if isinstance(call, HeadMatmul):
            return BoundHeadMatmul(call, self.memory, program, self.sizes)
        if isinstance(call, Transfer):
            return BoundTransfer(call, self.memory, program, self.sizes, self.ranks)
        return self.bind_launch(call, program, overlap=overlap)

    def bind_launch(self, launch: Launch, program: Program, *, overlap: bool = True) -> Call:
        able = torch.cuda.get_device_capability(self.device)[0] >= 9
        return BoundLaunch(
            launch,
            of_engine(self._modules, launch.kernel),
            lambda name: self.memory.address(program, name),
            self.sizes,
            overlap=overlap and able,
        )


class _Runner:
    """A program bound to memory."""

    def __init__(self, program: Program, owner: CudaExecutable) -> None:
        self.program = program
        self._memory = owner.memory
        self._sizes = owner.sizes
        self._fetch = owner.bind_launch(fetch_launch(program), program)
        self._side = owner.side_stream
        self._beside, self._joins = program.beside, program.joins
        # The first start once the step's arrays are there, and so do all behind them.
        begin = {*range(self._beside + 1), self._joins}
        self._calls = [
            owner.bind(instruction, program, overlap=index not in begin)
            for index, instruction in enumerate(program.instructions)
        ]
        ends = program.sharing
        if owner.ranks.rank == 0:  # it draws, whoever computes the logits
            deliver = deliver_launch(owner.limits.max_batch_size)
            ends = (sampling_launch(program), *program.sharing, deliver)
        self._draw = [owner.bind(Instruction(call, ()), program) for call in ends]
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, batch: StepBatch, staging: Staging) -> None:
        """Compute the step and draw its tokens."""
        self._write(batch, staging)
        if self.graph is None:
            self._launch_all()
        else:
            self.graph.replay()

    def run_eagerly(self, batch: StepBatch, stop_after: int | None) -> tuple[str, ...]:
        """Compute the step up to an instruction; the names of what it computed."""
        self._write(batch, self._memory.next_staging())
        self._launch_all(stop_after)
        if stop_after is None:
            return self.program.outputs
        return self.program.instructions[stop_after].tensors

    def capture(self) -> None:
        """Record a decode step as a CUDA graph."""
        nothing = np.zeros(0, np.int32)
        no_table = nothing.reshape(0, 0)
        empty = StepBatch(nothing, nothing, nothing, nothing, no_table, nothing, nothing)
        self._write(empty, self._memory.next_staging())
        self._launch_all()  # once before: libraries make their handles and workspaces now
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._launch_all()
        self.graph = graph

    def outputs(self, rows: int) -> list[Tensor]:
        """The graph's outputs of the last step."""
        return [self.tensor(name, {"rows": rows, "tokens": rows}) for name in self.program.outputs]

    def tensor(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """A graph tensor, while its memory is still its own."""
        operand = self.program.operands[name]
        first = operand.shape[0]
        return self._memory.view(
            self.program, operand, sizes.get(first) if isinstance(first, str) else None
        )

    def _launch_all(self, stop_after: int | None = None) -> None:
        main = torch.cuda.current_stream()
        stream = main.cuda_stream
        self._fetch(stream)
        calls = self._calls if stop_after is None else self._calls[: stop_after + 1]
        if self._beside:
            self._side.wait_stream(main)
            for call in calls[: self._beside]:
                call(self._side.cuda_stream)
            for call in calls[self._beside : self._joins]:
                call(stream)
            main.wait_stream(self._side)
        for call in calls[self._joins :]:
            call(stream)
        if stop_after is None and self._sizes.get("rows"):
            for call in self._draw:
                call(stream)

    def _write(self, batch: StepBatch, staging: Staging) -> None:
        """Fill the step's arrays and set its sizes."""
        if self.program.shape.decode:
            self._fill_decode(batch, staging)
        else:
            self._fill(batch, staging)

    def _fill(self, batch: StepBatch, staging: Staging) -> None:
        for name in STEP_ARRAYS:
            values = getattr(batch, name)
            staging.array(self.program, name)[: len(values)] = values
        count, width = batch.block_table.shape
        self._table(staging)[:count, :width] = batch.block_table
        if not batch.sampling:
            staging.array(self.program, "sampling", PARAMS)[:] = GREEDY
        self._sizes.set("tokens", batch.num_tokens)
        self._sizes.set("sequences", count)
        self._sizes.set("rows", len(batch.logit_rows))
        self._sizes.set("longest_query", int(np.diff(batch.query_starts).max(initial=0)))

    def _fill_decode(self, batch: StepBatch, staging: Staging) -> None:
        """As `_fill`, and the rest of the bucket with sequences of one token in the spare block."""
        program = self.program
        size, count = program.shape.sequences, batch.num_sequences
        for name, fill in (("token_ids", 0), ("positions", 0), ("kv_lens", 1), ("prompt_lens", 1)):
            target = staging.array(program, name)
            target[:count] = getattr(batch, name)
            target[count:] = fill
        staging.array(program, "query_starts")[:] = np.arange(size + 1)
        staging.array(program, "logit_rows")[:] = np.arange(size)
        table, width = self._table(staging), batch.block_table.shape[1]
        table[:count, :width] = batch.block_table
        table[count:, 0] = self._memory.limits.num_blocks
        if count < size or not batch.sampling:
            first = count if batch.sampling else 0
            staging.array(program, "sampling", PARAMS)[first:] = GREEDY
        self._sizes.set("tokens", size)
        self._sizes.set("sequences", size)
        self._sizes.set("rows", size)
        self._sizes.set("longest_query", 1)

    def _table(self, staging: Staging) -> Any:
        """The step's block tables, a row for each sequence."""
        array = staging.array(self.program, "block_table")
        return array.reshape(-1, self.program.layout.table_stride)
