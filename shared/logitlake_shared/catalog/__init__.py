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
    scan        shards as tables that DuckDB scans
    query       the views, and how DuckDB is locked in

Only `index_file`, `publish` and `query` import duckdb.
"""

from logitlake_shared.catalog.publish import publish_catalog, rebuild_catalog
from logitlake_shared.catalog.query import Catalog, Place, open_catalog

__all__ = ["Catalog", "Place", "open_catalog", "publish_catalog", "rebuild_catalog"]
