# nemo_kd in NVIDIA's NeMo container. Build: docker build -t nemo-kd .
# The container of NeMo 2.5: docker build --build-arg NEMO_TAG=25.09 -t nemo-kd .
# For SLURM with enroot: enroot import -o nemo-kd.sqsh dockerd://nemo-kd
ARG NEMO_TAG=25.07
FROM nvcr.io/nvidia/nemo:${NEMO_TAG}

WORKDIR /opt/nemo-kd
COPY . .

# Only nemo_kd and msgspec, which checks the JSON of stores, may be added, and nothing changed: torch,
# NeMo, megatron-core, TransformerEngine and apex are built for each other. The container's pip
# constraints would also pin the build's setuptools.
RUN python -m pip freeze --all --exclude msgspec > /tmp/before.txt \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps . msgspec \
    && python -m pip freeze --all --exclude nemo-kd --exclude msgspec > /tmp/after.txt \
    && diff /tmp/before.txt /tmp/after.txt \
    && rm /tmp/before.txt /tmp/after.txt

# In another directory, to test the installed package; fails on an unsupported stack.
WORKDIR /workspace
RUN python -m nemo_kd.doctor
