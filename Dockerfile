# One image for every node: the head, the CPU tier and the GPU tier. PIP_ARGS chooses a package index.
FROM python:3.11-slim

# KubeRay's probes call wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY llava_serve llava_serve
COPY deployments deployments
ARG PIP_ARGS=""
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt . \
    && python -m deployments.tools.haproxy /usr/local/bin/haproxy-without-splice

# A container is reached through its port mapping, never by its own loopback.
COPY serve_config.yaml production.env ./
RUN sed -i 's/host: 127.0.0.1/host: 0.0.0.0/' serve_config.yaml

USER ray
EXPOSE 8000
CMD ["python", "-m", "deployments.tools.serve", "--config", "serve_config.yaml"]
