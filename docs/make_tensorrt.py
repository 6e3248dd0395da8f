"""Writes the tables of docs/tensorrt.md from the lowering table, the tests' models and the recorded
results: python docs/make_tensorrt.py"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for folder in ("tests", "tests/parity", "tests/trt"):
    sys.path.append(str(ROOT / folder))

import test_rtx_builds  # noqa: E402
from tiny_models import ONE, config_of  # noqa: E402

from llmforge.engine.tensorrt.lowering import TABLE  # noqa: E402
from llmforge.engine.tensorrt.lowering.table import Row  # noqa: E402
from llmforge.model.decoder import trace  # noqa: E402
from llmforge.parallel import Topology  # noqa: E402

OUTPUT = ROOT / "docs/tensorrt.md"
RESULTS = ROOT / "benchmarks/results"
LAYERS = {
    "attention": "`IAttention`",
    "cache_update": "`IKVCacheUpdateLayer`",
    "rotary": "`IRotaryEmbeddingLayer`",
    "collective": "`IDistCollectiveLayer`",
}
# Graphs have these once passes have merged linears and fused norms; this target lowers graphs as
# they are traced, so its engines have none.
OF_PASSES = {"split", "add_rms_norm"}


def recorded(name: str) -> Any:
    """A results file, or None before it is there."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def ops_of(names: Iterable[str], topology: Topology = ONE) -> set[str]:
    """The ops that any rank of these models computes or asks for."""
    ranks = range(topology.world_size)
    return {
        node.op
        for name in names
        for rank in ranks
        for node in trace(config_of(name), topology, rank).nodes
    }


def rows() -> str:
    """A line an op: its columns, and what was done with them."""
    built = ops_of(test_rtx_builds.NAMES) | ops_of(["olmo2"], Topology(2, 1))
    executed, where = executed_ops()
    lines = [
        "| op | native layers | primitives | interpreted | built by tensorrt_rtx | "
        f"executed on a GPU{where} |",
        "|---|---|---|---|---|---|",
    ]
    for op in sorted(TABLE):
        row = TABLE[op]
        natively = " and ".join(LAYERS[need] for need in row.needs) if row.native else "none better"
        both = "both" if row.native else "yes"
        between = row.primitives is None
        if between:
            natively = natively if row.native else "none"
        lines.append(
            "| "
            + " | ".join(
                (
                    f"`{op}`",
                    natively,
                    "between engines" if between else "yes",
                    both,
                    _built(op, row, built),
                    _executed(row) if op in executed else "no",
                )
            )
            + " |"
        )
    return "\n".join(lines)


def _built(op: str, row: Row, built: set[str]) -> str:
    if op in OF_PASSES:
        return "not used"
    if row.primitives is None and row.native is None:
        return "nothing to build"
    assert op in built, f"no test builds {op}"
    if row.primitives is None:
        return "native"
    return "both" if row.native else "yes"


def _executed(row: Row) -> str:
    return "primitives" if row.primitives else "between engines"


def executed_ops() -> tuple[set[str], str]:
    """The ops of what a GPU has computed with the cpu target's tokens, and with what."""
    results = recorded("tensorrt_gpu.json")
    if results is None:
        return set(), ""
    parts, machine = results["parts"], results["machine"]
    same = [name for name, one in parts.get("tiny", {}).items() if one.get("same")]
    ops = ops_of(same)
    if _same(parts.get("example", {}).get("float32")):
        ops |= ops_of(["llama"])
    for layout, topology in (
        ("tensor_parallel", Topology(2, 1)),
        ("pipeline_parallel", Topology(1, 2)),
    ):
        if _same(parts.get("ranks", {}).get(layout)):
            ops |= ops_of(["llama"], topology)
    return ops, f" (tensorrt {machine['tensorrt']}, {machine['gpu']})"


def _same(part: Any) -> bool:
    return bool(part) and "requests" in part and part["same_tokens"] == part["requests"]


def builds() -> str:
    """Time and memory of RTX builds."""
    results = recorded("tensorrt_build.json")
    if results is None:
        return "Not measured yet."
    lines = [
        "| model | weights | build | peak memory | by weights | engine |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results["builds"].items():
        best = runs[0]
        times = f"{best['seconds']:.1f} s (of {len(runs)}: up to {runs[-1]['seconds']:.1f} s)"
        lines.append(_build(name, best, times))
    estimate = results["estimate_8B_not_run"]
    estimate["peak_by_weights"] = estimate["peak_bytes"] / estimate["weights_bytes"]
    lines.append(
        _build("8B", estimate, f"{estimate['seconds']} s")
        + "\n\nThe last row is an estimate by the ratios of the row before it; it was not run. "
        f"tensorrt_rtx {results['tensorrt_rtx']} on {results['machine']}, with no GPU, for "
        f"{runs[0]['archs'].replace(',', ', ')}; bfloat16. Before each build the load average "
        f"was {_loads(results['builds'])}."
    )
    return "\n".join(lines)


def _loads(builds: dict[str, Any]) -> str:
    """The range of load averages just before the builds."""
    loads = [run["load_average_before"] for runs in builds.values() for run in runs]
    return f"{min(loads):.0f} to {max(loads):.0f}"


def _build(name: str, one: dict[str, Any], seconds: str) -> str:
    cells = (
        name,
        f"{one['weights_bytes'] / 1e9:.2f} GB",
        seconds,
        f"{one['peak_bytes'] / 1e9:.2f} GB",
        f"{one['peak_by_weights']:.2f}",
        f"{one['engine_bytes'] / 1e9:.2f} GB",
    )
    return f"| {' | '.join(cells)} |"


def on_gpu() -> str:
    """What was executed."""
    results = recorded("tensorrt_gpu.json")
    if results is None:
        return "Nothing recorded yet."
    parts, machine = results["parts"], results["machine"]
    lines = [
        f"tensorrt {machine['tensorrt']} (Python {machine['python']}) on one {machine['gpu']}:",
        "",
        "| what | result |",
        "|---|---|",
    ]
    for dtype, one in _done(parts, "example", "logits"):
        logits = one["logits"]
        lines.append(
            f"| example model, {dtype} | {one['same_tokens']} of {one['requests']} requests have "
            f"the cpu target's tokens in float32; logits differ by at most "
            f"{logits['max_difference']:.2g} (rounding explains {logits['tolerance']:.2g}) |"
        )
    for layout, one in _done(parts, "ranks", "requests"):
        said = f"{one['same_tokens']} of {one['requests']} requests have the cpu target's tokens"
        name = layout.replace("_", " ")
        lines.append(f"| example model, {name} 2, two processes on the one GPU | {said} |")
    lines += _counted(
        "tiny models, float32",
        "have the cpu target's tokens",
        {name: one["same"] for name, one in _done(parts, "tiny", "same")},
    )
    lines += _counted(
        "mixtures of experts, float32, tensor parallel 2",
        "have the cpu target's tokens",
        {name: _same(one) for name, one in _done(parts, "tiny_ranks", "requests")},
    )
    lines += _counted(
        "mixtures of experts, float16, every expert chosen",
        "have logits as near to the cpu target's as rounding explains",
        {
            name: one["logits"]["max_difference"] <= one["logits"]["tolerance"]
            for name, one in _done(parts, "half", "logits")
        },
    )
    for options, one in _done(parts, "speed", "build_s"):
        lines += _speed("Llama-3.2-1B's shape, float16", options, one)
    for level, one in _done(parts, "level", "build_s"):
        shape = "two layers of that shape, 8192 tokens of vocabulary"
        lines += _speed(shape, f"optimization-level {level}", one)
    return "\n".join(lines)


def _done(parts: Any, part: str, field: str) -> list[tuple[str, Any]]:
    """The jobs of a part that came to this field of their results."""
    return [(name, one) for name, one in parts.get(part, {}).items() if field in one]


def _counted(what: str, said: str, right: dict[str, bool]) -> list[str]:
    """A line on how many are right, and which are not."""
    if not right:
        return []
    wrong = sorted(name for name, holds in right.items() if not holds)
    others = f"; not: {', '.join(wrong)}" if wrong else ""
    return [f"| {len(right)} {what} | {sum(right.values())} {said}{others} |"]


def _speed(shape: str, options: str, speed: dict[str, Any]) -> list[str]:
    size = f"{speed['engine_bytes'] / 1e9:.2f} GB"
    what = shape if options == "default" else f"{shape}, `--{options.replace('+', ' --')}`"
    lines = [f"| {what}: build | {speed['build_s']:.0f} s, {size} |"]
    for batch, floor in speed.get("floor_ms", {}).items():
        found = _tpot(speed["bench"], int(batch))
        lines.append(
            f"| the same: TPOT at batch {batch} | {found:.2f} ms; what a step reads takes "
            f"{floor:.2f} ms at the bandwidth of a copy |"
        )
    return lines


def _tpot(bench: Any, batch: int) -> float:
    """Milliseconds a token of a batch size in `llmforge bench --json`."""
    (report,) = (r for r in bench["latency"] if r["batch_size"] == batch)
    return float(report["tpot"]["p50"]) * 1e3


TABLES = {"rows": rows, "builds": builds, "gpu": on_gpu}


def page(text: str) -> str:
    """The page with its tables written anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        assert re.search(pattern, text, re.DOTALL), f"the page has no place for {name}"
        text = re.sub(pattern, lambda m, t=table: m[1] + t() + m[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    OUTPUT.write_text(page(OUTPUT.read_text()))
