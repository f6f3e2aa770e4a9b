# One image for every node: the head, the CPU tier and the GPU tier. PIP_ARGS chooses a package index; EXTRAS, say
# serve,data, what is installed beside the library.
FROM python:3.11-slim

# KubeRay's probes call wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE serve_config.yaml production.env ./
COPY llava_serve llava_serve
COPY deployments deployments
ARG PIP_ARGS=""
ARG EXTRAS="serve"
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt ".[${EXTRAS}]"

# A container is reached through its port mapping, never by its own loopback. So it serves only with keys:
# -e LLAVA_API_KEYS, or a config with api.api_keys_file; or with -e LLAVA_SERVE_OPEN=1, which lets everyone in.
WORKDIR /app
RUN python -m llava_serve_deployments.tools.haproxy /usr/local/bin/haproxy-without-splice \
    && llava-serve serve --print-config | sed 's/host: 127.0.0.1/host: 0.0.0.0/' > serve_config.yaml

USER ray
EXPOSE 8000
CMD ["python", "-m", "llava_serve_deployments.tools.serve", "--config", "serve_config.yaml"]
