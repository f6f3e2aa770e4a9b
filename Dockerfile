# One image for every node of a cluster, or for a server on one machine:
#   docker build --target cpu --build-arg TORCH_CPU=INDEX .    INDEX has torch's CPU build, as in the README
#   docker build --target cuda .                               torch brings CUDA; the host brings the driver
# PIP_ARGS names a package index; EXTRAS, say serve,data, what is installed beside the library. The base is pinned by its
# tag: BASE=IMAGE@sha256:... pins one of your registry by its content, too.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE serve_config.yaml production.env ./
COPY llava_serve llava_serve
COPY deployments deployments
ARG PIP_ARGS=""
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel ${PIP_ARGS} --no-deps --wheel-dir /wheels .

FROM ${BASE} AS runtime
LABEL org.opencontainers.image.title="llava-serve" \
      org.opencontainers.image.description="LLaVA, a model that answers questions about pictures, on Ray Serve" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# A C compiler: Triton builds the launchers of its kernels when they first run, torch.compile its loops in C++.
# Debian keeps only the newest version of a package, so that a pinned one could not be installed later.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 ray \
    && useradd --create-home --uid 1000 --gid 1000 ray
ENV PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s --start-period=300s --retries=3 \
    CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
# A container is reached through its port mapping, never by its own loopback. So it serves only with keys:
# -e LLAVA_API_KEYS, or -e LLAVA_API_KEYS_FILE of a mounted file; or with -e LLAVA_SERVE_OPEN=1, which lets everyone in.
# -e LLAVA_MODEL names a mounted model. What follows the image's name is for `llava-serve serve`, say a config.
ENTRYPOINT ["llava-serve", "serve", "--host", "0.0.0.0"]

FROM runtime AS cpu
ARG PIP_ARGS=""
ARG EXTRAS="serve"
ARG TORCH_CPU
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install ${PIP_ARGS} --extra-index-url "${TORCH_CPU:?names the index of the CPU build of torch}" \
        -c /tmp/constraints.txt "$(ls /wheels/*.whl)[${EXTRAS}]" \
    && python -m llava_serve_deployments.tools.haproxy /usr/local/bin/haproxy-without-splice
USER 1000:1000

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG PIP_ARGS=""
ARG EXTRAS="serve"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install ${PIP_ARGS} -c /tmp/constraints.txt "$(ls /wheels/*.whl)[${EXTRAS}]" \
    && python -m llava_serve_deployments.tools.haproxy /usr/local/bin/haproxy-without-splice
USER 1000:1000
