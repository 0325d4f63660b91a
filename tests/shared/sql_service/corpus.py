"""Questions that a stranger might ask in order to do something else, by what they try and what must become of them.

`REFUSED` is stopped by the gate, before anything runs. What is in the other lists may be asked, as far as a gate can
see, and is ended by a limit.
"""

_FILES = """
SELECT * FROM read_csv('/etc/passwd')
SELECT * FROM read_csv_auto('/etc/passwd')
SELECT * FROM read_text('/etc/passwd')
SELECT * FROM read_blob('/etc/passwd')
SELECT * FROM read_parquet('caches/main/shards/*.parquet')
SELECT * FROM parquet_scan('caches/hidden/shards/*.parquet')
SELECT * FROM read_json('/proc/self/environ')
SELECT * FROM read_ndjson_objects('lake.json')
SELECT * FROM read_duckdb('catalog/catalog-00000001.duckdb', table_name = 'shards')
SELECT * FROM glob('/**')
SELECT * FROM sniff_csv('/etc/passwd')
SELECT * FROM parquet_metadata('x.parquet')
SELECT * FROM parquet_schema('x.parquet')
SELECT * FROM parquet_file_metadata('x.parquet')
SELECT * FROM parquet_kv_metadata('x.parquet')
SELECT * FROM parquet_bloom_probe('x.parquet', 'a', 1)
SELECT * FROM 'lake.json'
SELECT * FROM 'caches/main/shards/a.parquet'
SELECT * FROM '/etc/passwd'
SELECT * FROM "caches/main/spec.json"
SELECT * FROM 's3://bucket/key.parquet'
SELECT * FROM 'https://127.0.0.1/a.csv'
FROM 'lake.json' SELECT *
SELECT (SELECT count(*) FROM 'lake.json')
SELECT * FROM tokens WHERE k IN (SELECT 1 FROM read_text('/etc/passwd'))
SELECT * FROM tokens ORDER BY (SELECT max(content) FROM read_text('/etc/passwd'))
SELECT * FROM tokens LIMIT (SELECT count(*) FROM glob('/*'))
WITH a AS (SELECT * FROM read_text('/etc/passwd')) SELECT 1
SELECT * FROM tokens, LATERAL (SELECT * FROM read_text(sample_id))
SELECT * FROM read_text(['/etc/passwd'])
DESCRIBE SELECT * FROM read_text('/etc/passwd')
SUMMARIZE 'lake.json'
PIVOT read_text('/etc/passwd') ON filename IN ('a') USING count(*)
"""

_WRITES = """
COPY (SELECT 1) TO 'stolen.csv'
COPY tokens TO 'stolen.parquet'
COPY (SELECT 1) TO 'caches/main/spec.json' (FORMAT csv)
COPY (SELECT 1) TO 'caches/main/spec.json' (FORMAT csv, USE_TMP_FILE false)
COPY tokens FROM 'stolen.csv'
COPY FROM DATABASE memory TO cat
EXPORT DATABASE 'stolen'
IMPORT DATABASE 'stolen'
WITH x AS (COPY (SELECT 1) TO 'stolen.csv') SELECT * FROM x
WITH x AS (COPY tokens TO 'stolen.csv') FROM x
SELECT * FROM (WITH x AS (COPY (SELECT 1) TO 'stolen.csv') SELECT * FROM x)
SELECT (WITH x AS (COPY (SELECT 1) TO 'stolen.csv') SELECT count(*) FROM x)
WITH x AS (INSERT INTO late_shards VALUES (1) RETURNING *) SELECT * FROM x
WITH x AS (DELETE FROM shards RETURNING *) SELECT * FROM x
WITH x AS (UPDATE cat.shards SET rows = 0 RETURNING *) SELECT * FROM x
WITH x AS (MERGE INTO shards USING tokens ON true WHEN MATCHED THEN DELETE RETURNING *) SELECT * FROM x
INSERT INTO shards VALUES (1)
DELETE FROM shards
UPDATE shards SET rows = 0
TRUNCATE shards
CREATE TABLE t AS SELECT 1
CREATE OR REPLACE VIEW tokens AS SELECT 1
CREATE TEMP MACRO count(x) AS 1
CREATE TYPE t AS ENUM ('a')
CREATE SEQUENCE s
CREATE SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')
DROP VIEW tokens
ALTER TABLE tokens RENAME TO t
SELECT * INTO stolen FROM tokens
"""

_SESSION = """
ATTACH 'other.duckdb'
ATTACH ':memory:' AS x
ATTACH 'catalog/catalog-00000001.duckdb' AS y (READ_ONLY)
DETACH cat
USE cat
INSTALL httpfs
LOAD httpfs
LOAD '/tmp/evil.duckdb_extension'
FORCE INSTALL httpfs FROM 'http://127.0.0.1'
SET memory_limit = '100GB'
SET enable_external_access = true
SET lock_configuration = false
SET VARIABLE x = 1
RESET threads
PRAGMA database_list
PRAGMA enable_profiling
PRAGMA table_info('tokens')
PRAGMA import_database('x')
CALL pragma_version()
CALL enable_logging()
CHECKPOINT
VACUUM
ANALYZE
BEGIN TRANSACTION
COMMIT
PREPARE p AS SELECT 1
EXECUTE p
DEALLOCATE p
EXPLAIN SELECT 1
EXPLAIN ANALYZE SELECT 1
SHOW TABLES
SHOW ALL TABLES
SHOW DATABASES
SHOW tables
DESCRIBE
"""

_CATALOGS = """
SELECT * FROM duckdb_settings()
SELECT * FROM duckdb_tables()
SELECT * FROM duckdb_tables
SELECT * FROM duckdb_databases()
SELECT * FROM duckdb_secrets()
SELECT * FROM duckdb_functions()
SELECT * FROM duckdb_extensions()
SELECT * FROM duckdb_logs
SELECT * FROM duckdb_temporary_files()
SELECT * FROM duckdb_memory()
SELECT * FROM pragma_table_info('tokens')
SELECT * FROM pragma_database_size()
SELECT * FROM pragma_show('tokens')
SELECT * FROM information_schema.tables
SELECT * FROM pg_catalog.pg_class
SELECT * FROM sqlite_master
SELECT * FROM cat.shards
SELECT * FROM cat.sample_index
SELECT * FROM memory.main.late_shards
SELECT * FROM main.tokens
SELECT * FROM late_shards
SELECT * FROM late_index
SELECT * FROM late_rows
SELECT * FROM published.shards
SELECT * FROM seq_scan('shards')
SELECT * FROM arrow_scan(1, 2, 3)
SELECT * FROM python_map_function(1)
SELECT * FROM test_all_types()
SELECT * FROM summary((SELECT 1))
SELECT * FROM which_secret('a', 's3')
SELECT * FROM icu_calendar_names()
SELECT * FROM histogram_values('shards', 'rows')
SELECT * FROM duckdb_logs_parsed('x')
SELECT * FROM repeat('x', 10)
SELECT * FROM query('SELECT 1')
SELECT * FROM query_table('shards')
SELECT * FROM query_table(['late_shards'])
SELECT * FROM json_execute_serialized_sql('{}')
SELECT * FROM truncate_duckdb_logs()
SELECT 'tokens'::regclass
"""

_FUNCTIONS = """
SELECT getenv('HOME')
SELECT current_setting('memory_limit')
SELECT getvariable('x')
SELECT nextval('s')
SELECT currval('s')
SELECT setval('s', 1)
SELECT setseed(0.5)
SELECT sleep_ms(1000)
SELECT pg_sleep(1)
SELECT write_log('x')
SELECT parse_duckdb_log_message('a', 'b')
SELECT json_serialize_sql('SELECT 1')
SELECT json_serialize_plan('SELECT 1')
SELECT json_deserialize_sql('{}')
SELECT current_user
SELECT current_schema
SELECT current_schema()
SELECT current_schemas(true)
SELECT current_catalog
SELECT current_database()
SELECT session_user
SELECT version()
SELECT txid_current()
SELECT current_query()
SELECT current_query_id()
SELECT current_connection_id()
SELECT inet_server_addr()
SELECT has_table_privilege('tokens', 'select')
SELECT pg_get_viewdef(1)
SELECT in_search_path('memory', 'main')
SELECT stats(k) FROM tokens
SELECT vector_type(k) FROM tokens
SELECT index_key('a')
SELECT create_sort_key(1, 'ASC')
SELECT system.main.getenv('HOME')
SELECT main.sleep_ms(1000)
SELECT pg_catalog.pg_sleep(1)
SELECT cat.main.f(1)
SELECT error('x')
SELECT list_transform([1], lambda x: sleep_ms(x))
SELECT [getenv('HOME') FOR x IN [1]]
SELECT count(*) FILTER (WHERE getenv('HOME') = 'x') FROM tokens
SELECT sum(k) OVER (ORDER BY getenv('HOME')) FROM tokens
SELECT CASE WHEN true THEN getenv('HOME') END
SELECT * REPLACE (getenv('HOME') AS task) FROM tokens
SELECT COLUMNS(c -> c = getenv('HOME')) FROM tokens
SELECT 1 LIMIT 1 OFFSET getvariable('x')
SELECT 1 GROUP BY getenv('HOME')
SELECT 1 HAVING getenv('HOME') = 'x'
SELECT k FROM tokens QUALIFY getenv('HOME') = 'x'
SELECT DISTINCT ON (getenv('HOME')) k FROM tokens
VALUES (getenv('HOME'))
"""

_SCOPES = """
SELECT * FROM late_rows UNION ALL (WITH late_rows AS (SELECT 1) SELECT * FROM late_rows)
(WITH late_rows AS (SELECT 1) SELECT * FROM late_rows) UNION ALL SELECT * FROM late_rows
SELECT * FROM late_rows, (WITH late_rows AS (SELECT 1) SELECT * FROM late_rows)
WITH late_rows AS (SELECT * FROM late_rows) SELECT * FROM late_rows
WITH a AS (SELECT * FROM late_rows), late_rows AS (SELECT 1) SELECT * FROM a
WITH a AS (WITH late_rows AS (SELECT 1) SELECT * FROM late_rows) SELECT * FROM late_rows
SELECT (WITH late_rows AS (SELECT 1) SELECT count(*) FROM late_rows) FROM late_rows
WITH RECURSIVE late_rows AS (SELECT * FROM late_rows UNION ALL SELECT 1) SELECT 1
SELECT * FROM (SELECT 1) late_rows, (SELECT * FROM late_rows)
SELECT * FROM tokens AS late_rows JOIN late_rows ON true
WITH "Late_Rows " AS (SELECT 1) SELECT * FROM late_rows
SELECT * FROM range(3) late_rows, (FROM late_rows)
SELECT * FROM tokens AT (VERSION => 1)
SELECT * FROM temp.tokens
SELECT * FROM memory.tokens
"""

_SHAPES = """
SELECT 1; SELECT 2
SELECT 1; COPY (SELECT 1) TO 'stolen.csv'
;
PIVOT tokens ON task USING count(*)
SELECT 1 /*
SELEC 1
SELECT
-- nothing
"""


def _lines(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if line]


FILES = [*_lines(_FILES), *_lines(_WRITES)]
"""Those of `REFUSED` that would read or write one."""
SCOPES = _lines(_SCOPES)
"""Those of `REFUSED` that name a table where a CTE of its name is somewhere else."""
REFUSED = [
    *FILES,
    *_lines(_SESSION),
    *_lines(_CATALOGS),
    *_lines(_FUNCTIONS),
    *SCOPES,
    *_lines(_SHAPES),
    "SELECT\x001",
    "SELECT '\ud800'",
    "",
    "   \n ",
    "SELECT '" + "x" * 65536 + "'",
    "SELECT " + "(" * 20000 + "1" + ")" * 20000,
    "SELECT " + "[" * 20000 + "1" + "]" * 20000,
    "SELECT " + "NOT " * 15000 + "true",
]
"""Nothing of these runs: `QueryRefusedError`, or `QueryError` where the parser itself finds no question in it."""

TIMEOUT = [
    "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))",
    "SELECT jaccard(repeat('ab', 100000000), 'a') FROM range(1000)",
    "SELECT sum(a.range + b.range) FROM range(10000000) a, range(10000000) b",
    "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(1000000) c WHERE a.range = b.range + c.range + 1",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
    "SELECT count(*) FROM range(100000000) WHERE md5(range::VARCHAR) LIKE '%zzz%' AND sha256(range::VARCHAR) > 'a'",
    "SELECT sum(list_sum(list_transform(range(100), lambda x: x * y.range))) FROM range(100000000) y",
    "SELECT count(*) FROM tokens a, tokens b, tokens c, tokens d, tokens e, tokens f, tokens g WHERE a.entropy < g.k",
]
"""What goes on and on: `QueryTimeoutError`, at most a second late."""

MEMORY = [
    "SELECT length(repeat('x', 3000000000))",
    "SELECT length(lpad('x', 2000000000, 'y'))",
    "SELECT length(string_agg(repeat('x', 1000000), '')) FROM range(10000)",
    "SELECT len(list(range)) FROM range(500000000)",
    "SELECT len(range(2000000000))",
    "SELECT bit_count(bitstring('1', 2000000000)) + length(repeat('x', 2000000000))",
    "SELECT count(*) FROM (SELECT range, repeat('x', 1000) t FROM range(100000000) ORDER BY t, range DESC)",
    "SELECT count(DISTINCT repeat(range::VARCHAR, 1000)) FROM range(100000000)",
    "SELECT length(repeat(repeat('x', 100000), 40000))",
    "SELECT damerau_levenshtein(repeat('ab', 20000), repeat('ba', 20000))",
    "SELECT list_reduce(range(100000000), lambda x, y: x + y)",
    "SELECT len(flatten(list_transform(range(100000), lambda x: range(100000))))",
]
"""What needs more memory than there is: `QueryMemoryError`, `QueryCrashedError`, or its deadline comes first."""

LARGE = [
    "SELECT repeat('x', 50000000)",
    "SELECT string_agg(repeat('x', 1000), '') FROM range(50000)",
    "SELECT list(range) FROM range(10000000)",
]
"""One row that is larger than an answer may be: `QueryTooLargeError`."""

CUT = [
    "SELECT * FROM range(100000000000)",
    "SELECT a.range, b.range FROM range(1000000) a, range(1000000) b",
    "SELECT repeat('x', 10000) FROM range(1000000)",
    "SELECT t.* FROM tokens t, range(1000000)",
    "SELECT unnest(range(1000000)) FROM range(1000)",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 200000) SELECT * FROM range(10000000)",
]
"""Answers without end that begin at once: cut short, and said to be."""

PARSER = [
    " UNION ALL ".join(["SELECT 1"] * 3400),
    f"SELECT 1 WHERE 1 IN ({','.join(map(str, range(9000)))})",
    f"SELECT {','.join('1' for _ in range(30000))}",
    f"SELECT * FROM {','.join('tokens' for _ in range(5000))}",
    f"WITH {','.join(f'a{i} AS (SELECT 1)' for i in range(2000))} SELECT 1",
    f"SELECT {' + '.join('1' for _ in range(10000))}",
    f"SELECT {' || '.join(chr(39) * 2 for _ in range(7000))}",
    f"SELECT CASE {' '.join('WHEN 1 THEN 1' for _ in range(4000))} END",
    "SELECT " + "CASE WHEN " * 900 + "1" + " THEN 1 END" * 900,
    "SELECT * FROM " + "(SELECT * FROM " * 1500 + "tokens" + ")" * 1500,
    "SELECT " + "abs(" * 900 + "1" + ")" * 900,
]
"""Texts that are hard to parse, bind or plan: any answer is right, and any `QueryError`, in time."""
