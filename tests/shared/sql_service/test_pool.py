"""Who runs, who waits, who is told to come back, and what becomes of processes, whatever happens to one."""

import gc
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from tests.shared.sql_service.conftest import VISIBLE
from tests.shared.sql_service.corpus import MEMORY, REFUSED

from logitlake_shared.errors import (
    LakeError,
    LogitLakeError,
    QueryBusyError,
    QueryCancelledError,
    QueryCrashedError,
    QueryError,
    QueryMemoryError,
    QueryRefusedError,
    QueryTimeoutError,
)
from logitlake_shared.sql_service import SqlLimits, SqlPool, SqlRequest, SqlResult
from logitlake_shared.sql_service.process import WorkerEndedError, raised_again
from logitlake_shared.sql_service.query import _read_stream

_ENDLESS = "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))"
_ONE = SqlRequest("SELECT 1 AS x", VISIBLE)
# A process that was killed is gone; a loaded machine may take its time to say so.
_PATIENCE_S = 30.0


def _until(pool: SqlPool, predicate: Callable[[], bool]) -> None:
    with pool._changed:
        assert pool._changed.wait_for(predicate, _PATIENCE_S)


@pytest.fixture
def single(lake: Path) -> Iterator[SqlPool]:
    """A pool in which one question runs and one may wait."""
    with SqlPool(lake, SqlLimits(num_running=1, num_warm=1, num_waiting=1, timeout_s=30.0, memory_mib=512)) as made:
        yield made


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that ask."""
    with ThreadPoolExecutor(16) as made:
        yield made


def _running(pool: SqlPool, threads: ThreadPoolExecutor) -> tuple[str, Future[SqlResult]]:
    """A question that runs and does not end, and what will become of it."""
    request = SqlRequest(_ENDLESS, VISIBLE)
    future = threads.submit(pool.run, request)
    _until(pool, lambda: request.query_id in pool._queries and pool._queries[request.query_id].worker is not None)
    return request.query_id, future


def test_a_running_question_is_cancelled(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """Its place is free at once; cancelled again, or under another id, there is nothing to cancel."""
    query_id, future = _running(single, threads)
    started = time.monotonic()
    assert single.cancel(query_id)
    with pytest.raises(QueryCancelledError):
        future.result()
    assert time.monotonic() - started < 1.0
    assert not single.cancel(query_id)
    assert not single.cancel("qry_of_nobody")
    assert single.run(_ONE).read_all().to_pylist() == [{"x": 1}]


def test_a_waiting_question_is_cancelled(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """It leaves the queue, and the one that runs goes on."""
    query_id, running = _running(single, threads)
    waiting = SqlRequest("SELECT 2", VISIBLE)
    future = threads.submit(single.run, waiting)
    _until(single, lambda: single.num_waiting == 1)
    assert single.cancel(waiting.query_id)
    with pytest.raises(QueryCancelledError):
        future.result()
    assert (single.num_running, single.num_waiting) == (1, 0)
    assert not running.done()
    single.cancel(query_id)


def test_one_too_many_is_busy(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """The one that may wait gets its turn; the next one is told when to come back."""
    query_id, _ = _running(single, threads)
    waiting = threads.submit(single.run, SqlRequest("SELECT 2 AS x", VISIBLE))
    _until(single, lambda: single.num_waiting == 1)
    with pytest.raises(QueryBusyError, match="1 questions run and 1 wait") as busy:
        single.run(_ONE)
    assert 1 <= busy.value.retry_after_s <= 60
    assert pickle.loads(pickle.dumps(busy.value)).retry_after_s == busy.value.retry_after_s
    single.cancel(query_id)
    assert waiting.result().read_all().to_pylist() == [{"x": 2}]


def test_waiting_counts_against_the_deadline(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """Who waits too long is told so, though another one's question still runs."""
    query_id, _ = _running(single, threads)
    with pytest.raises(QueryTimeoutError):
        single.run(SqlRequest("SELECT 1", VISIBLE, timeout_s=0.2))
    assert (single.num_running, single.num_waiting) == (1, 0)
    single.cancel(query_id)


def test_an_id_is_one_questions(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """A second question of the same id would make cancelling ambiguous."""
    query_id, running = _running(single, threads)
    with pytest.raises(QueryError, match="is taken"):
        single.run(SqlRequest("SELECT 1", VISIBLE, query_id=query_id))
    assert not running.done()
    assert single.cancel(query_id)
    assert len({SqlRequest("SELECT 1", VISIBLE).query_id for _ in range(100)}) == 100


def test_a_worker_killed_from_outside_is_its_questions_error(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """The caller is told; the next question is answered by another process."""
    query_id, future = _running(single, threads)
    worker = single._queries[query_id].worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(QueryCrashedError, match="SIGKILL"):
        future.result()
    assert single.run(_ONE).read_all().num_rows == 1


def test_a_stopped_worker_ends_at_its_deadline(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """A process that does nothing at all is ended like any other."""
    request = SqlRequest(_ENDLESS, VISIBLE, timeout_s=2.0)
    future = threads.submit(single.run, request)
    _until(single, lambda: request.query_id in single._queries and single._queries[request.query_id].worker is not None)
    worker = single._queries[request.query_id].worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(QueryTimeoutError):
        future.result()


def test_a_warm_worker_that_ended_is_replaced(single: SqlPool) -> None:
    """Nobody notices that a worker which waited was killed."""
    single.wait_ready()
    _, pid = single.pids()
    os.kill(pid, signal.SIGKILL)
    _until(single, lambda: bool(single._ready) and pid not in single.pids())
    assert single.run(_ONE).read_all().num_rows == 1


def test_a_nursery_that_ended_is_replaced(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """The question that runs is not touched by it; the next one has a worker of another nursery."""
    query_id, running = _running(single, threads)
    nursery = single.pids()[0]
    os.kill(nursery, signal.SIGKILL)
    _until(single, lambda: single.pids()[0] != nursery and len(single._ready) == 1)
    assert not running.done()
    assert single.cancel(query_id)
    with pytest.raises(QueryCancelledError):
        running.result()
    assert single.run(_ONE).read_all().num_rows == 1


def test_a_nursery_that_hangs_holds_up_no_deadline(lake: Path) -> None:
    """Where no worker comes, a question ends at its deadline all the same; once one can come, it is answered."""
    with SqlPool(lake, SqlLimits(num_running=1, num_warm=1, timeout_s=30.0)) as pool:
        pool.wait_ready()
        nursery = pool.pids()[0]
        os.kill(nursery, signal.SIGSTOP)
        assert pool.run(_ONE).read_all().num_rows == 1  # the worker that was ready
        started = time.monotonic()
        with pytest.raises(QueryTimeoutError):
            pool.run(SqlRequest("SELECT 1", VISIBLE, timeout_s=1.0))
        assert time.monotonic() - started < 2.0
        os.kill(nursery, signal.SIGCONT)
        assert pool.run(SqlRequest("SELECT 1", VISIBLE)).read_all().num_rows == 1


def test_warm_workers_stay(single: SqlPool, alive: Callable[[int], bool]) -> None:
    """Nothing runs out while a worker waits: no processor time, no alarm. The same process answers in the end."""
    single.wait_ready()
    _, pid = single.pids()
    assert "Max cpu time              unlimited" in Path(f"/proc/{pid}/limits").read_text()
    assert alive(pid)
    request = SqlRequest("SELECT 1", VISIBLE)
    with single.run(request):
        worker = single._queries[request.query_id].worker
        assert worker is not None
        assert worker.pid == pid


def test_no_two_workers_draw_the_same(single: SqlPool) -> None:
    """Forked from one process, they do not share the state of its random numbers."""
    asked = SqlRequest("SELECT random() AS r, uuid() AS u", VISIBLE)
    answers = [single.run(SqlRequest(asked.sql, VISIBLE)).read_all().to_pylist()[0] for _ in range(3)]
    assert len({answer["r"] for answer in answers}) == 3
    assert len({answer["u"] for answer in answers}) == 3


def test_sixteen_at_once_with_strangers_among_them(lake: Path, threads: ThreadPoolExecutor) -> None:
    """Whatever others ask, every question gets its own answer or its own error."""
    honest = "SELECT count(*) + ? AS n FROM tokens WHERE cache = 'main'"
    asked: list[tuple[SqlRequest, type[Exception] | int]] = []
    for number in range(16):
        asked += [(SqlRequest(honest, VISIBLE, (number + part,)), 48 + number + part) for part in (0, 100)]
        asked.append((SqlRequest(REFUSED[number * 7], VISIBLE), QueryRefusedError))
        if number % 4 == 0:
            asked.append((SqlRequest(MEMORY[0], VISIBLE), QueryMemoryError))
            asked.append((SqlRequest(_ENDLESS, VISIBLE, timeout_s=1.0), QueryTimeoutError))

    def ask(request: SqlRequest) -> type[Exception] | int:
        try:
            return int(pool.run(request).read_all()[0][0].as_py())
        except LogitLakeError as error:
            return type(error)

    limits = SqlLimits(num_running=4, num_warm=2, num_waiting=100, timeout_s=60.0, memory_mib=512)
    with SqlPool(lake, limits) as pool:
        got = list(threads.map(ask, [request for request, _ in asked]))
        assert (pool.num_running, pool.num_waiting) == (0, 0)
    assert got == [expected for _, expected in asked]


def test_closing_leaves_no_process(lake: Path, threads: ThreadPoolExecutor, alive: Callable[[int], bool]) -> None:
    """Ready, starting, running, unread: all end, and who waits is told."""
    pool = SqlPool(lake, SqlLimits(num_running=2, num_warm=2, timeout_s=60.0, max_timeout_s=60.0))
    unread = pool.run(SqlRequest("SELECT repeat('x', 1000) AS x FROM range(10000)", VISIBLE))
    _, running = _running(pool, threads)
    waiting = threads.submit(pool.run, _ONE)
    _until(pool, lambda: pool.num_waiting == 1)
    pids = pool.pids()
    assert len(pids) >= 4
    pool.close()
    pool.close()
    for future in (running, waiting):
        with pytest.raises(QueryCancelledError, match="service stops"):
            future.result()
    with pytest.raises(QueryCancelledError):
        unread.read_all()
    assert [pid for pid in pids if alive(pid)] == []
    assert _children() & set(pids) == set()
    with pytest.raises(QueryError, match="closed"):
        pool.run(_ONE)


def test_an_answer_that_nobody_reads_holds_its_place_until_closed(single: SqlPool) -> None:
    """Closing a result early frees the place and ends the process."""
    with single.run(SqlRequest("SELECT repeat('x', 1000) AS x FROM range(10000)", VISIBLE)) as result:
        assert single.num_running == 1
        assert next(iter(result)).num_rows > 0
    assert single.num_running == 0
    with pytest.raises(QueryCancelledError):
        result.read_all()


def test_closing_from_another_thread_ends_the_reading(single: SqlPool, threads: ThreadPoolExecutor) -> None:
    """A caller that goes away while its answer is awaited: the one who reads is told, the place is free."""
    # Some rows come at once, then nothing for a long time.
    slow = "levenshtein(repeat('a', 1000000 + range::INT), repeat('b', 1000000))"
    sql = f"SELECT range AS x, 0 AS y FROM range(5000) UNION ALL SELECT range, {slow} FROM range(2)"
    result = single.run(SqlRequest(sql, VISIBLE))
    batches = iter(result)
    assert next(batches).num_rows > 0
    reading = threads.submit(lambda: [batch.num_rows for batch in batches])
    result.close()
    assert single.num_running == 0
    with pytest.raises(QueryCancelledError):
        reading.result()


def test_an_abandoned_answer_leaves_nothing_open(single: SqlPool, alive: Callable[[int], bool]) -> None:
    """Nobody reads or closes it: its deadline frees the place, and no descriptor stays."""
    single.wait_ready()
    request = SqlRequest("SELECT repeat('x', 1000) AS x FROM range(10000)", VISIBLE, timeout_s=1.0)
    result = single.run(request)
    pid = single.pids()[-1]
    _until(single, lambda: single.num_running == 0)
    del result
    assert single.run(_ONE).read_all().num_rows == 1
    single.wait_ready()
    _until(single, lambda: not single._deadlines or single._deadlines[0][2].query_id != request.query_id)
    gc.collect()
    assert not alive(pid)
    # The pool's own two, the nursery's socket and standard error, and three for the worker that is ready.
    pipes = [link for link in Path("/proc/self/fd").iterdir() if _is_pipe(link)]
    assert single.run(_ONE).read_all().num_rows == 1
    single.wait_ready()
    gc.collect()
    assert len([link for link in Path("/proc/self/fd").iterdir() if _is_pipe(link)]) == len(pipes)


def test_workers_end_with_their_service(lake: Path) -> None:
    """A service that is killed leaves no worker: those that wait end at once, one that runs at its deadline."""
    program = (
        "import json, sys, threading, time\n"
        "from logitlake_shared.sql_service import SqlLimits, SqlPool, SqlRequest\n"
        "pool = SqlPool(sys.argv[1], SqlLimits(num_running=1, num_warm=1))\n"
        "request = SqlRequest(sys.argv[2], ('main',), timeout_s=3.0)\n"
        "threading.Thread(target=pool.run, args=(request,), daemon=True).start()\n"
        "with pool._changed:\n"
        "    pool._changed.wait_for(lambda: request.query_id in pool._queries\n"
        "        and pool._queries[request.query_id].worker and pool._ready)\n"
        "print(json.dumps(pool.pids()), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lake), _ENDLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as service:
        assert service.stdout is not None
        pids = json.loads(service.stdout.readline())
        assert len(pids) == 3
        handles = [os.pidfd_open(pid) for pid in pids]
        service.kill()
    for handle in handles:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(_PATIENCE_S * 1000), "a worker outlived its service"
        os.close(handle)


def test_a_pool_imports_no_duckdb() -> None:
    """What can crash is on the other side of a pipe."""
    program = (
        "import sys, logitlake_shared.sql_service, logitlake_shared.sql_service.formats; print('duckdb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_workers_that_do_not_start_are_told(tmp_path: Path, lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is in the message of every question, and the pool goes on trying."""
    broken = tmp_path / "duckdb"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no engine here')")
    monkeypatch.syspath_prepend(tmp_path)
    with SqlPool(lake, SqlLimits(num_running=1, num_warm=1, timeout_s=60.0)) as pool:
        with pytest.raises(QueryCrashedError, match="no engine here"):
            pool.run(_ONE)
        monkeypatch.undo()
        _until(pool, lambda: bool(pool._ready))
        assert pool.run(_ONE).read_all().num_rows == 1


def test_a_lake_that_is_none_is_a_questions_error(tmp_path: Path) -> None:
    """A pool over nothing starts; each question says what is missing, without saying where."""
    with SqlPool(tmp_path, SqlLimits(num_warm=1)) as pool, pytest.raises(LakeError, match="not a lake") as failed:
        pool.run(_ONE)
    assert str(tmp_path) not in str(failed.value)


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"[]", b"\xff", b'{"error": "SystemExit", "message": "x"}', b'{"error": "__doc__", "message": "x"}'],
)
def test_an_error_that_is_none_is_a_crash(payload: bytes) -> None:
    """A worker cannot choose what is raised here but from a list."""
    assert type(raised_again(payload)) is QueryCrashedError


def test_what_a_worker_quotes_cannot_speak_to_a_terminal() -> None:
    """Control characters of a message become question marks."""
    error = raised_again(json.dumps({"error": "QueryError", "message": "a\x1b[31mb\nc"}).encode())
    assert str(error) == "a?[31mb\nc"


def test_bytes_that_are_no_answer_are_a_crash() -> None:
    """A stream whose offsets lie, or that is cut anywhere, is found out before it is used."""
    sink = pa.BufferOutputStream()
    table = pa.table({"x": ["a", "bb", None], "y": [[1], [], [2, 3]]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    good: bytes = sink.getvalue().to_pybytes()
    assert _read_stream(good).read_all().equals(table)
    bad = 0
    for place in range(0, len(good), 3):
        for damaged in (good[:place], good[:place] + bytes([good[place] ^ 0x81]) + good[place + 1 :]):
            try:
                _read_stream(damaged).read_all().validate(full=True)
            except WorkerEndedError:
                bad += 1
    assert bad > len(good) // 6


def _is_pipe(link: Path) -> bool:
    try:
        return str(link.readlink()).startswith("pipe")
    except FileNotFoundError:  # the listing's own
        return False


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def test_threads_of_a_pool_end_with_it(lake: Path) -> None:
    """Closing leaves no thread either."""
    before = threading.active_count()
    with SqlPool(lake, SqlLimits(num_warm=1)):
        pass
    assert threading.active_count() == before
