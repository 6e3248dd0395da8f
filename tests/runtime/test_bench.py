"""bench(): counts and times against a clock that the test turns."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from thread_comm import run_ranks
from toy_model import VOCAB, ToyExecutable, limits

from llmforge.comm import LocalComm
from llmforge.errors import SettingsError
from llmforge.runtime.bench import Distribution, bench, check_bench
from llmforge.runtime.environment import environment
from llmforge.runtime.session import follow
from llmforge.settings import BenchSettings

BIG = limits(max_batch_size=4, max_seq_len=32, max_num_tokens=64, num_blocks=32)


class Clock:
    """Seconds; each new token of a step takes one, and a step ten more."""

    now = 0.0

    def __call__(self):
        return self.now


class TimedExecutable(ToyExecutable):
    def __init__(self, limits, clock):
        super().__init__(limits)
        self.clock = clock

    def step(self, batch):
        self.clock.now += 10 + batch.num_tokens
        return super().step(batch)


def measure(settings, engine_limits=BIG, comm=None):
    clock = Clock()
    executable = TimedExecutable(engine_limits, clock)
    report = bench(
        executable,
        comm or LocalComm(),
        settings,
        vocab_size=VOCAB,
        engine_digest="sha256:1",
        environment={"cpu": "toy"},
        clock=clock,
    )
    return report, executable


def test_latency_of_static_batches():
    settings = BenchSettings(input_len=8, output_len=5, batch_size=(1, 3), warmup=2, repeat=3)
    report, executable = measure(settings)
    assert report.throughput is None and [r.batch_size for r in report.latency] == [1, 3]
    for result in report.latency:
        size = result.batch_size
        prefill, decode = 10 + 8 * size, 10 + size
        assert result.ttft == Distribution.of([prefill] * 3 * size)
        assert result.prefill == Distribution.of([prefill] * 3)
        assert result.tpot.count == 3 * size and result.tpot.p99 == decode
        assert result.decode_step == Distribution.of([decode] * 3 * 4)
        total = prefill + 4 * decode
        assert result.total.mean == total
        assert result.prefill_tokens_per_s == pytest.approx(8 * size / prefill)
        assert result.decode_tokens_per_s == pytest.approx(size / decode)
        assert result.output_tokens_per_s == pytest.approx(5 * size / total)
        assert result.total_tokens_per_s == pytest.approx(13 * size / total)
    # Warm-up ran, too: five runs of five steps each.
    assert len(executable.batches) == 2 * 5 * 5


def test_a_chunked_prefill_counts_until_the_last_first_token():
    tight = limits(max_batch_size=2, max_num_tokens=6, max_seq_len=32)
    settings = BenchSettings(input_len=8, output_len=3, batch_size=(2,), warmup=0, repeat=1)
    (result,) = measure(settings, tight)[0].latency
    # Steps: 6 | 2 + 4 | 1 + 4 | 1 + 1 | 1
    assert (result.ttft.minimum, result.prefill.mean, result.total.mean) == (32, 47, 70)
    assert result.decode_step.count == 1 and result.decode_step.mean == 12


def test_one_output_token_has_no_decode():
    settings = BenchSettings(input_len=4, output_len=1, warmup=0, repeat=1)
    (result,) = measure(settings)[0].latency
    assert result.tpot is None and result.decode_step is None
    assert result.decode_tokens_per_s is None
    assert result.total.mean == result.ttft.mean == 14


def test_throughput_keeps_the_wanted_number_in_flight():
    settings = BenchSettings(input_len=6, output_len=4, num_requests=7, concurrency=3, warmup=1)
    report, executable = measure(settings)
    result = report.throughput
    assert report.latency == () and (result.num_requests, result.concurrency) == (7, 3)
    # Three waves of four steps; the warm-up is one.
    assert result.num_steps == 12 and len(executable.batches) == 16
    assert [batch.num_sequences for batch in executable.batches[4:]] == [3] * 8 + [1] * 4
    seconds = 2 * ((10 + 18) + 3 * 13) + (10 + 6) + 3 * 11
    assert result.seconds == seconds
    assert result.output_tokens_per_s == pytest.approx(28 / seconds)
    assert result.total_tokens_per_s == pytest.approx(70 / seconds)
    assert result.requests_per_s == pytest.approx(7 / seconds)
    assert result.ttft.count == result.tpot.count == result.latency.count == 7
    assert result.latency.maximum == 28 + 39 and result.ttft.minimum == 16
    assert result.num_preemptions == 0


def test_concurrency_is_the_engines_unless_given():
    settings = BenchSettings(input_len=6, output_len=4, num_requests=9, warmup=0)
    assert measure(settings)[0].throughput.concurrency == 4


def test_every_repetition_has_the_same_prompts_and_a_seed_chooses_them():
    settings = BenchSettings(input_len=6, output_len=2, warmup=0, repeat=2)
    first, again, *_ = (b.token_ids.tolist() for b in measure(settings)[1].batches[::2])
    other = BenchSettings(input_len=6, output_len=2, warmup=0, repeat=1, seed=1)
    assert first == again != measure(other)[1].batches[0].token_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BenchSettings(input_len=30, output_len=3), "is 33 tokens, .* max_seq_len is 32; lower"),
        (BenchSettings(8, 8, batch_size=(1, 5)), "batch_size is 5, .* max_batch_size is 4"),
        (BenchSettings(8, 8, num_requests=9, concurrency=5), "concurrency is 5, .* is 4"),
        (BenchSettings(20, 12, batch_size=(3,)), "needs 24 KV-cache blocks, .* has 16"),
    ],
)
def test_an_engine_that_is_too_small(settings, message):
    small = limits(max_batch_size=4, max_seq_len=32, num_blocks=16)
    with pytest.raises(SettingsError, match=message):
        check_bench(settings, small)
    with pytest.raises(SettingsError, match=message):
        measure(settings, small)
    if settings.num_requests is None:
        check_bench(BenchSettings(20, 12, num_requests=3), small)


def test_report_is_json_and_followers_take_part():
    settings = BenchSettings(input_len=4, output_len=3, batch_size=(2,), warmup=0, repeat=1)

    def work(comm):
        if comm.rank:
            return follow(ToyExecutable(BIG), comm)
        return measure(settings, comm=comm)[0].to_dict()

    report = json.loads(json.dumps(run_ranks(2, work)[0]))
    assert report["engine_digest"] == "sha256:1" and report["environment"] == {"cpu": "toy"}
    assert report["latency"][0]["ttft"]["p50"] == 18 and report["throughput"] is None


def test_environment_is_plain_and_runtime_does_without_torch():
    found = json.loads(json.dumps(environment()))
    assert found["cores"] >= 1 and found["memory_bytes"] > 2**20 and found["cpu"]
    assert found["numpy"] and found["llmforge"]
    code = (
        "import sys, llmforge.runtime.bench as b, llmforge.runtime.generate, "
        "llmforge.runtime.requests\n"
        "from llmforge.runtime.environment import environment\n"
        "environment()\n"
        "assert not {'torch', 'mpi4py', 'tokenizers', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
