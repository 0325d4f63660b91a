# The teacher service. Build from the repository's root:
#
#   docker build --file docker/teacher.Dockerfile --tag logitlake-teacher .
#
# EXTRA says what runs the teacher: `teacher` is vLLM for NVIDIA GPUs, `teacher-cpu` vLLM for the CPU, `teacher-hf`
# transformers alone. The last two want PyTorch's CPU index in PIP_EXTRA_INDEX_URL, else pip brings CUDA along.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# vLLM compiles small kernels when it first runs (gcc, g++) and its CPU build links libnuma.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY storage_schemas storage_schemas
COPY shared shared
COPY teacher_service teacher_service
COPY student_trainer student_trainer

ARG EXTRA=teacher
# Further packages, e.g. scikit-learn, from which the demo's data maker takes its handwritten digits.
ARG ALSO=""
ARG PIP_EXTRA_INDEX_URL=""
# constraints.txt was made with vLLM's CPU build; the GPU build of the same release wants another apache-tvm-ffi.
RUN if [ "${EXTRA}" = teacher ]; then \
        sed --in-place --expression '/^apache-tvm-ffi==/d' --expression '$a vllm==0.32.0' constraints.txt; \
    fi
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --disable-pip-version-check --constraint constraints.txt ".[${EXTRA}]" ${ALSO}

COPY examples examples

# Jobs write below /app/runs, the place for a volume; nothing else is writable.
RUN useradd --create-home --uid 1000 logitlake && mkdir runs && chown logitlake:logitlake runs
USER logitlake
ENV HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
CMD ["logitlake-teacher", "--help"]
