"""Two real processes: sums and joins, a rank that dies, a rank that hangs, and a packed model cut between groups."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.models.parity import BLOCK, TOTAL, admit, served
from tests.models.test_packed_gguf import write
from tests.models.tiny import sized
from tests.parallel.pair import Pair
from textmill.config import Settings
from textmill.core import Admission, Image, RunnerLimits, Sampling, SlotWork, Step
from textmill.errors import ConfigError, ModelError
from textmill.kernels.native import Program
from textmill.kernels.rows import Rows, Unrecordable
from textmill.models.registry import build_model
from textmill.parallel.group import RankLost
from textmill.parallel.processes import Ranks
from textmill.runner.orders import Channel, Failure, Order, Plan
from textmill.runner.ranks import LeadingExecutor
from textmill.runner.runner import LocalRunner
from textmill.runner.sharded import agreed, read_part
from textmill.runner.slots import apply
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.source import ModelSource
from textmill.weights.view import View

SIZES = (4, TOTAL, BLOCK, 64)

PARTNER = """
import sys, time
from pathlib import Path
import torch
from textmill.parallel.processes import Ranks
group = Ranks(1, 2)
group.join(Path(sys.argv[1]), seconds=20)
x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
assert group.all_reduce(x.clone()).tolist() == [[11.0, 22.0], [33.0, 44.0]]
assert group.gather(x) is x
print("computed", flush=True)
time.sleep(60)
"""

LEADER = """
import os, signal, subprocess, sys, time
from pathlib import Path
import torch
from textmill.parallel.group import RankLost
from textmill.parallel.processes import Ranks
partner = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE)
group = Ranks(0, 2)
group.join(Path(sys.argv[1]), seconds=2)
x = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
assert group.all_reduce(x.clone()).tolist() == [[11.0, 22.0], [33.0, 44.0]]
assert group.gather(x).tolist() == [[10.0, 20.0, 1.0, 2.0], [30.0, 40.0, 3.0, 4.0]]
partner.stdout.readline()
os.kill(partner.pid, int(sys.argv[3]))
started = time.monotonic()
try:
    group.all_reduce(x)
except RankLost as error:
    print(round(time.monotonic() - started, 1), error, flush=True)
partner.kill()
os._exit(0)
"""


@pytest.mark.parametrize(("number", "limit"), [(signal.SIGKILL, 1.8), (signal.SIGSTOP, 8.0)])
def test_sums_and_joins_until_a_rank_dies_or_hangs(tmp_path: Path, number: signal.Signals, limit: float) -> None:
    arguments = [sys.executable, "-c", LEADER, str(tmp_path / "meeting"), PARTNER, str(int(number))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    seconds, _, words = done.stdout.partition(" ")
    assert words.startswith("rank 0 hears nothing from another one"), done.stderr
    assert float(seconds) < limit


def test_a_sum_over_ranks_is_not_recordable() -> None:
    program = Program(max_rows=8, max_slots=1, max_total_tokens=16, vocab_size=8)
    with pytest.raises(Unrecordable, match="sum over ranks"):
        Ranks(0, 2).all_reduce(Rows(program, 0, 8))


def test_orders_cross_whole() -> None:
    image = Image(0, 1, b"\x00\xff", (1, 1, 1, 2), (1, 2), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), b"digest")
    admission = Admission(3, (1, 2), Sampling(seed=(1 << 64) - 1), 2, True, (5,), (image,))
    work = (SlotWork(3, 0, 2, True), SlotWork(1, 7, 3, True, (8, 9)))
    order = Order(((1, (4,)),), (Step(7, work, (admission,), (2,), ((3, 0, (5, 6)),)),), work)
    ours, theirs = socket.socketpair()
    Channel(ours).send(order)
    assert Channel(theirs).receive() == order
    ours.close()
    theirs.close()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_a_packed_model_on_two_ranks(tmp_path: Path, pair: Pair, kind: str) -> None:
    """Packed matrices are cut where activations' chunks end, so both ways round the same numbers."""
    write(tmp_path / "tiny.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    prompt = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 40).tolist()
    alone = TorchExecutor(build_model(checkpoint.config, View(checkpoint)), *SIZES)
    both = pair.executor(tmp_path / "tiny.gguf", SIZES)
    for executor in (alone, both):
        admit(executor, 0, prompt, all_logits=True)
        executor.run([SlotWork(0, 0, 40, False)])
    error = (both.logits - alone.logits).abs() / alone.logits.std()
    assert float(error.median()) < 1e-2  # see tests/models/test_packed_gguf.py: values on the edge between two codes
    assert float(error.max()) < 0.1
    assert pair.finish() == []


def test_guesses_are_verified_on_two_ranks(tmp_path: Path, pair: Pair) -> None:
    """A draft of one right and one wrong guess: the tokens, and the state they leave, are those of single steps."""
    sized("llama")(tmp_path)
    prompt = [5, 6, 7, 8]
    executor = pair.executor(tmp_path, SIZES)
    admit(executor, 0, prompt)
    expected = greedy_tokens(executor, 0, len(prompt), 6)
    step = Step(2, (SlotWork(1, 0, 4, True),), (Admission(1, tuple(prompt), Sampling()),), (), ((1, 0, (40, 41)),))
    apply(step, executor.tables)
    executor.run(step.work)
    draft = (expected[1], (expected[2] + 1) % 160)
    step = Step(3, (SlotWork(1, 4, 3, True, draft),))
    apply(step, executor.tables)
    [sampled] = executor.run(step.work)
    assert sampled.token is not None
    assert [token.id for token in (sampled.token, *sampled.more)] == expected[1:3]
    assert greedy_tokens(executor, 1, 6, 3, prompt=False) == expected[3:]
    pair.finish()


def greedy_tokens(executor: TorchExecutor, slot: int, start: int, count: int, *, prompt: bool = True) -> list[int]:
    """Chosen one by one; `start`: the known tokens, of which all but one are computed unless it is a `prompt`."""
    first = SlotWork(slot, 0, start, True) if prompt else SlotWork(slot, start, 1, True)
    tokens: list[int] = []
    for step in range(count):
        base = start - 1 if prompt else start
        [sampled] = executor.run([SlotWork(slot, base + step, 1, True) if step else first])
        assert sampled.token is not None
        tokens.append(sampled.token.id)
    return tokens


def test_a_group_that_lost_a_rank_stays_lost(tmp_path: Path) -> None:
    sized("llama")(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ours, theirs = socket.socketpair()
    model = build_model(checkpoint.config, View(checkpoint, group=Ranks(0, 2)))
    executor = LeadingExecutor(model, *SIZES, [Channel(ours)])
    runner = LocalRunner(executor, RunnerLimits(BLOCK, 64, 4, 64, TOTAL, 160))
    theirs.close()
    for number in range(2):
        work = (SlotWork(0, 0, 2, True),)
        runner.submit(Step(number, work, (Admission(0, (5, 6), Sampling()),), (), ((0, 0, (number,)),)))
        with pytest.raises(RankLost, match="another rank takes no messages"):
            runner.collect()
        assert not runner.alive
    runner.close()
    ours.close()


def test_a_rank_that_says_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others say that they miss one, too; rank 2 is silent."""
    sized("llama")(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ends = [socket.socketpair() for _ in range(3)]
    group = Ranks(0, 4)

    def hears_nothing(_x: object) -> object:
        raise RankLost("rank 0 hears nothing")

    monkeypatch.setattr(group, "all_reduce", hears_nothing)
    model = build_model(checkpoint.config, View(checkpoint, group=group))
    executor = LeadingExecutor(model, *SIZES, [Channel(ours) for ours, _ in ends])
    admit(executor, 0, [5, 6])
    for rank in (1, 3):
        Channel(ends[rank - 1][1]).send(Failure("hears nothing"))
    with pytest.raises(RankLost, match="rank 2 does not answer"):
        executor.run([SlotWork(0, 0, 2, True)])
    for end in (end for pair in ends for end in pair):
        end.close()


def test_heads_that_do_not_divide_are_named_at_the_start(tmp_path: Path) -> None:
    sized("llama")(tmp_path)
    with pytest.raises(ConfigError, match=r"4 attention heads with 2 key/value heads .* over 3 ranks; .* be 1, 2, 4$"):
        read_part(Settings(), ModelSource("m", tmp_path, "safetensors", ""), 0, 3)


def test_a_gguf_file_as_floats_on_two_ranks(tmp_path: Path, pair: Pair) -> None:
    """What `--num-shard` serves of a GGUF file; queries and keys are stored in another order of rows."""
    write(tmp_path / "tiny.gguf", "Q8_0")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf", dequantize=True)
    alone = TorchExecutor(build_model(checkpoint.config, View(checkpoint)), *SIZES)
    both = pair.executor(tmp_path / "tiny.gguf", SIZES, dequantize=True)
    for executor in (alone, both):
        admit(executor, 0, list(range(40)), all_logits=True)
        executor.run([SlotWork(0, 0, 40, False)])
    np.testing.assert_allclose(both.logits, alone.logits, atol=1e-4, rtol=1e-4)
    pair.finish()


def test_preempted_and_cached_on_two_ranks(tmp_path: Path, pair: Pair) -> None:
    """The whole engine over the group, with half the blocks it needs: slots are taken, freed and taken again."""
    sized("llama")(tmp_path)
    shared = [7 + 3 * n for n in range(40)]
    prompts = [shared[: 16 * (n % 3)] + [5 + 7 * n + m for m in range(6 + 5 * n)] for n in range(5)]
    checkpoint = open_checkpoint(tmp_path)
    alone = TorchExecutor(build_model(checkpoint.config, View(checkpoint)), 8, TOTAL, BLOCK, 96)
    expected, _ = served(alone, 160, prompts)
    found, stats = served(pair.executor(tmp_path, (8, TOTAL, BLOCK, 10)), 160, prompts, blocks=10, chunk=24)
    assert found == expected
    assert stats["preemptions"] > 0
    assert stats["prefix_hit_tokens"] > 0
    pair.finish()


def test_all_ranks_get_the_smallest_cache(tmp_path: Path) -> None:
    sized("llama")(tmp_path)
    settings = Settings(max_total_tokens=256, max_batch_total_tokens=1024, max_concurrent_requests=8)
    part = read_part(settings, ModelSource("m", tmp_path, "safetensors", ""), 0, 4)
    assert (part.cache.num_blocks, part.shape.max_slots) == (64, 8)
    ends = [socket.socketpair() for _ in range(2)]
    leaders, others = [Channel(one) for one, _ in ends], [Channel(other) for _, other in ends]
    others[0].send(Plan(8, 50))
    others[1].send(Plan(5, 60))
    cache, shape = agreed(part, leaders)
    assert (cache.num_blocks, shape.max_slots) == (50, 5)
    assert [other.receive() for other in others] == [Plan(5, 50)] * 2
    others[1].send(Plan(8, 64))
    others[0].send(Failure("no room"))
    with pytest.raises(ModelError, match="rank 1: no room"):
        agreed(part, leaders)
    for channel in (*leaders, *others):
        channel.close()


def test_kernels_that_cannot_sum_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kernels native: .*--num-shard"):
        read_part(Settings(kernels="native"), ModelSource("m", tmp_path, "safetensors", ""), 0, 2)
