"""Every family of the parity suite can be built for the cuda target, in one rank and in two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import BY_NAME, CASES

from llmforge.checkpoint.families import read_config
from llmforge.engine.build import check_topology
from llmforge.engine.cuda.target import CudaTarget, programs
from llmforge.engine.step import Limits
from llmforge.errors import BuildError
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

LIMITS = Limits(max_batch_size=2, max_seq_len=32, max_num_tokens=16, block_size=4, num_blocks=16)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_family_lowers(name: str, tmp_path: Path) -> None:
    BY_NAME[name].build(torch.float32).config.to_json_file(tmp_path / "config.json")
    _, config = read_config(tmp_path / "config.json")
    for topology in (Topology(), Topology(2), Topology(2, 1, 2), Topology(1, 2)):
        try:
            check_topology(config, topology)
        except BuildError:
            continue
        for rank in range(topology.world_size):
            graph = CudaTarget().prepare(trace(config, topology, rank))
            for program in programs(graph, LIMITS, "sm_90"):
                computed = {name for i in program.instructions for name in i.tensors}
                assert set(graph.outputs) <= computed
