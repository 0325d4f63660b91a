"""A teacher without weights: its distribution over the vocabulary is a hash of what came before.

For tests, dry runs and load trials of everything around an engine: fast enough to fill a lake with millions of samples,
with the whole truth there for laws to be tested against, and able to misbehave in the ways that real teachers do.

    engine.py    scoring by the batch, answers of its own
    truth.py     the distribution: rows, tails at any temperature, and all of it
    prefixes.py  what came before, as one number a position
    faults.py    dying, hanging and wrong answers on command
"""

from logitlake_teacher.engines.fake.engine import FakeEngine

__all__ = ["FakeEngine"]
