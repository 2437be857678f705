"""A small real engine behind vLLM's command line: llama.cpp serves the `.gguf` found in the model's directory.

    serve.py MODEL_DIR --served-model-name NAME... [--port 8000] [flags of vLLM, ignored]

It answers /health, /v1/models and the OpenAI routes. Unlike vLLM it takes any model name and knows no LoRA API.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--served-model-name", nargs="+", default=[])
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    known, rest = parser.parse_known_args()
    directory = next((Path(arg) for arg in rest if Path(arg).is_dir()), None)
    if directory is None:
        sys.exit("no model: none of the arguments is a directory")
    weights = sorted(directory.glob("*.gguf"))
    if not weights:
        sys.exit(f"{directory} has no .gguf file")

    params = xllamacpp.CommonParams()
    params.model.path = str(weights[0])
    params.model_alias = set(known.served_model_name or [str(directory)])
    params.hostnames = [known.host]
    params.port = known.port
    params.n_parallel = 4
    params.ui = False

    # Blocked before the server's threads exist, so that none of them gets the signal: we wait for it here.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    server = xllamacpp.Server(params)
    print(f"serving {weights[0]} at {server.listening_address}", flush=True)
    signal.sigwait(stop)


if __name__ == "__main__":
    main()
