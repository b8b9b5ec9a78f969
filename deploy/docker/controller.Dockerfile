# The controller alone: no torch. Build from the repository's root:
#   docker build -f deploy/docker/controller.Dockerfile -t stretto-controller .
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY controller controller
COPY worker worker
RUN pip install --no-cache-dir '.[controller]' && useradd --create-home stretto && install -d -o stretto /data
USER stretto
VOLUME /data
EXPOSE 29400 8080
# SIGTERM reaches the controller itself.
ENTRYPOINT ["stretto", "controller", "--data-dir", "/data"]
