# The service in an image of its own: locked packages, no build tools, no pip, not root.
FROM python:3.14.7-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all:
WORKDIR /src

# First what changes seldom, so that a change of the source installs nothing anew.
COPY requirements/build.txt requirements/service.txt requirements/
RUN python -m venv /opt/build \
    && python -m venv --without-pip /opt/orderflow \
    && /opt/build/bin/pip install --require-hashes --requirement requirements/build.txt \
    && /opt/build/bin/pip --python /opt/orderflow/bin/python install --require-hashes --requirement requirements/service.txt

COPY pyproject.toml README.md LICENSE schema.sql ./
COPY orderflow orderflow
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/build/bin/pip --python /opt/orderflow/bin/python install --no-deps --no-index /wheels/*.whl

FROM python:3.14.7-slim-bookworm

RUN groupadd --system --gid 10001 orderflow \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent orderflow
COPY --from=build /opt/orderflow /opt/orderflow
COPY deploy/healthcheck.py /opt/orderflow/healthcheck.py

# Beyond loopback the API wants ORDERFLOW_API_KEYS (or ORDERFLOW_ALLOW_ANONYMOUS=true), and does not start without.
ENV PATH=/opt/orderflow/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    ORDERFLOW_HTTP_HOST=0.0.0.0
WORKDIR /opt/orderflow
USER 10001:10001
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "/opt/orderflow/healthcheck.py"]
ENTRYPOINT ["orderflow"]
CMD ["run"]
