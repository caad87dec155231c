# The server on a CPU. In the repository's root:
#
#   docker build --file packaging/containers/cpu.Dockerfile --tag rollout-server .
#   docker run --rm --publish 127.0.0.1:8000:8000 --env ROLLOUT_API_KEY --env ROLLOUT_ADMIN_KEY \
#     --volume rollout-server:/var/lib/rollout-server rollout-server
#
# Options of `serve` go behind the image's name. Without keys it does not listen: it is reached from outside.
# A replica of another machine's fleet keeps no versions and has no port at which it could be found healthy:
#
#   docker run --rm --no-healthcheck --env ROLLOUT_STATE_DIR= --env ROLLOUT_FLEET_KEY \
#     --volume rollout-server:/var/lib/rollout-server rollout-server serve --join http://studio:8000

FROM python:3.12-slim-bookworm AS build
WORKDIR /source
RUN pip install --no-cache-dir uv==0.13.9
COPY pyproject.toml README.md LICENSE requirements.lock.txt ./
COPY rollout_server rollout_server
COPY adapters adapters
COPY trainer_client trainer_client
# The locked versions of what the package asks for, and no tool of its tests.
RUN uv venv /opt/rollout-server \
    && uv pip install --no-cache --python /opt/rollout-server/bin/python --constraints requirements.lock.txt .

FROM python:3.12-slim-bookworm
# mlx brings the reference BLAS, which is some fifty times slower.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libopenblas0-pthread \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/rollout-server rollout-server
COPY --from=build /opt/rollout-server /opt/rollout-server
ENV PATH=/opt/rollout-server/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/rollout-server/huggingface \
    ROLLOUT_HOST=0.0.0.0 \
    ROLLOUT_PORT=8000 \
    ROLLOUT_STATE_DIR=/var/lib/rollout-server/state
USER 10001
WORKDIR /var/lib/rollout-server
VOLUME /var/lib/rollout-server
EXPOSE 8000
# The start may download a model, during which it does not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["rollout-server"]
CMD ["serve"]
