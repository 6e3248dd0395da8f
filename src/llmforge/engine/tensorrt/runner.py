"""`Runner`: calls of one kind, bound to memory: the engines in their order, what stands between
them, the write into the caches, and sampling. Everything is asked of the device at once, without
waiting for it; decode runners have that recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.device_sampling import fill_params, history_ints
from llmforge.engine.step import Float32, Int32, SampleRow, SamplingParams
from llmforge.engine.tensorrt.calls import Call
from llmforge.engine.tensorrt.device import Bytes
from llmforge.engine.tensorrt.device import Call as Action
from llmforge.engine.tensorrt.io import (
    DECODE,
    LOGIT_ROWS,
    PAST_LENS,
    POSITIONS,
    PREFILL,
    PROMPT_LENS,
    STEP_SHAPES,
    TOKEN_IDS,
    engine_shape,
    weight_input,
)
from llmforge.engine.tensorrt.kernels import (
    DRAWN,
    FIRST_SLOT,
    HISTORY,
    NEW_TOKENS,
    ROWS,
    SAMPLING,
    SEQUENCES,
    TOKENS,
    cache_launches,
    exchange,
    largest,
    sample_launch,
)
from llmforge.engine.tensorrt.memory import Layout
from llmforge.engine.tensorrt.rank import Rank
from llmforge.errors import TargetError

NOBODY = SampleRow(SamplingParams(), 0, np.zeros(0, np.int32))  # whose token is not wanted


@dataclass
class HostSide:
    """The host's memory for a call that is under way: copies run from and to it."""

    inputs: Bytes
    drawn: Int32  # tokens, then the bits of the largest logits
    history: Int32

    @classmethod
    def of(cls, rank: Rank, layout: Layout) -> HostSide:
        rows = rank.memory.rows
        return cls(
            rank.device.host_array(layout.nbytes),
            rank.device.host_array(8 * rows).view(np.int32),
            np.empty(history_ints(rank.limits), np.int32),
        )

    def results(self, rows: int) -> tuple[Int32, Float32]:
        """The tokens drawn for the first rows, and their largest logits."""
        largest = self.drawn[len(self.drawn) // 2 :].view(np.float32)
        return self.drawn[:rows], largest[:rows]


@dataclass(frozen=True)
class _Bound:
    """An engine's context. local: what the engine calls its inputs and outputs."""

    context: Any
    inputs: tuple[str, ...]
    local: Mapping[str, str]

    def set_address(self, name: str, address: int) -> None:
        _accepted(self.context.set_tensor_address(self.local[name], address), name)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        _accepted(self.context.set_input_shape(self.local[name], shape), name)


class Runner:
    """Calls of a profile. `batch`: only calls of this many rows (a decode bucket); None: any."""

    def __init__(self, rank: Rank, batch: int | None = None) -> None:
        self._rank = rank
        self._batch = batch
        plan, device, self._profile = rank.plan, rank.device, PREFILL if batch is None else DECODE
        self._layout = Layout.of(plan.profiles[self._profile])
        self._inputs = device.allocate(self._layout.nbytes)
        self._replay: Action | None = None
        self._contexts: list[_Bound] = []
        self._actions = [self._action(step) for step in plan.steps]
        self._actions += [self._bound(launch) for launch in cache_launches(plan)]
        launch = sample_launch(plan) if rank.draws else None
        self._sample = self._bound(launch) if launch else None
        if batch is not None:
            self._set_shapes(batch, 1, batch)

    def run(self, call: Call, rows: Sequence[SampleRow], host: HostSide) -> None:
        """Ask for a call. `rows` say how to draw the batch's tokens; where they are empty, what is
        drawn means nothing. Decode calls always have the same `host`."""
        (batch, tokens), count = call.shape, len(call.logit_rows)
        self._fill(call, rows, host)
        if self._replay is not None:
            self._replay()
            return
        self._set_sizes(batch, tokens, count, call.first_slot)
        if self._batch is None:
            self._set_shapes(batch, tokens, count)
            self._set_slot(call.first_slot)
        self._launch_all(host)

    def capture(self, host: HostSide) -> None:
        """Record the calls of this bucket as a CUDA graph, where that is possible."""
        assert self._batch is not None
        zeros = np.zeros(self._batch, np.int32)
        nothing = Call(
            decode=True,
            first_slot=0,
            token_ids=zeros[:, None],
            positions=zeros[:, None],
            past_lens=zeros,
            prompt_lens=zeros + np.int32(1),
            logit_rows=np.arange(self._batch, dtype=np.int32),
            results=zeros - np.int32(1),
        )
        # Once before: TensorRT finishes what a change of shapes began.
        self.run(nothing, (), host)
        self._rank.device.synchronize()
        self._replay = self._rank.device.capture(lambda: self._launch_all(host))

    def host_side(self) -> HostSide:
        return HostSide.of(self._rank, self._layout)

    # -- what a call is made of ------------------------------------------------------------------

    def _launch_all(self, host: HostSide) -> None:
        device = self._rank.device
        device.upload(self._inputs, host.inputs)
        for action in self._actions:
            action()
        if self._sample is not None:
            self._sample()
            device.download(host.drawn, self._address(DRAWN))

    def _action(self, step: Any) -> Action:
        rank, most = self._rank, self._rank.plan.profiles[self._profile]
        if step.kind != "engine":
            sizes = largest(most)
            if self._batch is not None:
                sizes = dict.fromkeys(sizes, self._batch)
            return self._bound(exchange(rank.plan, step, sizes).launch)
        context = rank.context(step.file, self._profile)
        names = (*step.inputs, *step.outputs)
        bound = _Bound(context, step.inputs, dict(zip(names, step.local or names, strict=True)))
        self._contexts.append(bound)
        for name in names:
            bound.set_address(name, self._address(name))
        for index, name in enumerate(step.weights):
            local = weight_input(index)
            _accepted(context.set_tensor_address(local, rank.address(name)), name)
        stream, messages = rank.device.stream, rank.package.messages

        def enqueue() -> None:
            if not context.execute_async_v3(stream):
                raise TargetError(messages.reason(f"running {step.file}"))

        return enqueue

    def _bound(self, launch: Any) -> Action:
        return self._rank.device.bind(launch, self._address, self._rank.sizes)

    def _address(self, name: str) -> int:
        if name in self._layout.fields:
            return self._inputs + self._layout.fields[name][0]
        return self._rank.address(name)

    def _set_shapes(self, batch: int, tokens: int, rows: int) -> None:
        plan = self._rank.plan
        sizes = {"B": batch, "S": tokens, "R": rows}
        caches = {c.name: ("B", c.heads, plan.capacity, c.size) for c in plan.caches}
        for bound in self._contexts:
            for name in bound.inputs:
                shape = STEP_SHAPES.get(name) or caches.get(name)
                shape = shape or engine_shape(plan.tensors[name])
                concrete = tuple(sizes[d] if isinstance(d, str) else d for d in shape)
                bound.set_shape(name, concrete)

    def _set_slot(self, slot: int) -> None:
        """Have the engines see the caches from this slot on."""
        plan, memory = self._rank.plan, self._rank.memory
        for cache in plan.caches:
            address = memory.address(cache.name) + slot * memory.slot_bytes[cache.name]
            names = (cache.name, cache.output) if plan.native_cache else (cache.name,)
            for bound in self._contexts:
                if cache.name in bound.inputs:
                    for name in names:
                        bound.set_address(name, address)

    def _set_sizes(self, batch: int, tokens: int, rows: int, slot: int) -> None:
        sizes = self._rank.sizes
        sizes.set(SEQUENCES, batch)
        sizes.set(NEW_TOKENS, tokens)
        sizes.set(TOKENS, batch * tokens)
        sizes.set(ROWS, rows)
        sizes.set(FIRST_SLOT, slot)

    def _fill(self, call: Call, rows: Sequence[SampleRow], host: HostSide) -> None:
        arrays = {
            TOKEN_IDS: call.token_ids,
            POSITIONS: call.positions,
            PAST_LENS: call.past_lens,
            PROMPT_LENS: call.prompt_lens,
            LOGIT_ROWS: call.logit_rows,
        }
        for name, array in arrays.items():
            self._layout.view(host.inputs, name)[: array.size] = array.reshape(-1)
        if self._sample is None:
            return
        wanted = [rows[i] if rows and i >= 0 else NOBODY for i in call.results.tolist()]
        params: NDArray[Any] = self._layout.view(host.inputs, SAMPLING)
        if used := fill_params(params[: len(wanted)], wanted, host.history):
            self._rank.device.upload(self._address(HISTORY), host.history[:used])


def _accepted(answer: Any, name: str) -> None:
    """TensorRT's setters say False, or nothing in some versions, instead of raising."""
    if answer is False:
        raise TargetError(f"TensorRT does not take the tensor {name}; build the engine again")
