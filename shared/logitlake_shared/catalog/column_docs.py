"""What each column of the views is, in a sentence: those of the shards as the format declares them, and the others."""

from logitlake_schemas import COLUMNS

__all__ = ["COLUMN_DOCS"]

COLUMN_DOCS: dict[str, str] = {column.name: column.doc for columns in COLUMNS.values() for column in columns} | {
    "cache": "name of the cache",
    "position": "place of the token among the response tokens of its row, from 0",
    "token_id": "the response token; in `topk` the entry",
    "visual_advantage": "label_logprob - label_logprob_no_image: what the images add to the token, nats",
    "rank": "place of the entry in its token's list, 1 = the most probable",
    "logprob": "natural logprob of the entry at T=1",
    "path": "of the file, from the lake's root",
    "row_group": "of the file, from 0",
    "row": "place in the file, from 0",
    "num_tokens": "response tokens of the row; of a pair, chosen and rejected together",
    "shard": "number of the file in this catalog",
    "unit": "piece of work that was captured and committed as one",
    "kind": "`samples` or `pairs`; of a file also `images`",
    "sha256": "of the file",
    "bytes": "of the file; in `caches`, of all its files",
    "footer_sha256": "of the end of the file that says what it holds",
    "footer_bytes": "length of that end",
    "rows": "samples, pairs or images",
    "tokens": "response tokens",
    "stored_kl_mean": "what storing cost: mean KL(captured‖stored), nats a token",
    "stored_kl_max": "the largest of them",
    "mean_stored_mass": "mean probability that the stored entries cover",
    "mean_k": "mean number of stored entries a token",
    "first_id": "the least id of the file's rows",
    "last_id": "the greatest id of the file's rows",
    "snapshot": "number of the snapshot",
    "fingerprint": "of everything that made the cache what it is",
    "teacher": "name of the model",
    "engine": "name and version of what computed the logprobs",
    "units": "committed pieces of work",
    "bytes_per_token": "bytes of the row files a response token; images are not counted",
    "errors": "samples or pairs that are not there, with a code",
    "shards": "committed files, images included",
    "image_bytes": "of the files of images",
    "snapshot_sha256": "of the snapshot's document",
    "code": "stable, for machines: `image_decode`, `prompt_too_long`, …",
    "message": "for people",
}
"""By name: a column is the same thing in every view that has it."""
