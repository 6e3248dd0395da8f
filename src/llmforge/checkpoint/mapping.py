"""From foreign tensors to ours: rules, and the plan that they give for one model.

A plan is total: every parameter is filled exactly once, and every tensor of the source is used or
ignored for a stated reason. `make_plan` names everything that is not so in one message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmforge.artifact import listed
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.params import ParamSpec, parameters
from llmforge.errors import SourceError
from llmforge.safetensors_io import Array, TensorInfo

SOURCE_DTYPES = ("float64", "float32", "float16", "bfloat16")

Convert = Callable[[list[Array], ModelConfig], list[Array]]


@dataclass(frozen=True)
class Rule:
    """Tensors named `theirs` become the parameters named `ours`. ``{i}`` stands for the layer.

    `convert` gets the arrays of `theirs` in order, whole, and gives those of `ours`, in any
    floating dtype; without it there is one of each and the values are the same.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    convert: Convert | None = None

    def __post_init__(self) -> None:
        assert self.convert or len(self.theirs) == len(self.ours) == 1, self


@dataclass(frozen=True)
class Ignore:
    """Source tensors whose whole name matches `pattern` are not needed, because of `reason`."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Group:
    """One rule at one layer: what is read together. `nbytes`: the source's bytes."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    convert: Convert | None
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """`groups` in the order of their first parameter; `ignored`: reason → names."""

    groups: tuple[Group, ...]
    ignored: Mapping[str, tuple[str, ...]]


def make_plan(
    config: ModelConfig,
    rules: Iterable[Rule],
    ignored: Sequence[Ignore],
    tensors: Mapping[str, TensorInfo],
    where: str,
) -> Plan:
    """The plan for a source with these tensors. Raises SourceError that names, with `where`,
    all missing, unexpected and misshapen tensors and all unsupported dtypes."""
    specs = parameters(config)
    groups = [
        Group(theirs, ours, rule.convert, sum(tensors[n].nbytes for n in theirs if n in tensors))
        for rule in rules
        for theirs, ours in _instances(rule, config.num_layers)
        if any(name in specs for name in ours)
    ]
    _check_rules(groups, specs)
    used = {name for group in groups for name in group.theirs}
    reasons: dict[str, list[str]] = {}
    unexpected = []
    for name in tensors:
        if name in used:
            continue
        match = next((i for i in ignored if re.fullmatch(i.pattern, name)), None)
        if match:
            reasons.setdefault(match.reason, []).append(name)
        else:
            unexpected.append(name)
    _check_tensors(groups, specs, tensors, unexpected, where)
    order = {name: index for index, name in enumerate(specs)}
    groups.sort(key=lambda group: min(order[name] for name in group.ours))
    return Plan(tuple(groups), {reason: tuple(names) for reason, names in reasons.items()})


def _instances(rule: Rule, layers: int) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The rule's names, once for every layer it speaks of."""
    per_layer = any("{i}" in name for name in (*rule.theirs, *rule.ours))
    for i in range(layers if per_layer else 1):
        yield (
            tuple(name.replace("{i}", str(i)) for name in rule.theirs),
            tuple(name.replace("{i}", str(i)) for name in rule.ours),
        )


def _check_rules(groups: Sequence[Group], specs: Mapping[str, ParamSpec]) -> None:
    """The family's table itself is total: a mistake there is ours, not the user's."""
    filled = [name for group in groups for name in group.ours]
    wrong = set(filled).symmetric_difference(specs)
    assert len(filled) == len(specs) and not wrong, wrong or "a parameter is filled twice"


def _check_tensors(
    groups: Sequence[Group],
    specs: Mapping[str, ParamSpec],
    tensors: Mapping[str, TensorInfo],
    unexpected: list[str],
    where: str,
) -> None:
    missing, misshapen, bad_dtype = [], [], []
    for group in groups:
        for name in group.theirs:
            info = tensors.get(name)
            if info is None:
                missing.append(name)
                continue
            if info.dtype not in SOURCE_DTYPES:
                bad_dtype.append(f"{name} ({info.dtype})")
            if group.convert is None and info.shape != (shape := specs[group.ours[0]].shape):
                misshapen.append(f"{name} (is {list(info.shape)}, must be {list(shape)})")
    problems = []
    for label, names in (
        ("missing tensors", missing),
        ("unexpected tensors", unexpected),
        ("wrong shapes", misshapen),
        ("unsupported dtypes", bad_dtype),
    ):
        if names:
            problems.append(f"{label} ({len(names)}): {listed(names)}")
    if bad_dtype:
        problems.append(f"supported dtypes are {', '.join(SOURCE_DTYPES)}")
    if problems:
        raise SourceError(f"the weights of {where} do not fit its config: {'; '.join(problems)}")
