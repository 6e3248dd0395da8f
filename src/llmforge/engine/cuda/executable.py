"""A rank's engine on the GPU.

Decode steps run as one CUDA graph a batch bucket: the upload of the step's arrays, the network,
sampling, and the download of the tokens. Other steps launch the same kinds of kernels one by one.
Either way the host waits once a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmforge.engine.cuda.lowering import MAX_SPLITS
from llmforge.engine.cuda.program import Instruction, Matmul, Program
from llmforge.engine.cuda.sampling import PARAMS, fill_params, sampling_launch
from llmforge.engine.cuda.target import (
    GRAPH_FILE,
    KERNELS,
    PLAN_FILE,
    PTX_ARCH,
    WEIGHTS_FILE,
    image_name,
    programs,
)
from llmforge.engine.cuda.weights import load_weights
from llmforge.engine.memory import largest_step
from llmforge.engine.step import Limits, StepBatch, StepResult
from llmforge.errors import RequestError, StoreError
from llmforge.kernels.compile import arch_number
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.launch import (
    Launch,
    Operand,
    split_scratch_sizes,
    stream_plan,
    stream_scratch_floats,
)
from llmforge.model.graph import Graph
from llmforge.model.reference import DTYPES

Tensor = torch.Tensor
Call = Callable[[int], None]
SIZES = ("tokens", "sequences", "rows", "longest_query", "processors")
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
    ) -> None:
        """`weights` are the graph's parameters on the current device, `modules` its kernels for
        `arch`."""
        self.limits = limits
        self.graph = graph
        self.device = torch.device("cuda", torch.cuda.current_device())
        # float32 means float32: no product may be rounded to TensorFloat-32.
        torch.backends.cuda.matmul.allow_tf32 = False
        self._modules = modules
        self._stream = torch.cuda.Stream(self.device)
        self.sizes = Sizes(SIZES)
        properties = torch.cuda.get_device_properties(self.device)
        self.sizes.set("processors", properties.multi_processor_count)
        self._last: _Runner
        self.memory = _Memory(graph, limits, weights, programs(graph, limits, arch), self.device)
        with torch.cuda.stream(self._stream):
            self._general, *decodes = (_Runner(program, self) for program in self.memory.programs)
            self._decodes = {runner.program.shape.sequences: runner for runner in decodes}
            for size in sorted(self._decodes, reverse=True):
                self._decodes[size].capture()
        self._stream.synchronize()

    @classmethod
    def open(cls, directory: Path, limits: Limits) -> CudaExecutable:
        """The engine in a rank's directory. Raises StoreError where a file of it is corrupt."""
        device = torch.device("cuda", torch.cuda.current_device())
        graph = _read_graph(directory / GRAPH_FILE)
        modules, arch = _load_modules(directory, device)
        weights = load_weights(directory / WEIGHTS_FILE, graph, device)
        return cls(graph, weights, modules, arch, limits)

    def step(self, batch: StepBatch) -> StepResult:
        """Tokens where `batch` says how to sample, else logits."""
        runner = self._runner_of(batch)
        with torch.cuda.stream(self._stream):
            if batch.sampling:
                self.memory.fill_sampling(runner.program, batch)
            runner.run(batch)
            self._stream.synchronize()
            self._last = runner
            rows = len(batch.logit_rows)
            if batch.sampling or not rows:
                return StepResult(tokens=self.memory.tokens(batch))
            return StepResult(logits=self.last_logits(rows))

    def last_logits(self, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The first `rows` rows of the logits of the last step, in float32."""
        logits: np.ndarray[Any, np.dtype[np.float32]]
        logits = self._last.outputs(rows)[0].float().cpu().numpy()
        return logits

    def run(self, batch: StepBatch, *, stop_after: int | None = None) -> dict[str, Tensor]:
        """Run a step without a CUDA graph, up to and with instruction `stop_after`, and return the
        graph's tensors which that instruction computed (None: the outputs), to find the first
        one that differs from another target's."""
        runner = self._runner_of(batch)
        with torch.cuda.stream(self._stream):
            names = runner.run_eagerly(batch, stop_after)
            self._stream.synchronize()
            rows = {"tokens": batch.num_tokens, "rows": len(batch.logit_rows)}
            return {name: runner.tensor(name, rows).clone() for name in names}

    def time_decode(self, batch: StepBatch, repeat: int) -> float:
        """Seconds of device time that a decode step takes: the median of `repeat`."""
        graph = self._runner_of(batch).graph
        assert graph is not None, "only decode steps are graphs"
        times = []
        with torch.cuda.stream(self._stream):
            for _ in range(repeat):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
        self._decodes.clear()
        del self._general, self.memory, self._modules
        torch.cuda.empty_cache()

    def _runner_of(self, batch: StepBatch) -> _Runner:
        count = batch.num_sequences
        is_decode = batch.num_tokens == count == len(batch.logit_rows)
        if is_decode and np.array_equal(batch.logit_rows, np.arange(count, dtype=np.int32)):
            sizes = [size for size in self._decodes if size >= count]
            if sizes:
                return self._decodes[min(sizes)]
        return self._general

    # -- what runners need ------------------------------------------------------------------------

    def bind(self, instruction: Instruction, program: Program) -> Call:
        """The instruction as a function of a stream."""
        call = instruction.call
        if isinstance(call, Matmul):
            return _BoundMatmul(call, self.memory, program, self.sizes)
        return self.bind_launch(call, program)

    def bind_launch(self, launch: Launch, program: Program) -> Call:
        overlap = torch.cuda.get_device_capability(self.device)[0] >= 9
        return BoundLaunch(
            launch,
            self._modules[launch.kernel.key],
            lambda name: self.memory.address(program, name),
            self.sizes,
            overlap=overlap,
        )


class _Memory:
    """Every buffer, at an address that does not change."""

    def __init__(
        self,
        graph: Graph,
        limits: Limits,
        weights: Mapping[str, Tensor],
        all_programs: list[Program],
        device: torch.device,
    ) -> None:
        self.programs = all_programs
        self.limits = limits
        sizes = largest_step(limits)
        sizes["blocks"] += 1
        self.tensors: dict[str, Tensor] = dict(weights)
        for state in graph.states:
            shape = [sizes[d] if isinstance(d, str) else d for d in state.shape]
            # Zeros, so that a block that was never written holds no NaN.
            self.tensors[state.name] = torch.zeros(
                shape, dtype=DTYPES[state.dtype], device=device
            )
        for program in all_programs:
            for name, values in program.constants.items():
                self.tensors[name] = torch.tensor(values, dtype=torch.float32, device=device)
        batch = limits.max_batch_size
        partial, counters = _split_scratch(graph, all_programs)
        vocab = max(p.operands[p.outputs[0]].features for p in all_programs)
        shapes = {
            "scratch.partial": (partial, torch.float32),
            "scratch.counters": (counters, torch.int32),
            "scratch.sums": (_stream_scratch(graph), torch.float32),
            # One a group of blocks that share a product; there is at most one block a processor.
            "scratch.arrived": (1024, torch.int32),
            "sample.tokens": (2 * batch, torch.int32),
            "sample.history": (batch * limits.max_seq_len, torch.int32),
            "sample.seen": (batch * -(-vocab // 32), torch.int32),
        }
        for name, (count, dtype) in shapes.items():
            self.tensors[name] = torch.zeros(max(count, 1), dtype=dtype, device=device)
        # The largest logits lie behind the tokens: one copy brings both.
        self.tensors["sample.largest"] = self.tensors["sample.tokens"][batch:].view(torch.float32)
        self.arena = torch.zeros(
            max(p.arena_bytes for p in all_programs), dtype=torch.uint8, device=device
        )
        most = max(p.layout.nbytes for p in all_programs)
        self.step_host = torch.zeros(most, dtype=torch.uint8, pin_memory=True)
        self.step_device = torch.zeros(most, dtype=torch.uint8, device=device)
        self.drawn_host = torch.zeros(2 * batch, dtype=torch.int32, pin_memory=True)
        self._step = self.step_host.numpy()
        self._drawn = self.drawn_host.numpy()
        self._history_host = torch.zeros(batch * limits.max_seq_len, dtype=torch.int32)

    def address(self, program: Program, name: str) -> int:
        if name.startswith("arena."):
            return self.arena.data_ptr() + program.arena[name]
        if name.startswith("step."):
            field = program.layout.fields[name.removeprefix("step.")]
            return self.step_device.data_ptr() + field.offset
        return self.tensors[name].data_ptr()

    def view(self, program: Program, operand: Operand, rows: int | None = None) -> Tensor:
        """The operand as a tensor; `rows` of it where its first dimension is symbolic."""
        shape = [d if isinstance(d, int) else rows or 0 for d in operand.shape]
        dtype = DTYPES[operand.dtype]
        if operand.buffer.startswith("arena."):
            start = program.arena[operand.buffer] + operand.offset * dtype.itemsize
            base = self.arena[start:].view(-1)[: (len(self.arena) - start) // 16 * 16].view(dtype)
            strides = [operand.row_stride, 1] if len(shape) == 2 else [1]
            return base.as_strided(shape, strides)
        return self.tensors[operand.buffer]

    def host(self, program: Program, name: str, dtype: Any = np.int32) -> Any:
        """The host's side of an array of the step."""
        field = program.layout.fields[name]
        itemsize = np.dtype(dtype).itemsize
        return self._step[field.offset : field.offset + field.count * itemsize].view(dtype)

    def fill_sampling(self, program: Program, batch: StepBatch) -> None:
        """Write how to sample each row, and upload the histories where any row needs one."""
        rows = self.host(program, "sampling", PARAMS)[: len(batch.sampling)]
        used = fill_params(rows, batch.sampling, self._history_host.numpy())
        if used:
            self.tensors["sample.history"][:used].copy_(self._history_host[:used])

    def tokens(self, batch: StepBatch) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The tokens drawn. Raises RequestError where a row had no finite largest logit."""
        count = len(batch.logit_rows)
        largest = self._drawn[self.limits.max_batch_size :].view(np.float32)[:count]
        if not np.isfinite(largest).all():
            row = int(np.flatnonzero(~np.isfinite(largest))[0])
            raise RequestError(
                f"the largest logit of the token at position {batch.sampling[row].position} is "
                f"{largest[row]}, so no token can be drawn; the weights or the engine's precision "
                "are unfit (look for NaN weights with: llmforge verify; build with a wider dtype)"
            )
        tokens: np.ndarray[Any, np.dtype[np.int32]] = self._drawn[:count].copy()
        return tokens


class _Runner:
    """A program bound to memory."""

    def __init__(self, program: Program, owner: CudaExecutable) -> None:
        self.program = program
        self._memory = owner.memory
        self._sizes = owner.sizes
        self._calls = [owner.bind(i, program) for i in program.instructions]
        self._sample = owner.bind_launch(sampling_launch(program), program)
        self.graph: torch.cuda.CUDAGraph | None = None
        layout = program.layout
        self._host = self._memory.step_host[: layout.nbytes]
        self._device = self._memory.step_device[: layout.nbytes]
        self._table = self._memory.host(program, "block_table").reshape(-1, layout.table_stride)

    def run(self, batch: StepBatch) -> None:
        """Compute the step and draw its tokens."""
        if self.graph is None:
            self._fill(batch)
            self._launch_all()
            return
        self._fill_decode(batch)
        self.graph.replay()

    def run_eagerly(self, batch: StepBatch, stop_after: int | None) -> tuple[str, ...]:
        """Compute the step up to an instruction; the names of what it computed."""
        (self._fill if self.graph is None else self._fill_decode)(batch)
        self._launch_all(stop_after)
        if stop_after is None:
            return self.program.outputs
        return self.program.instructions[stop_after].tensors

    def capture(self) -> None:
        """Record a decode step as a CUDA graph."""
        nothing = np.zeros(0, np.int32)
        no_table = nothing.reshape(0, 0)
        empty = StepBatch(nothing, nothing, nothing, nothing, no_table, nothing, nothing)
        self._fill_decode(empty)
        fill_params(self._memory.host(self.program, "sampling", PARAMS), (), nothing)
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
        stream = torch.cuda.current_stream().cuda_stream
        self._device.copy_(self._host, non_blocking=True)
        for call in self._calls if stop_after is None else self._calls[: stop_after + 1]:
            call(stream)
        if stop_after is None and self._sizes.get("rows"):
            self._sample(stream)
            drawn = self._memory.tensors["sample.tokens"]
            self._memory.drawn_host.copy_(drawn, non_blocking=True)

    def _fill(self, batch: StepBatch) -> None:
        host = self._memory.host
        for name in STEP_ARRAYS:
            values = getattr(batch, name)
            host(self.program, name)[: len(values)] = values
        count, width = batch.block_table.shape
        self._table[:count, :width] = batch.block_table
        if not batch.sampling:
            fill_params(host(self.program, "sampling", PARAMS), (), np.zeros(0, np.int32))
        self._sizes.set("tokens", batch.num_tokens)
        self._sizes.set("sequences", count)
        self._sizes.set("rows", len(batch.logit_rows))
        self._sizes.set("longest_query", int(np.diff(batch.query_starts).max(initial=0)))

    def _fill_decode(self, batch: StepBatch) -> None:
        """As `_fill`, and the rest of the bucket with sequences of one token in the spare block."""
        host, program = self._memory.host, self.program
        size, count = program.shape.sequences, batch.num_sequences
        for name, fill in (("token_ids", 0), ("positions", 0), ("kv_lens", 1), ("prompt_lens", 1)):
            target = host(program, name)
            target[:count] = getattr(batch, name)
            target[count:] = fill
        host(program, "query_starts")[:] = np.arange(size + 1)
        host(program, "logit_rows")[:] = np.arange(size)
        width = batch.block_table.shape[1]
        self._table[:count, :width] = batch.block_table
        self._table[count:, 0] = self._memory.limits.num_blocks
        if count < size or not batch.sampling:
            first = count if batch.sampling else 0
            host(program, "sampling", PARAMS)[first:] = PARAMS_OFF
        self._sizes.set("tokens", size)
        self._sizes.set("sequences", size)
        self._sizes.set("rows", size)
        self._sizes.set("longest_query", 1)


PARAMS_OFF = np.zeros((), PARAMS)
PARAMS_OFF["top_p"] = PARAMS_OFF["repetition_penalty"] = 1


class _BoundMatmul:
    """A product by torch (cuBLASLt), on views of the buffers."""

    def __init__(self, call: Matmul, memory: _Memory, program: Program, sizes: Sizes) -> None:
        rows = program.shape.tokens if call.x.shape[0] == "tokens" else program.shape.sequences
        self._rows = str(call.x.shape[0])
        self._sizes = sizes
        self._x = memory.view(program, call.x, rows)
        self._out = memory.view(program, call.out, rows)
        self._weight = memory.view(program, call.weight).t()
        self._bias = memory.view(program, call.bias) if call.bias else None

    def __call__(self, stream: int) -> None:
        rows = self._sizes.get(self._rows)
        if not rows:
            return
        x, out = self._x[:rows], self._out[:rows]
        if self._bias is None:
            torch.mm(x, self._weight, out=out)
        else:
            torch.addmm(self._bias, x, self._weight, out=out)


def _split_scratch(graph: Graph, all_programs: list[Program]) -> tuple[int, int]:
    """Elements of the scratch that split attention needs, for the largest of the programs."""
    partial = counters = 1
    for node in graph.nodes:
        if node.op != "attention":
            continue
        features = graph.tensors[node.inputs[0]].shape[-1]
        assert isinstance(features, int)
        head_dim = node.attrs["head_dim"]
        for program in all_programs:
            sizes = split_scratch_sizes(
                program.shape.sequences, features // head_dim, head_dim, MAX_SPLITS
            )
            partial, counters = max(partial, sizes[0]), max(counters, sizes[1])
    return partial, counters


def _stream_scratch(graph: Graph) -> int:
    """Elements of the scratch for products that several blocks share."""
    most = 1
    for node in graph.nodes:
        if node.op == "linear":
            weight = graph.tensors[node.inputs[1]]
            features, k = weight.shape
            assert isinstance(features, int) and isinstance(k, int)
            plan = stream_plan(weight.dtype, k)
            if plan and plan.split > 1:
                most = max(most, stream_scratch_floats(features, plan.split))
    return most


def _read_graph(path: Path) -> Graph:
    try:
        return Graph.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is corrupt ({error}); build the engine again with: llmforge build"
        ) from error


def _load_modules(directory: Path, device: torch.device) -> tuple[dict[str, Module], str]:
    """The engine's kernels for this GPU, by key, and the architecture that they are for."""
    torch.zeros(1, device=device)  # makes the context that modules are loaded into
    try:
        kernels = json.loads((directory / PLAN_FILE).read_text())["kernels"]
        arch = best_arch(list(kernels), torch.cuda.get_device_capability(device))
        images = directory / KERNELS
        return {
            key: Module((images / image_name(key, arch)).read_bytes(), entry)
            for key, entry in kernels[arch].items()
        }, arch
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{directory / PLAN_FILE} or a kernel beside it is corrupt ({error}); "
            "build the engine again with: llmforge build"
        ) from error


def best_arch(archs: Sequence[str], capability: tuple[int, int]) -> str:
    """Of an engine's architectures, the best for a GPU of this capability: cubins run on GPUs of
    the same major and the same or a later minor version; PTX on any later one."""
    major, minor = capability
    fitting = [
        arch
        for arch in archs
        if arch.startswith("sm_")
        and arch_number(arch) // 10 == major
        and (arch_number(arch) % 10 == minor or (arch_number(arch) % 10 < minor and arch[-1] != "a"))
    ]
    return max(fitting, key=lambda arch: (arch_number(arch), arch)) if fitting else PTX_ARCH
