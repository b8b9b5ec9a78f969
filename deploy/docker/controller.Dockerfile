# The controller alone: no torch. Build from the repository's root:
#   docker build -f deploy/docker/controller.Dockerfile -t stretto-controller:0.1.0 .
# For a build that is the same for ever, give the base image by its digest: --build-arg PYTHON=python@sha256:...
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY proto proto
COPY controller controller
COPY worker worker
COPY k8s k8s
RUN python -m venv /opt/stretto \
 && /opt/stretto/bin/pip install --no-cache-dir --constraint constraints.txt '.[controller]' \
 && /opt/stretto/bin/pip uninstall --yes pip

FROM ${PYTHON}
RUN useradd --uid 65532 --user-group --create-home stretto && install -d -o stretto -g stretto /data
COPY --from=build /opt/stretto /opt/stretto
ENV PATH=/opt/stretto/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
VOLUME /data
EXPOSE 29400 8080
# SIGTERM reaches the controller itself.
ENTRYPOINT ["stretto", "controller", "--data-dir", "/data"]
