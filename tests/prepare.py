"""`python -m tests.prepare` makes what takes minutes to install, so that it is there when the tests come to it.

A test that comes first waits for it, and one that finds nothing makes it itself.
"""

from __future__ import annotations

from tests.e2e.official import official_venv
from tests.images import vllm_cpu

if __name__ == "__main__":
    vllm_cpu()
    official_venv()
