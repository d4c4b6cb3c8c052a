# CPU: docker build -t keras-morph .
# GPU: docker build -t keras-morph:gpu --build-arg DEVICE=gpu .
FROM python:3.12-slim

ARG DEVICE=cpu

# CUDA comes with TensorFlow's own packages; the host needs its driver and the NVIDIA container toolkit only.
RUN case "$DEVICE" in \
        cpu) tensorflow=tensorflow-cpu ;; \
        gpu) tensorflow='tensorflow[and-cuda]' ;; \
        *) echo "DEVICE: expected cpu or gpu, received $DEVICE" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir "$tensorflow>=2.20" tensorboard

WORKDIR /opt/keras-morph
COPY pyproject.toml README.md LICENSE main.py ./
COPY src src
COPY examples examples
RUN pip install --no-cache-dir '.[demo,tfds]'

ENV KERAS_BACKEND=tensorflow
# TensorBoard
EXPOSE 6006
# Runs and data are on the host: -v "$(pwd)":/mnt
WORKDIR /mnt
CMD ["bash"]
