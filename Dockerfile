# docker build -t deflow .                       # torch as pip finds it: on x86 that build runs on GPUs and without one
# docker build -t deflow --build-arg PIP_EXTRA_INDEX_URL=URL --build-arg TORCH=torch==2.13.0+cpu .   # smaller, CPU only
# docker run --rm --gpus all -v $PWD/logs:/home/deflow/logs -v $PWD/data:/home/deflow/data deflow \
#     train experiment=antmaze trainer=gpu compile=true
# A policy served from it: docs/serving.md.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# compile=true needs a compiler, rendering without a screen EGL and OpenGL.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 deflow
USER deflow
WORKDIR /home/deflow
ENV PATH=/home/deflow/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OGBENCH_DATASET_DIR=/home/deflow/data
RUN mkdir logs data && python -m venv .venv

# torch first and alone: resolved together with the rest, pip may take another build.
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir ${TORCH}
COPY --chown=deflow pyproject.toml setup.py constraints.txt README.md LICENSE source/
COPY --chown=deflow configs source/configs
COPY --chown=deflow src source/src
RUN pip install --no-cache-dir --constraint source/constraints.txt './source[export,hub,page,serve,tensorboard]'

# A minute of training, from generating data to the report.
HEALTHCHECK --interval=12h --timeout=10m --start-period=10m --retries=1 CMD rm -rf /tmp/health && \
    deflow train experiment=quickstart stages=joint updates=20 networks.hidden=[16,16] data.source.generate_episodes=2 \
    eval.every=20 eval.episodes=1 validate_every=20 video.episodes=0 diversity.states=0 logger=csv \
    paths.data=/tmp/health/data hydra.run.dir=/tmp/health/run

ENTRYPOINT ["deflow"]
CMD ["--help"]
