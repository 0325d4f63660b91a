"""The catalog of a lake: an index of its samples, published as immutable DuckDB files, and SQL over everything.

    samples  one row a captured sample            tokens        one row a response token, its scalars as columns
    topk     one row a cached entry of a token    pairs         one row a preference pair
    images   one row an encoded image             sample_index  where each sample lies: shard, row group, row
    shards   one row a committed file             errors        one row a sample that failed
    caches   one row a cache: teacher, fingerprint, counts, stored error

The usual questions need `samples` and `tokens` and never unpack a top-k.

    tables      what the catalog's tables hold, made from snapshots and shards
    index_file  the tables as a DuckDB file
    publish     `catalog/catalog-00000001.duckdb`, …: who writes them, when, and what a loser of a race does
    pruning     which shards a filter can speak of
    open_shards the shards that a question needs, opened then
    scan        shards as tables that DuckDB scans
    query       the views, and how DuckDB is locked in
    column_docs what each column is
    attach      a lake's files on this machine, and what attaches them in a DuckDB of one's own

Only `index_file`, `publish` and `query` import duckdb.

A published file is plain DuckDB (1.4 or later), its paths are relative to the lake. Without this package (or copy what
`logitlake attach` prints):

    ATTACH 'lake/catalog/catalog-00000001.duckdb' AS cat (READ_ONLY);
    SET VARIABLE paths = (SELECT list('lake/' || path) FROM cat.shards WHERE kind = 'samples');
    SELECT task, count(*) FROM read_parquet(getvariable('paths')) GROUP BY task;

    SELECT path, row_group, row FROM cat.sample_index JOIN cat.shards USING (shard)
    WHERE id_hash = (md5_number_lower('the-id') >> 32)::UINTEGER AND sample_id = 'the-id';

(The second finds one of ten million samples in milliseconds; without `id_hash` it reads every id. DuckDB's own
`read_parquet` does not verify checksums: SQL through this package does.)
"""

from logitlake_shared.catalog.publish import publish_catalog, rebuild_catalog
from logitlake_shared.catalog.query import Catalog, Place, open_catalog

__all__ = ["Catalog", "Place", "open_catalog", "publish_catalog", "rebuild_catalog"]
