"""What computes the products of a decode step of one sequence: stream_gemm.cu, gemv.cu or torch.

    python benchmarks/cuda_products.py [--model llama-3.1-8b] [--json FILE]

First every product of gemv.cu is checked beside plain torch, for each tuning that is then measured,
at the models' shapes with all that is fused into them: random inputs, outputs poisoned before.
Then the device time of a decode step with 256 tokens (a CUDA graph, random weights made on the GPU)
and of its products alone, one behind the other, for each variant in turn, in several rounds.
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
from llmforge.engine.step import Limits
from llmforge.kernels.compile import DEFAULT_CACHE, compile_kernel, compiler_version
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.gemv import GemvTuning
from llmforge.kernels.launch import Float, Launch, Operand
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
    """Each product of each tuning beside plain torch. Raises ClickException where one differs."""
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
            shape = launch.arguments[2].shape  # type: ignore[union-attr]
            if not error <= TOLERANCE[variant.dtype]:
                raise click.ClickException(
                    f"{tuning}, weights {shape}, {variant.dtype}: {error:.2e} off; "
                    f"compiled as {dict(launch.kernel.defines)}"
                )
            errors.append({"tuning": tuning, "weights": shape, "error": error})
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


def measure(name: str, bandwidth: float) -> list[dict[str, Any]]:
    """Each variant's times. Raises ClickException where its logits differ from torch's."""
    config = MODELS[name]
    graph = prepared(config)
    weights = random_weights(graph)
    executables = {
        variant: load(graph, weights, LIMITS, products) for variant, products in VARIANTS.items()
    }
    step = decode_step(1, KV_LEN, LIMITS.block_size)
    logits = {variant: each.step(step).logits for variant, each in executables.items()}
    off = {v: _distance(values, logits["torch"]) for v, values in logits.items()}
    if wrong := [v for v, error in off.items() if not error <= LOGITS_TOLERANCE]:
        raise click.ClickException(f"{name}: the logits of {wrong} differ from torch's: {off}")
    chains = {variant: products_alone(each) for variant, each in executables.items()}
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(ROUNDS):
        for variant, executable in executables.items():
            times[variant].append((device_step(executable, 1, KV_LEN), chains[variant]()))
    floor = bytes_read(graph, config, KV_LEN) / bandwidth
    rows = []
    for variant, rounds in times.items():
        whole, alone = (statistics.median(values) for values in zip(*rounds, strict=True))
        rows.append(
            {
                "model": name, "variant": variant, "device_step_ms": whole * 1e3,
                "products_ms": alone * 1e3, "floor_ms": floor * 1e3, "over_floor": whole / floor,
                "logits_off": off[variant], "tuning": dataclasses.asdict(VARIANTS[variant]),
            }
        )  # fmt: skip
        click.echo(
            f"{name} {variant:28} step {whole * 1e3:6.3f}  products {alone * 1e3:6.3f}  floor "
            f"{floor * 1e3:6.3f} ms  {whole / floor:.3f} of floor  logits {off[variant]:.1e} off"
        )
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
    click.echo(f"{len(checks)} products agree, at most {max(c['error'] for c in checks):.1e} off")
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    click.echo(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s")
    cases = []
    for name in models:
        cases += measure(name, bandwidth)
        torch.cuda.empty_cache()
    if output:
        report = {
            "gpu": torch.cuda.get_device_name(),
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "cuda": torch.version.cuda, "nvrtc": compiler_version(),
            },
            "read_bandwidth_tb_per_s": bandwidth / 1e12,
            "kv_len": KV_LEN,
            "cases": cases,
            "checks": checks,
        }  # fmt: skip
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
