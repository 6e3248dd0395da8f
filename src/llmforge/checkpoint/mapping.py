"""From foreign tensors to ours: rules, and the plan that they give for one model.

A plan is total: every parameter is filled exactly once, and every tensor of the source is used or
ignored for a stated reason. `make_plan` names everything that is not so in one message.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmforge.artifact import listed
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.params import ParamSpec, parameters
from llmforge.checkpoint.quantized import with_scales
from llmforge.errors import SourceError
from llmforge.safetensors_io import Array, TensorInfo

SOURCE_DTYPES = ("float64", "float32", "float16", "bfloat16")

Convert = Callable[[list[Array], ModelConfig], list[Array]]


@dataclass(frozen=True)
class Rule:
    """Tensors named `theirs` become the parameters named `ours`. ``{i}`` stands for the layer.

    `convert` gets the arrays of `theirs` in order, whole, and gives those of `ours`, in any
    floating dtype; without it there is one of each and the values are the same.

    A stack of experts, a single parameter, is filled expert by expert. Either ``{e}`` in `theirs`
    stands for the expert, or, with `by_expert`, each of `theirs` has the experts one after another
    in its first dimension, in runs of equal size. `convert` gets and gives what belongs to one
    expert; without it, what `theirs` have of an expert lies end to end.

    Rules with the same `ours` are alternatives: the one with the most of its tensors in the source
    counts. `dtypes` are those that `theirs` may have.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    convert: Convert | None = None
    by_expert: bool = False
    dtypes: tuple[str, ...] = SOURCE_DTYPES

    @property
    def stacks(self) -> bool:
        return self.by_expert or any("{e}" in name for name in self.theirs)

    def __post_init__(self) -> None:
        assert len(self.ours) == 1 if self.stacks else True, self
        assert self.convert or self.stacks or len(self.theirs) == len(self.ours) == 1, self


@dataclass(frozen=True)
class Ignore:
    """Source tensors whose whole name matches `pattern` are not needed, because of `reason`."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Group:
    """One rule at one layer: what is read together. `nbytes`: the source's bytes.

    part: it fills a run of its parameter, the next one; groups of a parameter stand in order.
    rows: of each tensor, only this run of its first dimension takes part.
    shape: that the first of `theirs` must have; (): whatever `convert` takes.
    own_dtype: its parameters are stored in one that is not the model's.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    convert: Convert | None
    nbytes: int
    part: bool = False
    rows: tuple[int, int] | None = None
    shape: tuple[int, ...] = ()
    own_dtype: bool = False
    dtypes: tuple[str, ...] = SOURCE_DTYPES


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
        with_scales(group, tensors)
        for rule in _chosen(rules, config, specs, tensors)
        for group in _groups(rule, config, specs, tensors)
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
    _check_tensors(groups, tensors, unexpected, where)
    order = {name: index for index, name in enumerate(specs)}
    groups.sort(key=lambda group: min(order[name] for name in group.ours))
    return Plan(tuple(groups), {reason: tuple(names) for reason, names in reasons.items()})


def _chosen(
    rules: Iterable[Rule],
    config: ModelConfig,
    specs: Mapping[str, ParamSpec],
    tensors: Mapping[str, TensorInfo],
) -> Iterable[Rule]:
    """The rules, each at every layer where it fills a parameter; of alternatives, the best."""
    at_layers = [rule for r in rules for rule in _at_layers(r, config.num_layers)]
    alternatives: dict[tuple[str, ...], list[Rule]] = {}
    for rule in at_layers:
        if any(name in specs for name in rule.ours):
            alternatives.setdefault(rule.ours, []).append(rule)

    def present(rule: Rule) -> float:
        names = [name.replace("{e}", "0") for name in rule.theirs]
        return sum(name in tensors for name in names) / len(names)

    return [max(several, key=present) for several in alternatives.values()]


def _at_layers(rule: Rule, layers: int) -> Iterable[Rule]:
    """The rule, once for every layer if it speaks of layers."""
    if not any("{i}" in name for name in (*rule.theirs, *rule.ours)):
        yield rule
        return
    for i in range(layers):
        theirs, ours = (
            tuple(name.replace("{i}", str(i)) for name in names)
            for names in (rule.theirs, rule.ours)
        )
        yield dataclasses.replace(rule, theirs=theirs, ours=ours)


def _groups(
    rule: Rule,
    config: ModelConfig,
    specs: Mapping[str, ParamSpec],
    tensors: Mapping[str, TensorInfo],
) -> Iterable[Group]:
    """What a rule at a layer reads together: all of it, or what belongs to one expert, or, if
    nothing is to be converted, each tensor by itself."""

    def group(theirs: tuple[str, ...], shape: tuple[int, ...] = (), **more: Any) -> Group:
        size = sum(tensors[name].nbytes for name in theirs if name in tensors)
        return Group(
            theirs,
            rule.ours,
            rule.convert,
            size,
            shape=shape,
            own_dtype=all(specs[name].dtype for name in rule.ours if name in specs),
            dtypes=rule.dtypes,
            **more,
        )

    if not rule.stacks:
        # A rule may also name parameters that this model has not; see _check_rules.
        spec = specs.get(rule.ours[0])
        yield group(rule.theirs, shape=() if rule.convert or spec is None else spec.shape)
        return
    assert config.moe is not None
    count, shape = config.moe.num_experts, specs[rule.ours[0]].shape[1:]
    for expert in range(count):
        theirs = tuple(name.replace("{e}", str(expert)) for name in rule.theirs)
        if rule.by_expert:
            rows = _rows_of_expert(expert, count, theirs, tensors)
            one = group(theirs, part=True, rows=rows)
            yield dataclasses.replace(one, nbytes=one.nbytes // count)
        elif rule.convert:
            yield group(theirs, part=True)
        else:
            for name in theirs:
                yield group((name,), (shape[0] // len(theirs), *shape[1:]), part=True)


def _rows_of_expert(
    expert: int, count: int, theirs: tuple[str, ...], tensors: Mapping[str, TensorInfo]
) -> tuple[int, int]:
    """The run of the first dimension, the same for all of `theirs`; all of it where they cannot be
    cut, so that the result has the wrong shape and is reported."""
    sizes = {tensors[name].shape[0] for name in theirs if name in tensors and tensors[name].shape}
    if len(sizes) != 1 or (size := sizes.pop()) % count:
        return 0, 0
    each = size // count
    return expert * each, (expert + 1) * each


def _check_rules(groups: Sequence[Group], specs: Mapping[str, ParamSpec]) -> None:
    """The family's table itself is total: a mistake there is ours, not the user's."""
    whole = [name for group in groups if not group.part for name in group.ours]
    filled = [*whole, *{name for group in groups if group.part for name in group.ours}]
    wrong = set(filled).symmetric_difference(specs)
    assert len(filled) == len(specs) and not wrong, wrong or "a parameter is filled twice"


def _check_tensors(
    groups: Sequence[Group],
    tensors: Mapping[str, TensorInfo],
    unexpected: list[str],
    where: str,
) -> None:
    # Dictionaries because a tensor of several groups is told once.
    missing: dict[str, None] = {}
    misshapen: dict[str, None] = {}
    bad_dtype: dict[str, None] = {}
    for group in groups:
        for name in group.theirs:
            info = tensors.get(name)
            if info is None:
                missing[name] = None
                continue
            if info.dtype not in group.dtypes:
                bad_dtype[f"{name} ({info.dtype})"] = None
            if group.rows == (0, 0):
                misshapen[f"{name} (is {list(info.shape)}, which is no stack of experts)"] = None
            if name == group.theirs[0] and group.shape and info.shape != group.shape:
                shapes = f"is {list(info.shape)}, must be {list(group.shape)}"
                misshapen[f"{name} ({shapes})"] = None
    problems = []
    for label, names in (
        ("missing tensors", list(missing)),
        ("unexpected tensors", unexpected),
        ("wrong shapes", list(misshapen)),
        ("unsupported dtypes", list(bad_dtype)),
    ):
        if names:
            problems.append(f"{label} ({len(names)}): {listed(names)}")
    if bad_dtype:
        problems.append(f"supported dtypes are {', '.join(SOURCE_DTYPES)}")
    if problems:
        raise SourceError(f"the weights of {where} do not fit its config: {'; '.join(problems)}")
