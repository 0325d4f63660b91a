# The student trainer. Build from the repository's root:
#
#   docker build --file docker/student.Dockerfile --tag logitlake-student .
#
# On a machine without a GPU give PyTorch's CPU index in PIP_EXTRA_INDEX_URL, else pip brings CUDA along.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY storage_schemas storage_schemas
COPY shared shared
COPY teacher_service teacher_service
COPY student_trainer student_trainer

ARG EXTRA=student
ARG PIP_EXTRA_INDEX_URL=""
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --disable-pip-version-check --constraint constraints.txt ".[${EXTRA}]"

COPY examples examples

# Jobs write below /app/runs, the place for a volume; nothing else is writable.
RUN useradd --create-home --uid 1000 logitlake && mkdir runs && chown logitlake:logitlake runs
USER logitlake
ENV HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
CMD ["logitlake-student", "--help"]
