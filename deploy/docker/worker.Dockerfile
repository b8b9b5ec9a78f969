# What training images begin with: Python, torch and Stretto's worker library. Build from the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t stretto-worker:0.1.0 --build-arg TORCH_OPTIONS='--index-url ...' .
# and in your own:  FROM stretto-worker:0.1.0 / COPY train.py /workspace/
# The examples under k8s/examples take --build-arg EXTRAS=worker,s3,demo -t stretto-worker-demo:0.1.0
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
# Which torch: pip's options for the build that fits your machines (CPU, a CUDA, ROCm). Without them pip takes PyPI's, which is
# for CUDA and has several gigabytes.
ARG TORCH_OPTIONS=""
ARG EXTRAS=worker,s3
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/stretto \
 && /opt/stretto/bin/pip install --no-cache-dir ${TORCH_OPTIONS} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY controller controller
COPY worker worker
COPY k8s k8s
RUN /opt/stretto/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON}
RUN useradd --uid 65532 --user-group --create-home stretto && install -d -o stretto -g stretto /workspace
COPY --from=build /opt/stretto /opt/stretto
ENV PATH=/opt/stretto/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /workspace
