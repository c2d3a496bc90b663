FROM python:3.12-slim-bookworm

# Triton compiles a small C module when it first meets a GPU. gcc alone cannot:
# Debian only recommends the C headers, so they are named. Python's headers are
# part of the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 reader

# uv installs what pyproject.toml asks for without the project itself
WORKDIR /warpmap
COPY pyproject.toml ./
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache -r pyproject.toml --extra test

# a change of the code rebuilds only what follows
COPY . .
USER 1000
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python", "-m", "pytest", "-p", "no:cacheprovider"]
CMD ["src/warpmap", "tests", "--ignore=tests/site", "--gpu", "1"]
