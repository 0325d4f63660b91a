"""SQL over a lake for people who are not trusted: each question in a process of its own, behind a gate and a sandbox.

    pool      SqlPool: who may run and who waits, deadlines, cancelling, workers that are kept ready
    query     one question on its way, and SqlResult, its answer as it is read
    process   nursery and worker as the pool sees them: pipes and a signal
    records   SqlLimits, SqlRequest, and the frames between pool and worker
    formats   answers as Arrow, JSON, NDJSON, CSV or Parquet
    nursery   the program that forks workers: everything imported, nothing answered
    worker    the disposable process that answers one question
    gate      whether a text may be asked, by DuckDB's own parse tree; `grammar` is its allow-list
    sandbox   what the kernel is told to keep from a worker; `syscalls` are the numbers for it

    pool --Q--> worker: sandbox, gate, catalog of the caller's caches --S A A A E--> pool --> formats

Only `gate`, `nursery` and `worker` import duckdb, and no pool imports them. `docs/sql-service.md` says what is
promised, what each layer stops, and what is not covered.
"""

from logitlake_shared.sql_service.pool import SqlPool, layers
from logitlake_shared.sql_service.query import SqlResult
from logitlake_shared.sql_service.records import Parameters, SqlLimits, SqlRequest
from logitlake_shared.sql_service.sandbox import Layer

__all__ = ["Layer", "Parameters", "SqlLimits", "SqlPool", "SqlRequest", "SqlResult", "layers"]
