"""Every error that a user of LogitLake can meet, as one tree.

    LogitLakeError
    ├── ConfigError (ValueError)          a configuration file or override
    ├── DataError (ValueError)            input data: a record, a line, a field
    │   └── ImageError                    an image that cannot be used
    ├── LakeError                         the lake
    │   ├── LakeFormatError               a document or shard of another format, or not a lake at all
    │   ├── LakeCorruptError              bytes that are not the bytes that were committed
    │   ├── LakeConflictError             somebody else committed something different
    │   ├── NotInLakeError                a cache or a snapshot that is not there
    │   ├── FingerprintMismatchError      two things that do not belong together
    │   └── QueryError (ValueError)       a SQL question that cannot be answered
    │       ├── QueryRefusedError         the gate does not let it through
    │       ├── QueryTimeoutError         not answered by its deadline
    │       ├── QueryMemoryError          it needs more memory than a question may have
    │       ├── QueryTooLargeError        not even one row of its answer fits the limit
    │       ├── QueryCancelledError       somebody cancelled it
    │       ├── QueryBusyError            too many questions wait already
    │       └── QueryCrashedError         the process that was to answer it ended
    ├── ScoresError (RuntimeError)        a file of a student's scores
    ├── RunFilesError (RuntimeError)      a file of a training run
    ├── EngineError (RuntimeError)        a teacher engine
    ├── JobError (RuntimeError)           a job, or the cluster that is to run it
    │   ├── JobStateError                 a job in another state than this needs
    │   └── JobSubmitError                a key that was used for another submission
    ├── ServiceError (RuntimeError)       a service that refused, failed, or did not answer
    ├── TrainingError (RuntimeError)      the student trainer
    │   ├── CheckpointError               checkpoints, none of which is whole
    │   └── MemoryExhaustedError          a step that does not fit the device
    └── ExportError (RuntimeError)        an exported student that is not what was trained

A message says what is wrong, where, what was expected, what was got and what to do. No class has an `__init__` of
its own: Ray pickles exceptions, and a constructor with other arguments does not survive that.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "ExportError",
    "FingerprintMismatchError",
    "ImageError",
    "JobError",
    "JobStateError",
    "JobSubmitError",
    "LakeConflictError",
    "LakeCorruptError",
    "LakeError",
    "LakeFormatError",
    "LogitLakeError",
    "MemoryExhaustedError",
    "NotInLakeError",
    "QueryBusyError",
    "QueryCancelledError",
    "QueryCrashedError",
    "QueryError",
    "QueryMemoryError",
    "QueryRefusedError",
    "QueryTimeoutError",
    "QueryTooLargeError",
    "RunFilesError",
    "ScoresError",
    "ServiceError",
    "TrainingError",
]


class LogitLakeError(Exception):
    """Anything that LogitLake can explain to its user."""

    exit_code = 2
    """of a command that ends with it"""


class ConfigError(LogitLakeError, ValueError):
    """A configuration that cannot be used."""


class DataError(LogitLakeError, ValueError):
    """Input data that cannot be used."""


class ImageError(DataError):
    """An image that cannot be used. The message begins with its code and a colon, e.g. `image_decode: …`."""


class LakeError(LogitLakeError):
    """Something about the lake."""


class LakeFormatError(LakeError):
    """Not a lake, or one of a format that this release does not read."""


class LakeCorruptError(LakeError):
    """Committed bytes that are missing or changed."""


class LakeConflictError(LakeError):
    """Another publisher committed something different under the same name."""


class NotInLakeError(LakeError):
    """A cache or a snapshot that somebody named, and that is not there."""


class FingerprintMismatchError(LakeError):
    """A cache, a teacher or a student that do not belong together. The message names the field that differs."""


class QueryError(LakeError, ValueError):
    """A SQL statement that failed or is not allowed."""


class QueryRefusedError(QueryError):
    """A question of a kind that is not answered. The message names the part of it that is not allowed."""


class QueryTimeoutError(QueryError):
    """A question that was not answered, or whose answer was not read, by its deadline."""


class QueryMemoryError(QueryError):
    """A question that needs more memory than one may have."""


class QueryTooLargeError(QueryError):
    """An answer of which not even the first row fits the limit of bytes."""


class QueryCancelledError(QueryError):
    """A question that was cancelled."""


class QueryBusyError(QueryError):
    """A question that was not begun: as many as may run do run, and as many as may wait wait."""

    retry_after_s: int = 1
    """when it is worth asking again"""


class QueryCrashedError(QueryError):
    """A question whose process ended without an answer: it crashed, or somebody killed it."""


class ScoresError(LogitLakeError, RuntimeError):
    """A file that is no scores of a student, or whose bytes are not those that were written."""


class RunFilesError(LogitLakeError, RuntimeError):
    """A file of a training run that is not what a trainer writes. The message names it from the run on."""


class EngineError(LogitLakeError, RuntimeError):
    """A teacher engine that cannot go on."""


class JobError(LogitLakeError, RuntimeError):
    """A job that cannot be submitted, found or followed."""


class JobStateError(JobError):
    """A job that is in another state than what was asked of it needs."""


class JobSubmitError(JobError):
    """A submission whose idempotency key is another submission's."""


class ServiceError(LogitLakeError, RuntimeError):
    """A service that answered with a problem, or not at all.

    The fields are those of its problem document (docs/errors.md); `code` is `unreachable` where nobody answered.
    """

    code: str = "unreachable"
    status: int = 0
    hint: str = ""
    retryable: bool = False
    retry_after_s: float | None = None
    request_id: str | None = None


class TrainingError(LogitLakeError, RuntimeError):
    """A training run that cannot go on."""


class CheckpointError(TrainingError):
    """A run that left checkpoints of which none is whole."""

    exit_code = 4


class MemoryExhaustedError(TrainingError):
    """A step that does not fit the device's memory."""

    exit_code = 5


class ExportError(LogitLakeError, RuntimeError):
    """An exported checkpoint that does not reproduce the trained student."""
