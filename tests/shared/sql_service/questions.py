"""Questions that an analyst asks of a lake. Every one is answered, and as the catalog itself answers it.

Each has an order, so that two answers can be compared row by row. A line that is indented goes on with the one before.
"""

import re

__all__ = ["QUESTIONS"]

_TEXT = """
SELECT count(*) FROM tokens
SELECT task, avg(entropy) AS entropy, avg(k) AS k, avg((label_rank = 1)::INT) AS agrees FROM tokens GROUP BY
    task ORDER BY task
SELECT task, count(*) AS n, sum(-label_logprob) AS nats FROM tokens WHERE cache = 'main' GROUP BY ALL ORDER BY ALL
SELECT exp(-avg(label_logprob)) AS perplexity FROM tokens
FROM samples SELECT sample_id, len(response_ids) AS n ORDER BY sample_id
SELECT * FROM samples ORDER BY sample_id LIMIT 3
SELECT * EXCLUDE (messages) REPLACE (upper(task) AS task) FROM samples ORDER BY sample_id
SELECT COLUMNS('label_.*') FROM tokens ORDER BY sample_id, position LIMIT 5
SELECT position, quantile_cont(entropy, [0.05, 0.5, 0.95]) AS q FROM tokens GROUP BY position ORDER BY position
SELECT sample_id, position, token_id, logprob FROM topk WHERE rank = 1 ORDER BY sample_id, position
SELECT sample_id, sum(exp(logprob)) AS mass FROM topk GROUP BY sample_id ORDER BY sample_id
SELECT t.sample_id, t.position, k.token_id FROM tokens t JOIN topk k USING (sample_id, position) WHERE k.rank
    = t.label_rank ORDER BY ALL
SELECT cache, rows, tokens, bytes_per_token FROM caches ORDER BY cache
SELECT kind, count(*), sum(bytes) FROM shards GROUP BY kind ORDER BY kind
SELECT code, sample_id, message FROM errors ORDER BY ALL
SELECT sample_id, path, row_group, "row" FROM sample_index ORDER BY ALL
SELECT split, count(DISTINCT source) FROM samples GROUP BY split ORDER BY split
SELECT pair_id, chosen_score - rejected_score AS margin FROM pairs ORDER BY pair_id
SELECT image_sha256, octet_length(data) FROM images ORDER BY ALL
SELECT s.sample_id, i.width FROM samples s JOIN images i ON list_contains(s.image_sha256, i.image_sha256) ORDER BY ALL
WITH hard AS (SELECT * FROM tokens WHERE label_rank > 1) SELECT task, count(*) FROM hard GROUP BY task ORDER BY task
WITH tokens AS (SELECT * FROM tokens WHERE task = 'caption') SELECT count(*) FROM tokens
WITH a AS (SELECT 1 AS x), b AS (SELECT x + 1 AS x FROM a) SELECT * FROM a UNION ALL SELECT * FROM b ORDER BY x
WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 10) SELECT sum(n) FROM t
SELECT sample_id, position, row_number() OVER (PARTITION BY sample_id ORDER BY entropy DESC, position) AS
    place FROM tokens ORDER BY ALL
SELECT sample_id, position, lag(entropy) OVER (PARTITION BY sample_id ORDER BY position) AS before FROM
    tokens ORDER BY sample_id, position
SELECT sample_id, position FROM tokens QUALIFY entropy = max(entropy) OVER (PARTITION BY sample_id) ORDER BY ALL
SELECT task, source, count(*) FROM samples GROUP BY ROLLUP (task, source) ORDER BY ALL
SELECT task, source, grouping(task), count(*) FROM samples GROUP BY GROUPING SETS ((task), (source), ()) ORDER BY ALL
PIVOT samples ON task IN ('caption', 'reading') USING count(*) GROUP BY split ORDER BY split
UNPIVOT (SELECT min(entropy) AS low, max(entropy) AS high FROM tokens) ON low, high INTO NAME what VALUE v
    ORDER BY what
SELECT CASE WHEN entropy < 1 THEN 'sure' ELSE 'unsure' END AS how, count(*) FROM tokens GROUP BY how ORDER BY how
SELECT width_class, count(*) FROM (SELECT floor(entropy * 2) / 2 AS width_class FROM tokens) GROUP BY 1 ORDER BY 1
SELECT histogram(label_rank) FROM tokens
SELECT task.upper() AS t, count(*) FROM samples GROUP BY t ORDER BY t
SELECT list_transform(response_ids, lambda x: x + 1) AS next, [x FOR x IN response_ids IF x > 7] AS some FROM
    samples ORDER BY sample_id
SELECT sample_id, unnest(response_ids) AS id FROM samples ORDER BY ALL
SELECT messages::VARCHAR LIKE '%user%' AS asked, count(*) FROM samples GROUP BY asked
SELECT sample_id FROM samples WHERE sample_id IN (SELECT sample_id FROM tokens WHERE label_rank > 3) ORDER BY 1
SELECT sample_id FROM samples s WHERE EXISTS (SELECT 1 FROM tokens t WHERE t.sample_id = s.sample_id AND t.k
    < 8) ORDER BY 1
SELECT s.sample_id, (SELECT max(entropy) FROM tokens t WHERE t.sample_id = s.sample_id) AS most FROM samples
    s ORDER BY 1
SELECT a.sample_id, b.sample_id FROM samples a ASOF JOIN samples b ON a.sample_id > b.sample_id ORDER BY ALL
SELECT sample_id FROM samples EXCEPT SELECT sample_id FROM tokens WHERE task = 'reading' ORDER BY sample_id
SELECT corr(entropy, -label_logprob), regr_slope(entropy, k), stddev(entropy) FROM tokens
SELECT string_agg(token_id::VARCHAR, ' ' ORDER BY position) AS ids FROM tokens WHERE sample_id = 'sample-0010'
SELECT count(*) FILTER (WHERE label_rank = 1) * 100.0 / count(*) AS percent FROM tokens
SELECT arg_max(sample_id, entropy), max_by(task, entropy) FROM tokens
SELECT DISTINCT ON (task) task, sample_id FROM samples ORDER BY task, sample_id
SELECT regexp_extract(sample_id, '([0-9]+)', 1)::INT AS n FROM samples ORDER BY n DESC LIMIT 4 OFFSET 2
SELECT {'task': task, 'n': count(*)} AS o, map {task: count(*)} AS m FROM samples GROUP BY task ORDER BY task
SELECT approx_count_distinct(token_id) > 0, count(DISTINCT token_id) FROM topk
SELECT sum(rows)::HUGEINT, 1.5::DECIMAL(4, 2), 'a'::ENUM('a', 'b'), DATE '2026-11-26' + INTERVAL 1 DAY,
    'x'::BLOB FROM shards
SELECT sum(CASE WHEN position = 0 THEN entropy END) OVER (), entropy FROM tokens ORDER BY entropy
SELECT coalesce(label_logprob_no_image, 0) AS a, visual_advantage FROM tokens ORDER BY sample_id, position
SELECT s.i, count(t.k) FROM range(5) s(i) LEFT JOIN tokens t ON t.position = s.i GROUP BY s.i ORDER BY s.i
VALUES (1, 'a'), (2, 'b')
DESCRIBE tokens
DESCRIBE SELECT task, avg(k) FROM tokens GROUP BY task
SUMMARIZE SELECT rank, token_id FROM topk WHERE rank = 1
SELECT value FROM json_each('[1, 2, 3]') ORDER BY value
SELECT 'NaN'::DOUBLE AS a, 'inf'::FLOAT AS b, NULL AS c
SELECT CAST('1' AS INTEGER) + TRY_CAST('x' AS INTEGER) IS NULL, 7 // 2, 7 % 2, 2 ** 3, 'a' || 'b', NOT true
SELECT TRY(1 / 0), nullif(1, 1), ifnull(NULL, 2), if(true, 1, 2), greatest(1, 2), coalesce(NULL, 3)
SELECT strftime(TIMESTAMP '2026-11-26 10:00:00', '%Y'), date_trunc('month', DATE '2026-11-26'), extract(year
    FROM DATE '2026-11-26')
SELECT trim(' a '), substring('abc' FROM 2 FOR 1), position('b' IN 'abc'), 'abc'[2], [1, 2, 3][1:2], 'a' LIKE
    'A', 'a' ILIKE 'A'
SELECT '{"a": {"b": 1}}'::JSON->'a'->>'b' AS b, json_extract('{"a": 1}', '$.a') AS a
TABLE errors
"""

QUESTIONS = [re.sub(r"\n +", " ", question) for question in re.split(r"\n(?! )", _TEXT.strip())]
