"""The transformers teacher: exact, and the measure of the other engines.

    engine.py      requests to batches, rows to answers
    model.py       the stock model: loading, images, last hidden states, generation
    attention.py   many sequences in one row without a padded position
    rows.py        from a chunk of logits to what is captured of it

One forward pass to the last hidden states, then only the response rows go through the lm_head, in float32 chunks: no
`[sequence, vocabulary]` tensor lives.
"""

from logitlake_teacher.engines.hf.engine import HfEngine

__all__ = ["HfEngine"]
