# The Kubernetes operator: no torch, no controller. Build from the repository's root:
#   docker build -f deploy/docker/operator.Dockerfile -t stretto-operator:0.1.0 .
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY proto proto
COPY controller controller
COPY worker worker
COPY k8s k8s
RUN python -m venv /opt/stretto \
 && /opt/stretto/bin/pip install --no-cache-dir --constraint constraints.txt '.[operator]' \
 && /opt/stretto/bin/pip uninstall --yes pip

FROM ${PYTHON}
RUN useradd --uid 65532 --user-group --create-home stretto
COPY --from=build /opt/stretto /opt/stretto
ENV PATH=/opt/stretto/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8081
ENTRYPOINT ["stretto-operator"]
