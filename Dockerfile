# docker build -t tandem . && docker run --gpus all -p 8000:8000 -v /path/to/Qwen3.5-4B:/model tandem --model /model --mtp-step 1
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /tandem
RUN python3 -m venv /venv
COPY pyproject.toml README.md ./
COPY kernels kernels
COPY models models
COPY server server
COPY benchmarks benchmarks
RUN /venv/bin/pip install --no-cache-dir ".[cuda]"

EXPOSE 8000
ENTRYPOINT ["/venv/bin/python", "-m", "server", "--host", "0.0.0.0"]
CMD ["--mtp-step", "1"]
