"""What computes the products of a decode step of one sequence: stream_gemm.cu, gemv.cu or torch.

    python benchmarks/cuda_products.py [--model llama-3.1-8b] [--json FILE]

First every product of gemv.cu is checked beside plain torch, for each tuning that is then measured,
at the models' shapes with all that is fused into them: random inputs, outputs poisoned before.
Then the device time of a decode step with 256 tokens (a CUDA graph, random weights made on the GPU)
and of its products alone, one behind the other, for each variant in turn, in several rounds; and of
each kernel of a step the time from the end of the one before to its own end. A variant with a wrong
product is not timed, and the exit status is then 1.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from cuda_speed import (
    MODELS,
    bytes_read,
    decode_step,
    device_step,
    load,
    prepared,
    random_weights,
    read_bandwidth,
)

from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.program import Matmul
from llmforge.engine.cuda.state import Products
from llmforge.engine.cuda.target import programs
from llmforge.engine.step import Limits, StepBatch
from llmforge.kernels.compile import DEFAULT_CACHE, compile_kernel, compiler_version
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.gemv import GemvTuning
from llmforge.kernels.launch import Float, Launch, Operand, TensorMap
from llmforge.model.reference import ACTIVATIONS, DTYPES, LOCAL, REFERENCE

Tensor = torch.Tensor

KV_LEN = 256
LIMITS = Limits(1, 384, 128, 32, 12)
ROUNDS = 3
# Relative to a row's norm: some roundings to the dtype.
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3}
LOGITS_TOLERANCE = 3e-2  # after all layers

TUNINGS = {
    "gemv": GemvTuning(),
    "no early copies": GemvTuning(early=False),
    "next starts with x": GemvTuning(release="with x"),
    "next starts with copies": GemvTuning(release="with copies"),
    "weights kept in L2": GemvTuning(evict_first=False),
    "4 warps, 3 x 8 KB": GemvTuning(warps=4, piece=8192),
    "4 warps, 6 x 4 KB": GemvTuning(warps=4, stages=6),
    "6 warps, 2 x 8 KB": GemvTuning(warps=6, piece=8192, stages=2),
    "8 warps, 6 x 2 KB": GemvTuning(piece=2048, stages=6),
    "12 warps, 2 x 4 KB": GemvTuning(warps=12, stages=2),
    "8 warps, 2 x 4 KB": GemvTuning(stages=2),
    "2 blocks, 4 warps, 3 x 4 KB": GemvTuning(warps=4, blocks=2),
}
VARIANTS = {
    "stream_gemm": Products("stream_gemm"),
    "torch": Products("torch"),
    **{name: Products("gemv", tuning) for name, tuning in TUNINGS.items()},
}


# -- correctness ---------------------------------------------------------------------------------


def products_of(config: ModelConfig, products: Products, arch: str) -> Iterator[Launch]:
    """The different launches of gemv.cu in the decode step of a model."""
    seen = set()
    _, decode = programs(prepared(config), LIMITS, arch, products=products)
    for call in (i.call for i in decode.instructions):
        if isinstance(call, Launch) and call.kernel.entry == "gemv":
            key = (call.kernel.key, call.shared_bytes, call.arguments[6])
            if key not in seen:
                seen.add(key)
                yield call


def random_operands(launch: Launch, device: str) -> dict[str, Tensor]:
    """Values for a launch's operands, by buffer."""
    out, x, weight, bias, residual, norm_weight = launch.arguments[:6]
    tensors = {}
    for operand in (x, weight, bias, residual, norm_weight):
        if isinstance(operand, Operand):
            shape = [d if isinstance(d, int) else 1 for d in operand.shape]
            tensor = torch.empty(shape, dtype=DTYPES[operand.dtype], device=device)
            scale = operand.features**-0.5 if operand is weight else 1.0
            tensors[operand.buffer] = tensor.normal_(0, scale)
    assert isinstance(out, Operand)
    tensors[out.buffer] = torch.empty(1, out.features, dtype=DTYPES[out.dtype], device=device)
    return tensors


def expected(launch: Launch, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a launch of gemv.cu must give: rounded where the kernel rounds, sums in float32."""
    operands = launch.arguments[:6]
    _, x, weight, bias, residual, norm_weight = (
        tensors[o.buffer] if isinstance(o, Operand) else None for o in operands
    )
    assert x is not None and weight is not None
    dtype = x.dtype
    if norm_weight is not None:
        eps = launch.arguments[-1]
        assert isinstance(eps, Float)
        (x,) = REFERENCE["rms_norm"]([x, norm_weight], {"eps": eps.value}, LOCAL)
    sums = torch.nn.functional.linear(
        x.float(), weight.float(), None if bias is None else bias.float()
    )
    rounded = sums.to(dtype)
    names = [name for name, _ in launch.kernel.defines if name.startswith("ACTIVATION_")]
    if names:
        gate, up = rounded.chunk(2, dim=-1)
        name = names[0].removeprefix("ACTIVATION_").lower()
        return ACTIVATIONS[name](gate.float()).to(dtype) * up
    return rounded if residual is None else rounded + residual


def checked_configs(config: ModelConfig) -> tuple[ModelConfig, ...]:
    """One layer of the model as it is, and with biases in float16."""
    one = dataclasses.replace(config, num_layers=1, sliding_window=(None,))
    biased = dataclasses.replace(
        one, dtype="float16", qkv_bias=True, attention_output_bias=True, mlp_bias=True
    )
    return one, biased


def check_products(config: ModelConfig, arch: str) -> list[dict[str, Any]]:
    """Each product of each tuning beside plain torch: which are wrong, and how far all are off."""
    sizes = Sizes(("processors",))
    sizes.set("processors", torch.cuda.get_device_properties(0).multi_processor_count)
    errors = []
    for variant in checked_configs(config):
        launches = [
            (tuning, launch)
            for tuning, products in VARIANTS.items()
            if products.one_row == "gemv"
            for launch in products_of(variant, products, arch)
        ]
        modules = compiled([launch for _, launch in launches], arch)
        values: dict[tuple[Any, ...], tuple[dict[str, Tensor], Tensor]] = {}
        for (tuning, launch), module in zip(launches, modules, strict=True):
            # The same values for all tunings: only the first has them multiplied by torch.
            key = launch.arguments[:7]
            if key not in values:
                tensors = random_operands(launch, "cuda")
                values[key] = tensors, expected(launch, tensors)
            error = relative_error(launch, module, *values[key], sizes)
            found = {
                "tuning": tuning,
                "weights": launch.arguments[2].shape,  # type: ignore[union-attr]
                "dtype": variant.dtype,
                "error": error,
                "wrong": not error <= TOLERANCE[variant.dtype],
            }
            if found["wrong"]:
                click.echo(f"wrong: {found}, compiled as {dict(launch.kernel.defines)}")
            errors.append(found)
    return errors


def compiled(launches: list[Launch], arch: str) -> list[Module]:
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda call: compile_kernel(call.kernel, arch, DEFAULT_CACHE), launches)
        return [Module(image.image, "gemv") for image in images]


def relative_error(
    launch: Launch, module: Module, tensors: Mapping[str, Tensor], want: Tensor, sizes: Sizes
) -> float:
    """How far the product is off, launched twice, so that the second overlaps the first."""
    bound = BoundLaunch(launch, module, lambda name: tensors[name].data_ptr(), sizes, overlap=True)
    out = tensors[launch.arguments[0].buffer]  # type: ignore[union-attr]
    out.fill_(float("nan"))
    for _ in range(2):
        bound(torch.cuda.current_stream().cuda_stream)
    return float((out.float() - want.float()).norm() / want.float().norm())


# -- speed ---------------------------------------------------------------------------------------


def products_alone(executable: CudaExecutable) -> Callable[[], float]:
    """A function that gives the seconds of the products of a decode step, without the rest."""
    program = executable.memory.programs[1]
    calls = [
        executable.bind(instruction, program)
        for instruction in program.instructions
        if isinstance(instruction.call, Matmul)
        or (
            isinstance(instruction.call, Launch)
            and instruction.call.kernel.entry in ("gemv", "stream_gemm")
        )
    ]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call(stream.cuda_stream)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call(stream.cuda_stream)

    def seconds() -> float:
        times = []
        with torch.cuda.stream(stream):
            for _ in range(30):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times)

    return seconds


def between_ends(executable: CudaExecutable, step: StepBatch) -> dict[str, tuple[int, float]]:
    """Of a decode step's kernels, by name and shape of weights: how many there are, and the mean
    microseconds from the end of the kernel before to their own. Empty where some launch kernels of
    the library, or the profiler has not seen all."""
    calls = [i.call for i in executable.instructions(step)]
    launches = [call for call in calls if isinstance(call, Launch)]
    ends = kernel_ends(lambda: executable.time_decode(step, repeat=5))
    count = len(launches) + 1  # with sampling
    if len(launches) < len(calls) or not ends or len(ends) % count:
        return {}
    found: dict[str, list[float]] = {}
    for first in range(0, len(ends), count):
        for i in range(1, len(launches)):
            call, time = launches[i], ends[first + i] - ends[first + i - 1]
            found.setdefault(_label(call), []).append(time)
    steps = len(ends) // count
    return {name: (len(times) // steps, statistics.mean(times)) for name, times in found.items()}


def kernel_ends(run: Callable[[], Any]) -> list[float]:
    """When the kernels that `run` launches end, in the order of their launches, in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.lower().startswith("mem")
    ]
    return [end for _, end in sorted(kernels)]


def _label(call: Launch) -> str:
    if call.kernel.entry not in ("gemv", "stream_gemm"):
        return call.kernel.entry
    weight = call.arguments[2]
    if isinstance(weight, TensorMap):
        weight = weight.weight
    assert isinstance(weight, Operand)
    return f"{call.kernel.entry} {weight.shape[0]} x {weight.shape[1]}"


def measure(name: str, bandwidth: float, variants: Mapping[str, Products]) -> list[dict[str, Any]]:
    """Each variant's times, and how far its logits are from torch's."""
    config = MODELS[name]
    graph = prepared(config)
    weights = random_weights(graph)
    executables = {
        variant: load(graph, weights, LIMITS, products) for variant, products in variants.items()
    }
    step = decode_step(1, KV_LEN, LIMITS.block_size)
    logits = {variant: each.step(step).logits for variant, each in executables.items()}
    chains = {variant: products_alone(each) for variant, each in executables.items()}
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    for _ in range(ROUNDS):
        for variant, executable in executables.items():
            times[variant].append((device_step(executable, 1, KV_LEN), chains[variant]()))
    floor = bytes_read(graph, config, KV_LEN) / bandwidth
    rows = []
    for variant, rounds in times.items():
        whole, alone = (statistics.median(values) for values in zip(*rounds, strict=True))
        off = _distance(logits[variant], logits["torch"])
        rows.append(
            {
                "model": name, "variant": variant, "device_step_ms": whole * 1e3,
                "products_ms": alone * 1e3, "floor_ms": floor * 1e3, "over_floor": whole / floor,
                "logits_off": off, "wrong": not off <= LOGITS_TOLERANCE,
                "tuning": dataclasses.asdict(variants[variant]),
            }
        )  # fmt: skip
        click.echo(
            f"{name} {variant:28} step {whole * 1e3:6.3f}  products {alone * 1e3:6.3f}  floor "
            f"{floor * 1e3:6.3f} ms  {whole / floor:.3f} of floor  logits {off:.1e} off"
            f"{'  WRONG' if rows[-1]['wrong'] else ''}"
        )
    for row in rows:  # the profiler comes last: it slows down what is measured beside it
        row["us_between_ends"] = between_ends(executables[row["variant"]], step)
    fastest = min(rows, key=lambda row: row["device_step_ms"])
    click.echo(f"of {fastest['variant']}, each kernel's end behind that of the one before:")
    for kernel, (count, mean) in fastest["us_between_ends"].items():
        click.echo(f"  {kernel:28} {count:4} x {mean:7.2f} us")
    chains.clear()
    for executable in executables.values():
        executable.close()
    return rows


def _distance(values: Any, wanted: Any) -> float:
    left, right = torch.from_numpy(values), torch.from_numpy(wanted)
    return float((left - right).norm() / right.norm())


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=tuple(MODELS), show_default=True)
@click.option("--json", "output", type=Path)
def main(models: tuple[str, ...], output: Path | None) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        raise click.ClickException("this needs an NVIDIA GPU of compute capability 9.0 or more")
    major, minor = torch.cuda.get_device_capability()
    torch.manual_seed(0)
    checks: list[dict[str, Any]] = []
    for name in models:
        checks += check_products(MODELS[name], f"sm_{major}{minor}")
        torch.cuda.empty_cache()
    wrong = {check["tuning"] for check in checks if check["wrong"]}
    off = max(check["error"] for check in checks)
    click.echo(f"{len(checks)} products, at most {off:.1e} off; wrong: {sorted(wrong) or 'none'}")
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    click.echo(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s")
    report = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "nvrtc": compiler_version(),
        },
        "read_bandwidth_tb_per_s": bandwidth / 1e12,
        "kv_len": KV_LEN,
        "checks": checks,
        "cases": [],
    }  # fmt: skip
    timed = {variant: products for variant, products in VARIANTS.items() if variant not in wrong}
    for name in models:
        report["cases"] += measure(name, bandwidth, timed)
        torch.cuda.empty_cache()
        if output:  # what there is, should the next be cut off
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=2) + "\n")
    if wrong or any(case["wrong"] for case in report["cases"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
