"""Everything llmforge raises for a user to read.

    LlmforgeError
     ├─ SettingsError      a command-line option, YAML key or value
     ├─ SourceError        what `convert` reads: files, config.json, weights
     │   └─ UnsupportedModelError   an architecture or feature that no family describes
     ├─ DefinitionError    a model definition or pass of the user's own
     ├─ StoreError         a checkpoint or engine directory: missing, corrupt, of another version
     ├─ OutputError        where a result was to be written: exists, not writable, disk full
     ├─ BuildError         a model, layout and limits that cannot work together
     │   └─ MemoryLimitError        ... because they need more memory than there is
     ├─ TargetError        a target that is unknown or not available on this machine
     ├─ RankError          an engine started with the wrong number of ranks, or a rank that failed
     ├─ RequestError       a prompt or sampling parameter that the engine cannot serve
     └─ VerificationError  checksums or logits that are not what they should be

Each message is one sentence that says what is wrong, with which value, what is allowed, and
what to do. The command line prints it as one line, without a traceback.
"""


class LlmforgeError(Exception):
    """Base of every error that is the user's to mend. `exit_code` is the process's status."""

    exit_code = 1


class SettingsError(LlmforgeError):
    """An option, YAML key or value is not allowed."""

    exit_code = 2


class SourceError(LlmforgeError):
    """The model given to `convert` cannot be read or is not whole."""


class UnsupportedModelError(SourceError):
    """The model's architecture, or a feature its config asks for, is not supported."""


class DefinitionError(LlmforgeError):
    """A file of the user's own that defines a model or a pass cannot be used."""


class StoreError(LlmforgeError):
    """A checkpoint or engine directory cannot be used."""


class OutputError(LlmforgeError):
    """A result cannot be written where it was asked for."""


class BuildError(LlmforgeError):
    """The model cannot be built with this layout and these limits."""


class MemoryLimitError(BuildError):
    """The engine needs more memory than is allowed or present."""


class TargetError(LlmforgeError):
    """The target is unknown, or cannot be used on this machine."""


class RankError(LlmforgeError):
    """The job has the wrong number of ranks, or a rank of it failed."""


class RequestError(LlmforgeError):
    """A request cannot be served by this engine."""


class VerificationError(LlmforgeError):
    """A checksum or a comparison failed."""
