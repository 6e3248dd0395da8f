"""Serving a list of requests to the end: what `llmforge run` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmforge.comm import Comm
from llmforge.engine.target import Executable
from llmforge.runtime.requests import Completion, Request
from llmforge.runtime.scheduler import check_requests
from llmforge.runtime.session import Session, follow

if TYPE_CHECKING:
    from llmforge.runtime.tokenizer import Tokenizer

__all__ = ["follow", "generate"]


def generate(
    executable: Executable,
    comm: Comm,
    requests: Sequence[Request],
    *,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_finish: Callable[[Completion], None] | None = None,
) -> list[Completion]:
    """Completions in the order of the requests. Call on rank 0, and `follow` on the others.

    on_text: called with (request index, piece of text) as the text comes; on_finish: with each
    completion as soon as it is whole, after its last piece. Raises RequestError before anything
    runs where a request cannot be served; the followers then return, too.
    """
    assert len({request.index for request in requests}) == len(requests), "an index twice"
    finished: dict[int, Completion] = {}
    with Session(
        executable, comm, vocab_size=vocab_size, tokenizer=tokenizer, on_text=on_text
    ) as session:
        check_requests(requests, executable.limits, vocab_size)
        for request in requests:
            session.add(request)
        while session.has_work:
            for completion in session.step():
                finished[completion.index] = completion
                if on_finish is not None:
                    on_finish(completion)
    return [finished[request.index] for request in requests]
