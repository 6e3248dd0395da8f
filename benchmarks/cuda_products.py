"""What computes the products of a decode step: stream_gemm.cu, gemv.cu, rows_gemm.cu or torch.

    python benchmarks/cuda_products.py [--rows 8] [--model llama-3.1-8b] [--json FILE]

For one sequence by gemv.cu, with --rows for 2 to 8 by rows_gemm.cu. First every product of that
kernel is checked beside plain torch, for each tuning that is then measured, at the models' shapes
with all that is fused into them: random inputs, outputs poisoned before. Then the device time of a
decode step with 256 tokens a sequence (a CUDA graph, random weights made on the GPU), of as many
sequences as there are rows and of each smaller number that steps are prepared for but one, and of
its products alone, one behind the other, for each variant in turn, in several rounds; and of each
kernel of the largest step the time from the end of the one before to its own end. A variant with a
wrong product is not timed, and the exit status is then 1.

Products of more rows, by wide_gemm.cu, are not compared here: tests/cuda/test_real_shapes.py checks
them at these shapes, and cuda_speed.py --profile shows what they take in a step.
"""

from __future__ import annotations

import dataclasses
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
    machine,
    prepared,
    random_weights,
    read_bandwidth,
    replayed,
    write_report,
)
from product_studies import Study, study_of

from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.program import Matmul
from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.cuda.target import programs
from llmforge.engine.step import StepBatch
from llmforge.kernels.compile import DEFAULT_CACHE, compile_kernel
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.launch import Float, Launch, Operand, TensorMap
from llmforge.model.reference import ACTIVATIONS, DTYPES, LOCAL, REFERENCE
from llmforge.runtime.verify import logit_deviation

Tensor = torch.Tensor

KV_LEN = 256
OURS = ("gemv", "rows_gemm", "stream_gemm")
ROUNDS = 3
# Relative to a row's norm: some roundings to the dtype.
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3}


# -- correctness ---------------------------------------------------------------------------------


def products_of(
    study: Study, config: ModelConfig, choice: KernelChoice, arch: str
) -> Iterator[Launch]:
    """The different launches of the kernel in the largest decode step of a model."""
    seen = set()
    *_, decode = programs(prepared(config), study.limits, arch, choice=choice)
    for call in (i.call for i in decode.instructions):
        if isinstance(call, Launch) and call.kernel.entry == study.entry:
            key = (call.kernel.key, call.shared_bytes, weight_of(call).shape)
            if key not in seen:
                seen.add(key)
                yield call


def weight_of(call: Launch) -> Operand:
    """The weights of one of our products."""
    weight = call.arguments[2]
    if isinstance(weight, TensorMap):
        weight = weight.matrix
    assert isinstance(weight, Operand)
    return weight


def random_operands(launch: Launch, rows: int, device: str) -> dict[str, Tensor]:
    """Values for a launch's operands, by buffer."""
    out, x, weight, bias, residual, norm_weight, *others = launch.arguments
    tensors = {}
    for operand in (x, weight, bias, residual, norm_weight):
        if isinstance(operand, Operand):
            shape = [d if isinstance(d, int) else rows for d in operand.shape]
            tensor = torch.empty(shape, dtype=DTYPES[operand.dtype], device=device)
            scale = operand.features**-0.5 if operand is weight else 1.0
            tensors[operand.buffer] = tensor.normal_(0, scale)
    assert isinstance(out, Operand)
    tensors[out.buffer] = torch.empty(rows, out.features, dtype=DTYPES[out.dtype], device=device)
    for scratch in others:
        if isinstance(scratch, Operand):  # one counter a block is more than enough
            size, dtype = max(scratch.features, 1024), DTYPES[scratch.dtype]
            tensors[scratch.buffer] = torch.empty(size, dtype=dtype, device=device).zero_()
    return tensors


def expected(launch: Launch, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a launch must give: rounded where the kernel rounds, sums in float32."""
    operands = launch.arguments[:6]
    _, x, weight, bias, residual, norm_weight = (
        tensors[o.buffer] if isinstance(o, Operand) else None for o in operands
    )
    assert x is not None and weight is not None
    dtype = x.dtype
    scale: float | Tensor = 1.0
    if norm_weight is not None:
        eps = launch.arguments[-1]
        assert isinstance(eps, Float)
        if launch.kernel.entry == "rows_gemm":  # which divides the sums
            scale = (x.float().square().mean(1, keepdim=True) + eps.value).rsqrt()
            x = x * norm_weight
        else:
            (x,) = REFERENCE["rms_norm"]([x, norm_weight], {"eps": eps.value}, LOCAL)
    sums = torch.nn.functional.linear(x.float(), weight.float()) * scale
    if bias is not None:
        sums += bias.float()
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


def check_products(study: Study, config: ModelConfig, arch: str) -> list[dict[str, Any]]:
    """Each product of each tuning beside plain torch: which are wrong, and how far all are off."""
    sizes = Sizes(("processors", "tokens", "rows"))
    sizes.set("processors", torch.cuda.get_device_properties(0).multi_processor_count)
    for name in ("tokens", "rows"):
        sizes.set(name, study.rows)
    errors = []
    for variant in checked_configs(config):
        launches = [
            (tuning, launch)
            for tuning, choice in study.variants.items()
            if study.checks(choice)
            for launch in products_of(study, variant, choice, arch)
        ]
        modules = compiled([launch for _, launch in launches], arch)
        values: dict[tuple[Any, ...], tuple[dict[str, Tensor], Tensor]] = {}
        for (tuning, launch), module in zip(launches, modules, strict=True):
            # The same values for all tunings: only the first has them multiplied by torch.
            key = launch.arguments[:6]
            if key not in values:
                tensors = random_operands(launch, study.rows, "cuda")
                values[key] = tensors, expected(launch, tensors)
            error = relative_error(launch, module, *values[key], sizes)
            found = {
                "tuning": tuning,
                "weights": weight_of(launch).shape,
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
        return [
            Module(image.image, call.kernel.entry)
            for image, call in zip(images, launches, strict=True)
        ]


def relative_error(
    launch: Launch, module: Module, tensors: Mapping[str, Tensor], want: Tensor, sizes: Sizes
) -> float:
    """How far the worst row of a product is off, launched twice, so that the second overlaps the
    first."""
    bound = BoundLaunch(launch, module, lambda name: tensors[name].data_ptr(), sizes, overlap=True)
    out = tensors[launch.arguments[0].buffer]  # type: ignore[union-attr]
    out.fill_(float("nan"))
    for _ in range(2):
        bound(torch.cuda.current_stream().cuda_stream)
    off = (out.float() - want.float()).norm(dim=1) / want.float().norm(dim=1)
    return float(off.max())


# -- speed ---------------------------------------------------------------------------------------


def products_alone(executable: CudaExecutable, batch: int) -> Callable[[], float]:
    """A function that gives the seconds of the products of a decode step, without the rest."""
    buckets = (p for p in executable.memory.programs if p.shape.decode)
    program = next(p for p in buckets if p.shape.tokens == batch)
    calls = [
        executable.bind(instruction, program)
        for instruction in program.instructions
        if isinstance(instruction.call, Matmul)
        or (isinstance(instruction.call, Launch) and instruction.call.kernel.entry in OURS)
    ]
    return replayed(calls)


def between_ends(executable: CudaExecutable, step: StepBatch) -> dict[str, tuple[int, float]]:
    """Of a decode step's kernels, by name and shape of weights: how many there are, and the mean
    microseconds from the end of the kernel before to their own. Empty where some launch kernels of
    the library, or the profiler has not seen all."""
    calls = [i.call for i in executable.instructions(step)]
    launches = [call for call in calls if isinstance(call, Launch)]
    ends = kernel_ends(lambda: executable.time_decode(step, repeat=5))
    count = len(launches) + 3  # fetched before, drawn and delivered behind
    if len(launches) < len(calls) or not ends or len(ends) % count:
        return {}
    found: dict[str, list[float]] = {}
    for first in range(0, len(ends), count):
        for i, call in enumerate(launches):
            found.setdefault(_label(call), []).append(ends[first + i + 1] - ends[first + i])
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
    if call.kernel.entry not in OURS:
        return call.kernel.entry
    features, k = weight_of(call).shape
    return f"{call.kernel.entry} {features} x {k}"


def measure(study: Study, name: str, bandwidth: float, wrong: set[str]) -> list[dict[str, Any]]:
    """The times of each variant that is not wrong, and how far its logits are from torch's."""
    config = MODELS[name]
    graph = prepared(config)
    weights = random_weights(graph)
    executables = {
        variant: load(graph, weights, study.limits, choice)
        for variant, choice in study.variants.items()
        if variant not in wrong
    }
    rows: list[dict[str, Any]] = []
    for batch in study.batches:
        floor = bytes_read(graph, config, KV_LEN, batch) / bandwidth
        case = {"model": name, "batch": batch, "floor_ms": floor * 1e3}
        rows += [
            case | row | {"tuning": dataclasses.asdict(study.variants[row["variant"]])}
            for row in measure_batch(executables, batch, floor, logit_deviation(config))
        ]
    # The profiler comes last: it slows down what is measured beside it.
    step = decode_step(study.rows, KV_LEN, study.limits.block_size)
    largest = [row for row in rows if row["batch"] == study.rows]
    for row in largest:
        row["us_between_ends"] = between_ends(executables[row["variant"]], step)
    fastest = min(largest, key=lambda row: row["device_step_ms"])
    click.echo(f"of {fastest['variant']}, each kernel's end behind that of the one before:")
    for kernel, (count, mean) in fastest["us_between_ends"].items():
        click.echo(f"  {kernel:28} {count:4} x {mean:7.2f} us")
    for executable in executables.values():
        executable.close()
    return rows


def measure_batch(
    executables: Mapping[str, CudaExecutable], batch: int, floor: float, allowed: float
) -> Iterator[dict[str, Any]]:
    """The times of each variant in steps of `batch` sequences. `allowed`: how far its logits may be
    from torch's, relative to their norm."""
    any_of_them = next(iter(executables.values()))
    step = decode_step(batch, KV_LEN, any_of_them.limits.block_size)
    logits = {variant: each.step(step).logits for variant, each in executables.items()}
    chains = {variant: products_alone(each, batch) for variant, each in executables.items()}
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in executables}
    for _ in range(ROUNDS):
        for variant, executable in executables.items():
            times[variant].append((device_step(executable, batch, KV_LEN), chains[variant]()))
    for variant, rounds in times.items():
        whole, alone = (statistics.median(values) for values in zip(*rounds, strict=True))
        off = _distance(logits[variant], logits["torch"])
        row = {
            "variant": variant, "device_step_ms": whole * 1e3, "products_ms": alone * 1e3,
            "over_floor": whole / floor, "logits_off": off, "wrong": not off <= allowed,
        }  # fmt: skip
        click.echo(
            f"batch {batch} {variant:28} step {whole * 1e3:6.3f}  products {alone * 1e3:6.3f}  "
            f"floor {floor * 1e3:6.3f} ms  {whole / floor:.3f} of floor  logits {off:.1e} off"
            f"{'  WRONG' if row['wrong'] else ''}"
        )
        yield row


def _distance(values: Any, wanted: Any) -> float:
    left, right = torch.from_numpy(values), torch.from_numpy(wanted)
    return float((left - right).norm() / right.norm())


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=tuple(MODELS), show_default=True)
@click.option("--rows", type=click.IntRange(1, 8), default=1, show_default=True)
@click.option("--json", "output", type=Path)
def main(models: tuple[str, ...], rows: int, output: Path | None) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        raise click.ClickException("this needs an NVIDIA GPU of compute capability 9.0 or more")
    torch.cuda.synchronize()  # there is a context now, into which modules are loaded
    major, minor = torch.cuda.get_device_capability()
    torch.manual_seed(0)
    study = study_of(rows)
    checks: list[dict[str, Any]] = []
    for name in models:
        checks += check_products(study, MODELS[name], f"sm_{major}{minor}")
        torch.cuda.empty_cache()
    wrong = {check["tuning"] for check in checks if check["wrong"]}
    off = max(check["error"] for check in checks)
    click.echo(f"{len(checks)} products, at most {off:.1e} off; wrong: {sorted(wrong) or 'none'}")
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    click.echo(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s")
    report: dict[str, Any] = {
        **machine(),
        "read_bandwidth_tb_per_s": bandwidth / 1e12,
        "kv_len": KV_LEN,
        "rows": rows,
        "checks": checks,
        "cases": [],
    }
    for name in models:
        click.echo(name)
        report["cases"] += measure(study, name, bandwidth, wrong)
        torch.cuda.empty_cache()
        if output:  # what there is, should the next be cut off
            write_report(output, report)
    if wrong or any(case["wrong"] for case in report["cases"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
