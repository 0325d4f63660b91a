"""How fast the reader turns a lake into torch batches, beside the readers of others on the same rows.

    python -m benchmarks.reader [--json] [--quick]

About 10^6 response tokens of a V = 151,936 teacher at k = 32 in samples of about 200 tokens, written by the real
writer, read shuffled in batches of eight as `topk_ids`, `topk_logprobs`, `log_tail_mass` and labels. A pass is one
epoch of a fresh dataset: nothing is held from the pass before, every page's checksum is verified. All readers take
turns in one run and medians are compared, so that a busy machine slows all of them; CPU time is that of the process.
Right before each timed pass the same reader makes one that is not timed: on a virtual machine memory that nobody used
for some seconds is given back to the host, and the first to touch it again would pay for all.

The peers need an environment of their own (`make bench-peers`) and run in a process of their own; what is not
installed is reported as absent. `--quick` reads a fifth of the tokens, made without a model.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.harness import Figure, publish
from benchmarks.logprobs import FOLDER, synth
from benchmarks.made_lake import VOCAB_SIZE, made_lake, make_spec, make_unit
from logitlake_schemas import CodecPolicy
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset, row_groups
from logitlake_shared.reader.loader import LakeLoader
from logitlake_shared.rows import LakeSample
from logitlake_shared.topk import TeacherRows, decode, encode, split

BATCH_SIZE = 8
_DATA_VERSION = 1
_UNIT_TOKENS = 100_000
_PEERS = Path(sys.prefix) / "peers"

Batch = tuple[torch.Tensor, ...]


@dataclass
class Timed:
    """Passes of one reader."""

    tokens: int = 0
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def per_cpu(self) -> float:
        """Tokens a second of CPU time, median."""
        return self.tokens / statistics.median(self.cpu_s)

    def per_wall(self) -> float:
        """Tokens a second of wall time, median."""
        return self.tokens / statistics.median(self.wall_s)

    def best_wall(self) -> float:
        """Tokens a second in the pass that was disturbed least."""
        return self.tokens / min(self.wall_s)


def collate(samples: list[LakeSample]) -> Batch:
    """A batch as a loss takes it, normalised; torch takes the memory over."""
    ids_RK, logprobs_RK, log_tail_R = decode([sample.rows for sample in samples])
    labels_R = np.concatenate([sample.response_ids for sample in samples])
    return tuple(torch.from_numpy(array) for array in (ids_RK, logprobs_RK, log_tail_R, labels_R))


def make_lake(num_tokens: int, k: int, quick: bool, codec: CodecPolicy | None = None) -> Path:
    """A lake of the real writer, made when it is not there. Units repeat their tokens, not their order of samples."""
    policy = codec or CodecPolicy(k_max=k, k_min=k, p_min=0.0)
    name = f"reader-v{_DATA_VERSION}-{'quick' if quick else 'full'}-{num_tokens}x{k}{'-adaptive' if codec else ''}"

    def build(lake: Lake) -> None:
        cache = lake.create_cache("main", make_spec(num_tokens // 200, _UNIT_TOKENS, policy))
        for number in range(num_tokens // _UNIT_TOKENS):
            if quick:
                cache.publish_unit(make_unit(number, _UNIT_TOKENS // 200, 200, policy))
            else:
                cache.publish_unit(_unit(number, k, policy))
        cache.snapshot()

    FOLDER.mkdir(parents=True, exist_ok=True)
    return made_lake(FOLDER / name, build)


def _unit(number: int, k: int, policy: CodecPolicy) -> UnitResult:
    source = synth(_UNIT_TOKENS)
    outside_T = np.exp(source.topk_logprobs_TK[:, k:].astype(np.float64)).sum(1) + np.exp(source.log_tail_T)
    rows = TeacherRows(
        topk_ids_TK=np.ascontiguousarray(source.topk_ids_TK[:, :k]),
        topk_logprobs_TK=np.ascontiguousarray(source.topk_logprobs_TK[:, :k]),
        label_logprob_T=source.label_logprob_T,
        label_rank_T=source.label_rank_T,
        log_tail_mass_T=np.log(outside_T).astype(np.float32),
    )
    random = np.random.default_rng(number)
    stops = np.cumsum(random.integers(50, 351, _UNIT_TOKENS // 50))
    stops = np.append(stops[stops < _UNIT_TOKENS], _UNIT_TOKENS)
    lengths = np.diff(stops, prepend=0)
    samples = [
        LakeSample(
            sample_id=f"sample-{number:04d}-{place:05d}",
            task="chat",
            source="made",
            split="train",
            messages=[{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "word " * length}],
            prompt_ids=random.integers(0, VOCAB_SIZE, 40).astype(np.int32),
            prompt_lengths=np.array([40], np.int32),
            response_ids=source.label_ids_T[stop - length : stop],
            response_lengths=np.array([length], np.int32),
            expanded_length=40 + int(length),
            image_sha256=(),
            rows=stored,
            finish_reason="given",
        )
        for place, (stop, length, stored) in enumerate(
            zip(stops, lengths, split(encode(rows, policy), lengths.tolist()), strict=True)
        )
    ]
    return UnitResult(unit=f"{number:06d}-made", samples=samples)


def read_pass(lake: Path, num_threads: int, *, hashed: bool = False) -> int:
    """One epoch of a fresh dataset; its tokens. With `hashed`, as the first reader of the process."""
    if hashed:
        row_groups._VERIFIED.clear()
    dataset = LakeDataset(lake, "main")
    batches = dataset.batches(seed=0, batch_size=BATCH_SIZE)
    with LakeLoader(dataset, batches, collate, num_threads=num_threads, epochs=1) as loader:
        tokens = sum(len(batch[3]) for batch in loader)
    dataset.close()
    return tokens


def pylist_pass(lake: Path) -> int:
    """What the shortest code does: one shard as Python objects, eight rows at a time into tensors."""
    shard = sorted(lake.glob("caches/main/shards/*.parquet"))[0]
    rows = pq.read_table(shard).to_pylist()
    tokens = 0
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        tensors = [
            torch.tensor([value for row in batch for value in row[name]])
            for name in ("topk_ids", "topk_logprobs", "log_tail_mass", "response_ids")
        ]
        tokens += len(tensors[3])
    return tokens


class Peers:
    """The process of `benchmarks.reader_peers`."""

    def __init__(self, lake: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PEERS), "."]), "PYTHONWARNINGS": "ignore"}
        folder = lake.with_name(f"{lake.name}-peers")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reader_peers", str(lake), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.names: list[str] = self._answer()
        self.bytes: dict[str, int] = {}

    def time(self, name: str, timed: Timed) -> None:
        """One pass of a peer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        answer = self._answer()
        timed.tokens, self.bytes[name] = answer["tokens"], answer["bytes"]
        timed.cpu_s.append(answer["cpu_s"])
        timed.wall_s.append(answer["wall_s"])

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException("the peers' process ended; run `python -m benchmarks.reader_peers` by hand")
        return json.loads(line)


def time_pass(read: Callable[[], int], timed: Timed) -> None:
    """One pass of a reader of this process."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    timed.tokens = read()
    timed.cpu_s.append(time.process_time() - cpu_s)
    timed.wall_s.append(time.perf_counter() - wall_s)


def measure(lake: Path, rounds: int) -> tuple[dict[str, Timed], dict[str, int]]:
    """Every reader once a round, in turns; and the peers' bytes."""
    held = LakeDataset(lake, "main")
    own: dict[str, Callable[[], int]] = {
        "ours": lambda: read_pass(lake, 0),
        "ours, sha256 of every shard": lambda: read_pass(lake, 0, hashed=True),
        "ours, two threads": lambda: read_pass(lake, 2),
        "ours, held in memory": lambda: _held_pass(held),
        "to_pylist": lambda: pylist_pass(lake),
    }
    peers = Peers(lake)
    times = {name: Timed() for name in (*own, *peers.names)}
    for _ in range(rounds):
        for name, read in own.items():
            read()
            time_pass(read, times[name])
        for name in peers.names:
            peers.time(name, Timed())
            peers.time(name, times[name])
    peers.close()
    return times, peers.bytes


def _held_pass(dataset: LakeDataset) -> int:
    batches = dataset.batches(seed=0, batch_size=BATCH_SIZE)
    with LakeLoader(dataset, batches, collate, num_threads=0, epochs=1) as loader:
        return sum(len(batch[3]) for batch in loader)


def figures_of(times: dict[str, Timed], sizes: dict[str, int], own_bytes: int) -> list[Figure]:
    """What is published, from the passes of `measure`."""
    ours, unit = times["ours"], "M tokens / CPU s"
    figures = [
        _speed("k=32, one thread", ours.per_cpu(), unit, 1.2),
        _speed("k=32, one thread, sha256 of every shard", times["ours, sha256 of every shard"].per_cpu(), unit, 1.2),
        _speed("k=32, two threads, wall", times["ours, two threads"].per_wall(), "M tokens / s", 2.0),
        Figure("k=32, two threads, wall, best pass", times["ours, two threads"].best_wall() / 1e6, "M tokens / s"),
        Figure("k=32, later epochs of a lake that fits in memory", times["ours, held in memory"].per_cpu() / 1e6, unit),
        Figure("k=32, bytes", own_bytes / ours.tokens, "bytes / token"),
        _ratio("to_pylist", ours, times["to_pylist"], 20.0),
    ]
    # What is promised is promised against the faster of a peer's ways to hold these rows.
    for peer, names, factor in (("MDS", ("mds", "mds-zstd"), 5.0), ("Lance with zstd", ("lance", "lance-codes"), 2.0)):
        there = [name for name in names if name in times]
        if not there:
            figures.append(Figure(f"over {peer}: absent, see `make bench-peers`", float("nan"), "x", f">= {factor:g}"))
            continue
        fastest = max(there, key=lambda name: times[name].per_cpu())
        figures.append(_ratio(f"{peer} ({fastest}, its fastest)", ours, times[fastest], factor))
        for name in there:
            if name != fastest:
                figures.append(_ratio(name, ours, times[name], None))
            figures.append(Figure(f"{name}", times[name].per_cpu() / 1e6, unit))
            figures.append(Figure(f"{name}, bytes", sizes[name] / times[name].tokens, "bytes / token"))
    return figures


def _speed(name: str, tokens_a_second: float, unit: str, reach: float) -> Figure:
    value = tokens_a_second / 1e6
    return Figure(name, value, unit, f">= {reach:g}", value >= reach)


def _ratio(name: str, ours: Timed, theirs: Timed, reach: float | None) -> Figure:
    value = ours.per_cpu() / theirs.per_cpu()
    if reach is None:
        return Figure(f"over {name}", value, "x")
    return Figure(f"over {name}", value, "x", f">= {reach:g}", value >= reach)


def other_policies(num_tokens: int, rounds: int) -> list[Figure]:
    """The same reading at other k and with adaptive k."""
    lakes = {
        "k=8": make_lake(num_tokens, 8, False),
        "k=128": make_lake(num_tokens, 128, False),
        "adaptive k (p >= 1e-3, 4 to 64)": make_lake(num_tokens, 64, False, CodecPolicy(k_max=64, p_min=1e-3)),
    }
    times = {name: Timed() for name in lakes}
    for _ in range(rounds):
        for name, lake in lakes.items():
            read = partial(read_pass, lake, 0)
            read()
            time_pass(read, times[name])
    return [Figure(f"{name}, one thread", times[name].per_cpu() / 1e6, "M tokens / CPU s") for name in lakes]


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--quick", is_flag=True, help="A fifth of the tokens, fewer rounds, no model needed.")
def main(as_json: bool, quick: bool) -> None:
    torch.set_num_threads(1)
    lake = make_lake(200_000 if quick else 1_000_000, 32, quick)
    times, sizes = measure(lake, 3 if quick else 5)
    own_bytes = sum(path.stat().st_size for path in lake.glob("caches/main/shards/*.parquet"))
    figures = figures_of(times, sizes, own_bytes)
    if not quick:
        figures += other_policies(300_000, 5)
    publish("reader", figures, as_json)


if __name__ == "__main__":
    main()
