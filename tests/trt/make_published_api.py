"""Writes published_api.json: the names and arguments of TensorRT's Python bindings by version.

    python tests/trt/make_published_api.py CLONE_OF_NVIDIA_TENSORRT

The bindings' C++ sources at each release's tag are read for the classes, methods, properties and
enumerators that they declare.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TAGS = {
    "8.6": "v8.6.1",
    "10.0": "v10.0.1",
    "10.8": "v10.8.0",
    "10.13": "v10.13.3",
    "10.14": "v10.14",
    "10.15": "v10.15",
    "10.16": "v10.16",
    "11.1": "v11.1",
}
FILES = ("pyCore.cpp", "pyFoundationalTypes.cpp", "pyGraph.cpp")
_START = re.compile(r'py::(class_|enum_)<([^;{}]*?)>\s*(?:\w+\s*)?[({]\s*m,\s*"(\w+)"', re.DOTALL)
_MEMBER = re.compile(
    r'\.(def|def_static|def_property|def_property_readonly|def_readwrite|value)\s*\(\s*"(\w+)"'
)
_ARGUMENT = re.compile(r'(?:py::arg\()?"(\w+)"(?:_a|\))\s*(=)?')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def bindings(source: str) -> dict[str, Any]:
    """The classes of a source: {name: {"bases": [...], "members": {name: [form, ...]}}}. A form is
    "(query, key=)" of a method, where "=" marks what may be left out, and "" of anything else."""
    source = _COMMENT.sub("", source)
    starts = list(_START.finditer(source))
    found: dict[str, Any] = {}
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        body = source[start.end() : after.start() if after else len(source)]
        entry = found.setdefault(start[3], {"bases": _bases(start), "members": {}})
        for member in _MEMBER.finditer(body):
            call = _balanced(body, member.start())
            arguments = ", ".join(name + default for name, default in _ARGUMENT.findall(call))
            form = f"({arguments})" if member[1] in ("def", "def_static") else ""
            entry["members"].setdefault(member[2], []).append(form)
    return found


def _bases(start: re.Match[str]) -> list[str]:
    names = [part.strip() for part in start[2].split(",")[1:]]
    return [name for name in names if re.fullmatch(r"I[A-Z]\w+", name)]


def _balanced(text: str, start: int) -> str:
    """The call that starts here, to its closing parenthesis."""
    depth = 0
    for index in range(text.index("(", start), len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return text[start:index]
    return text[start:]


def main(clone: str) -> None:
    table: dict[str, dict[str, Any]] = {}
    for version, tag in TAGS.items():
        for file in FILES:
            path = f"{tag}:python/src/infer/{file}"
            source = subprocess.run(
                ["git", "-C", clone, "show", path], check=True, capture_output=True, text=True
            ).stdout
            for name, entry in bindings(source).items():
                known = table.setdefault(name, {"bases": entry["bases"], "members": {}})
                for member, forms in entry["members"].items():
                    versions = known["members"].setdefault(member, {})
                    for form in dict.fromkeys(forms):
                        versions.setdefault(form, []).append(version)
    lines = [f"  {json.dumps(name)}: {_line(table[name])}" for name in sorted(table)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (Path(__file__).parent / "published_api.json").write_text(text)


def _line(entry: dict[str, Any]) -> str:
    """A class, whose members are in all versions where none are named."""
    every = list(TAGS)
    members = {
        name: {form: [] if versions == every else versions for form, versions in forms.items()}
        for name, forms in entry["members"].items()
    }
    return json.dumps({"bases": entry["bases"], "members": members}, separators=(",", ":"))


if __name__ == "__main__":
    main(sys.argv[1])
