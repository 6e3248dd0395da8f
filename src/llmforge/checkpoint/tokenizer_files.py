"""The files that travel with the weights: tokenizer, generation config and chat template.

Whatever is wrong with them is a warning, and a file that cannot be read stays behind: without a
tokenizer a checkpoint works with token ids.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from llmforge.artifact import Warn
from llmforge.checkpoint import sentencepiece

TOKENIZER_JSON = "tokenizer.json"
FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Those that are read when an engine runs, and what they may hold.
_JSON: dict[str, tuple[type, ...]] = {
    "tokenizer_config.json": (dict,),
    "generation_config.json": (dict,),
    "chat_template.json": (dict, list, str),
}
_IDS_ONLY = "the checkpoint will work with token ids only"


def copy_tokenizer(source: Path, destination: Path, warn: Warn, where: str = "") -> list[str]:
    """Copy what there is of FILES from `source` into `destination`, which is made for it, and make
    a tokenizer.json where there are only older files. Returns the names of the files written.
    Warnings name `where`, or else `source`."""
    where = where or str(source)
    files: dict[str, bytes] = {}
    for name in FILES:
        try:
            data = (source / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            warn(f"{name} of {where} cannot be read ({error.strerror}) and is left out")
            continue
        if problem := _problem(name, data):
            warn(f"{name} of {where} {problem} and is left out")
            continue
        files[name] = data
    names = list(files)
    if not names:
        warn(f"there is no tokenizer in {where}: {_IDS_ONLY}")
        return []
    destination.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (destination / name).write_bytes(data)
    path = destination / TOKENIZER_JSON
    if TOKENIZER_JSON not in names and not _make_tokenizer_json(destination, names, warn):
        return names
    if problem := _load_problem(path):
        path.unlink()
        warn(f"{TOKENIZER_JSON} of {where} cannot be loaded ({problem}): {_IDS_ONLY}")
        return [name for name in names if name != TOKENIZER_JSON]
    return names if TOKENIZER_JSON in names else [TOKENIZER_JSON, *names]


def _problem(name: str, data: bytes) -> str | None:
    """Why the file would be refused when an engine runs, if so."""
    try:
        if name == "chat_template.jinja":
            data.decode()
        elif name in _JSON and not isinstance(json.loads(data), _JSON[name]):
            return "is not a JSON object"
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({error})"
    return None


def _make_tokenizer_json(directory: Path, names: list[str], warn: Warn) -> bool:
    """Make tokenizer.json from the older files in `directory`; warns where that fails."""
    byte_level = "vocab.json" in names and "merges.txt" in names
    if "tokenizer.model" not in names and not byte_level:
        warn(f"there is no tokenizer.json, tokenizer.model or vocab.json + merges.txt: {_IDS_ONLY}")
        return False
    try:
        if "tokenizer.model" in names and not _names_class(directory):
            _from_sentencepiece(directory)
        elif importlib.util.find_spec("transformers"):
            _from_transformers(directory)
        elif byte_level:
            _from_vocab_and_merges(directory)
        else:
            warn(
                "converting this tokenizer.model needs transformers and sentencepiece (pip install "
                f"transformers sentencepiece); without them {_IDS_ONLY}"
            )
            return False
    except Exception as error:  # whatever a foreign tokenizer raises, the weights are fine
        (directory / TOKENIZER_JSON).unlink(missing_ok=True)
        warn(f"the tokenizer could not be converted ({_first_line(error)}): {_IDS_ONLY}")
        return False
    return True


def _names_class(directory: Path) -> bool:
    """Whether a file of transformers' says which class reads the tokenizer, and how."""
    path = directory / "tokenizer_config.json"
    return path.is_file() and "tokenizer_class" in json.loads(path.read_bytes())


def _from_sentencepiece(directory: Path) -> None:
    model = sentencepiece.parse((directory / "tokenizer.model").read_bytes())
    sentencepiece.tokenizer(model).save(str(directory / TOKENIZER_JSON))
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        path.write_text(json.dumps(sentencepiece.config(model)))


def _from_transformers(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        directory, use_fast=True, trust_remote_code=False, local_files_only=True
    )
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("transformers has no fast tokenizer for it")
    backend.save(str(directory / TOKENIZER_JSON))


def _from_vocab_and_merges(directory: Path) -> None:
    """Byte-level BPE as GPT-2 and its descendants have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = str(directory / "vocab.json"), str(directory / "merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = directory / "added_tokens.json"
    if added.is_file():
        ids = json.loads(added.read_bytes())
        for token in sorted(ids, key=ids.__getitem__):
            tokenizer.add_special_tokens([AddedToken(token, special=True)])
    tokenizer.save(str(directory / TOKENIZER_JSON))


def _load_problem(path: Path) -> str | None:
    if not importlib.util.find_spec("tokenizers"):
        return None
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
