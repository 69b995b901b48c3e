# syntax=docker/dockerfile:1
# assay on a CPU:
#     python scripts/release.py
#     docker build --tag assay .
#     docker run --rm --network none --volume "$PWD:/work" assay evaluate net.onnx images/ --threat linf:8/255
#
# Say where the CPU builds of torch are, if the usual index has none: --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/assay
COPY requirements-release.txt /tmp/
RUN /opt/assay/bin/pip install --require-hashes --requirement /tmp/requirements-release.txt
COPY dist/*.whl /tmp/
RUN /opt/assay/bin/pip install --no-deps /tmp/assay-*.whl && /opt/assay/bin/pip check

FROM python:3.11-slim
COPY --from=build /opt/assay /opt/assay
RUN useradd --create-home --uid 1000 assay && mkdir /work && chown assay /work
ENV PATH=/opt/assay/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER assay
WORKDIR /work
ENTRYPOINT ["assay"]
CMD ["--help"]
