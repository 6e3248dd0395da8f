"""`RankBuilder`: a GraphBuilder that knows its rank: its layers, its shares of the parameters, and
the places where ranks meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.params import ParamSpec
from llmforge.model.builder import GraphBuilder
from llmforge.model.graph import Graph, Tensor
from llmforge.parallel import Topology


@dataclass(frozen=True)
class Share:
    """What this rank has of a sum over ranks, and a bias that is added to the sum, once."""

    value: Tensor
    bias: Tensor | None = None


class RankBuilder(GraphBuilder):
    """What a definition of a model writes the graph of `rank` with.

    `specs` are the model's parameters by name. A definition takes its first tensor from
    `embed_tokens` on the first stage and from `receive_hidden` on others, runs `layers`, and ends
    with `finish` on the last stage and with `send_hidden` on others.
    """

    def __init__(
        self, config: ModelConfig, topology: Topology, rank: int, specs: Mapping[str, ParamSpec]
    ) -> None:
        super().__init__(topology.tensor_parallel)
        self.config = config
        self.topology = topology
        self.rank = rank
        self.specs = specs
        self.tensor_rank = topology.tensor_rank(rank)
        self.layers = topology.layers(rank, config.num_layers)
        self.is_first_stage = topology.is_first_stage(rank)
        self.is_last_stage = topology.is_last_stage(rank)

    # -- this rank's shares of the parameters ----------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """The parameter `name`: of what is cut, this rank's piece."""
        spec = self.specs[name]
        ranks, groups = self.topology.tensor_parallel, self.topology.expert_parallel
        shape = spec.shard.local_shape(spec.shape, self.tensor_rank, ranks, groups)
        return self.parameter(name, shape, spec.stored_as(self.config))

    def bias(self, name: str) -> Tensor | None:
        """``NAME.bias``, where the model has it."""
        bias = f"{name}.bias"
        return self.weight(bias) if bias in self.specs else None

    def heads(self, count: int) -> int:
        """How many of `count` heads this rank has: its share, or one of which others have copies,
        as a parameter cut by head has them."""
        return max(1, count // self.topology.tensor_parallel)

    def column_linear(self, x: Tensor, name: str) -> Tensor:
        """The linear ``NAME.weight``, ``NAME.bias`` cut along its output features: each rank
        computes its own of them."""
        return self.linear(x, self.weight(f"{name}.weight"), self.bias(name))

    def row_linear(self, x: Tensor, name: str) -> Share:
        """The linear ``NAME.weight``, ``NAME.bias`` cut along its input features: each rank has
        its own of them, and so a share of the sum that the output is."""
        weight, bias = self.weight(f"{name}.weight"), self.bias(name)
        if self.topology.tensor_parallel == 1:
            return Share(self.linear(x, weight, bias))
        return Share(self.linear(x, weight), bias)

    # -- where ranks meet ------------------------------------------------------------------------

    def total(self, *shares: Share) -> Tensor:
        """The sum of all ranks' shares, whole on every rank. Several are added before the ranks
        meet, once."""
        result, *others = (share.value for share in shares)
        for other in others:
            result = self.add(result, other)
        if self.topology.tensor_parallel > 1:
            result = self.all_reduce(result)
        for share in shares:
            if share.bias is not None:
                result = self.add(result, share.bias)
        return result

    def embed_tokens(self, name: str) -> Tensor:
        """The step's tokens looked up in the parameter `name`, which is cut along the vocabulary:
        [tokens, hidden], whole on every rank."""
        weight = self.weight(name)
        start = self.tensor_rank * int(weight.shape[0])
        hidden = self.embed(self.inputs["token_ids"], weight, start=start)
        return self.all_reduce(hidden) if self.topology.tensor_parallel > 1 else hidden

    def receive_hidden(self) -> Tensor:
        """What the stage before sends: [tokens, hidden_size]."""
        shape = ("tokens", self.config.hidden_size)
        return self.recv(self._neighbour(-1), shape, self.config.dtype)

    def send_hidden(self, hidden: Tensor) -> Graph:
        """The graph of a stage that is not the last: `hidden` goes to the next. Rank 0 outputs
        the logits that the last stage sends it."""
        self.send(hidden, to=self._neighbour(+1))
        if self.rank != 0:
            return self.graph([])
        last = self.topology.rank(self.topology.pipeline_parallel - 1, 0)
        shape = ("rows", self.config.vocab_size)
        return self.graph([self.recv(last, shape, self.config.dtype)])

    def finish(self, logits: Tensor) -> Graph:
        """The graph of the last stage: `logits` [rows, ...] are those of this rank's share of the
        vocabulary. Every rank of the stage outputs all of them."""
        if self.topology.tensor_parallel > 1:
            logits = self.all_gather(logits, size=self.config.vocab_size)
        if self.topology.pipeline_parallel > 1 and self.tensor_rank == 0:
            self.send(logits, to=0)
        return self.graph([logits])

    def _neighbour(self, step: int) -> int:
        """The rank with this tensor rank, `step` stages on."""
        return self.topology.rank(self.topology.stage(self.rank) + step, self.tensor_rank)
