"""NeMo models of the GPT and Llama type: .nemo archives, unpacked ones, NeMo 2 directories.

nemo_config.py reads the config and nemo_weights.py the weights, which say where each layout is
defined. The tokenizer lies in the archive, or in NeMo 2's context/.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from llmforge.artifact import Warn, no_warning
from llmforge.checkpoint.mapping import Ignore
from llmforge.checkpoint.sources.blocks import Pieced
from llmforge.checkpoint.sources.files import Tree, archive_tree, directory_tree
from llmforge.checkpoint.sources.nemo_config import (
    CONFIG_1,
    CONFIG_2,
    NemoConfig,
    read_nemo_config,
)
from llmforge.checkpoint.sources.nemo_weights import EMBEDDING, HEAD, IGNORED, nemo_weights, rules
from llmforge.checkpoint.sources.pieced import TIED_HEAD, PiecedSource
from llmforge.checkpoint.sources.tokens import Tokens, tokens
from llmforge.checkpoint.tokenizer_files import FILES
from llmforge.errors import SourceError

_MAGICS = ((0, b"\x1f\x8b"), (257, b"ustar"))
# Fields of NeMo 1's tokenizer section → the names under which their files are known elsewhere.
_TOKENIZER_FIELDS = {
    "model": "tokenizer.model",
    "vocab_file": "vocab.json",
    "merge_file": "merges.txt",
}


def is_nemo(path: Path) -> bool:
    """Whether this looks like an archive, an unpacked one, or a NeMo 2 directory."""
    if path.is_dir():
        return (path / CONFIG_1).is_file() or all(
            (path / x).is_dir() for x in ("context", "weights")
        )
    if path.suffix == ".nemo":
        return True
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return False
    return any(head[at : at + len(magic)] == magic for at, magic in _MAGICS)


def nemo_source(path: Path, scratch: Path, warn: Warn = no_warning) -> PiecedSource:
    """Open a model. What has to be unpacked, a compressed archive or the tokenizer, goes into
    `scratch`, which the caller removes. Raises SourceError and UnsupportedModelError."""
    archive = not path.is_dir()
    tree = archive_tree(path, scratch / "unpacked") if archive else directory_tree(path)
    tree = _root(tree)
    if CONFIG_1 not in tree.files and CONFIG_2 not in tree.files:
        if "context/io.json" in tree.files:
            raise SourceError(
                f"{tree.label} has context/io.json but no {CONFIG_2}: it was saved by a NeMo whose "
                "files leave out what the model's class implies; load it with a later NeMo and "
                "save it again"
            )
        raise SourceError(f"{tree.label} has neither {CONFIG_1} (NeMo 1) nor {CONFIG_2} (NeMo 2)")
    nemo = read_nemo_config(tree)
    form, pieces = nemo_weights(tree, nemo)
    tokenizer = _unpack_tokenizer(tree, nemo, scratch / "tokenizer", warn)
    found = tokens(tokenizer)
    pieces = _trimmed(pieces, nemo, found, tree.label, warn)
    config = dataclasses.replace(
        nemo.config,
        vocab_size=pieces[EMBEDDING].shape[0],
        bos_token_id=found.bos,
        eos_token_ids=found.eos,
    )
    head = (Ignore(re.escape(HEAD), TIED_HEAD),) if config.tied_embeddings else ()
    version = "NeMo" if CONFIG_1 in tree.files else "NeMo 2"
    config_part = tree.require(CONFIG_1 if CONFIG_1 in tree.files else CONFIG_2)
    return PiecedSource(
        kind=f"{version} {'archive' if archive else 'directory'}, {form}",
        config=config,
        pieces=pieces,
        rules=rules(nemo.less_one),
        ignored=(*IGNORED, *head),
        description={
            "source": "nemo",
            "name": path.resolve().name,
            "family": config.family,
            "config_sha256": hashlib.sha256(config_part.read()).hexdigest(),
            "weights": sum(part.size for part in tree.files.values()),
        },
        tokenizer_directory=tokenizer,
        where=str(path),
        warn=warn,
    )


def _root(tree: Tree) -> Tree:
    """The tree below the one folder in which everything lies, if it is so."""
    if CONFIG_1 in tree.files or CONFIG_2 in tree.files:
        return tree
    folders = {name.partition("/")[0] for name in tree.files}
    if len(folders) == 1 and not set(tree.files) & folders:
        return tree.below(folders.pop())
    return tree


def _trimmed(
    pieces: Mapping[str, Pieced], nemo: NemoConfig, found: Tokens, where: str, warn: Warn
) -> dict[str, Pieced]:
    """Without the rows that pad the vocabulary, where config or tokenizer tell which they are
    (vocab_size_with_padding: up to a multiple of padded_to)."""
    if EMBEDDING not in pieces:
        raise SourceError(f"the weights of {where} lack {EMBEDDING}")
    rows = pieces[EMBEDDING].shape[0]
    size = nemo.vocabulary or found.size
    if size is None or size > rows or (size != rows and rows != _padded(size, nemo.padded_to)):
        told = "no tokenizer tells" if size is None else f"a vocabulary of {size} does not explain"
        warn(
            f"{told} how many of the embedding's {rows} rows pad it: all of them are taken for "
            "tokens"
        )
        size = rows
    tables = {name: pieces[name].rows(0, size) for name in (EMBEDDING, HEAD) if name in pieces}
    return {**pieces, **tables}


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# -- tokenizer -------------------------------------------------------------------------------------


def _unpack_tokenizer(tree: Tree, nemo: NemoConfig, directory: Path, warn: Warn) -> Path:
    """Copy the tokenizer's files into `directory`, under their usual names."""
    directory.mkdir(parents=True)
    named = _named_files(tree, nemo) or _known_files(tree)
    if not named and nemo.tokenizer.get("type"):
        warn(
            f"the tokenizer is not in {tree.label}, which names {nemo.tokenizer['type']}: put its "
            "tokenizer.json and tokenizer_config.json into the checkpoint's tokenizer directory"
        )
    for name, path in named.items():
        (directory / name).write_bytes(tree.files[path].read())
    return directory


def _named_files(tree: Tree, nemo: NemoConfig) -> dict[str, str]:
    """Those that NeMo 1's config names ("nemo:NAME" within the archive)."""
    found = {}
    for field, name in _TOKENIZER_FIELDS.items():
        value = nemo.tokenizer.get(field)
        if isinstance(value, str):
            base = PurePosixPath(value.removeprefix("nemo:")).name
            if base in tree.files:
                found[name] = base
    return found


def _known_files(tree: Tree) -> dict[str, str]:
    """Those with usual names, in the first folder that has a tokenizer."""
    marks = ("tokenizer.json", "tokenizer.model", "vocab.json")
    folders = sorted({str(PurePosixPath(p).parent) for p in tree.files if p.endswith(marks)})
    if not folders:
        return {}
    here = "" if folders[0] == "." else f"{folders[0]}/"
    found = {name: f"{here}{name}" for name in FILES if f"{here}{name}" in tree.files}
    generation = [p for p in tree.files if p.endswith("/generation_config.json")]
    return {**({"generation_config.json": generation[0]} if generation else {}), **found}
