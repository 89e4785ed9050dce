# realjax on NVIDIA GPUs, with the libraries of CUDA 12 as pip packages; the host brings the driver (525 or later) and the
# NVIDIA container toolkit. A run's files and the hub's cache are kept outside:
#
#   docker build -t realjax .
#   docker run --gpus all --shm-size 8g -v "$PWD:/data" realjax sft model.path=/data/model dataset.train_path=/data/rows.jsonl
FROM python:3.12-slim-bookworm

# What the image is built with, such as cuda13,data.
ARG EXTRAS=cuda12,data,verifiers

ENV PYTHONUNBUFFERED=1 \
    REALJAX_FILEROOT=/data/realjax \
    HF_HOME=/data/huggingface

WORKDIR /opt/realjax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY configs ./configs
COPY realjax ./realjax
RUN pip install --no-cache-dir ".[${EXTRAS}]"

# Files in /data then belong to the first user of most machines; docker run --user says another one.
RUN useradd --uid 1000 --create-home realjax && mkdir /data && chown realjax /data
USER realjax
WORKDIR /data
ENTRYPOINT ["realjax"]
CMD ["--help"]
