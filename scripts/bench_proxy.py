"""The gateway alone, as the daemon runs it, with one engine. Arguments: PORT ENGINE_URL."""

from __future__ import annotations

import asyncio
import sys

import uvicorn
import uvloop

from nimhost.config import Gateway as GatewaySettings
from nimhost.entities import ServedModel
from nimhost.gateway.proxy import Gateway
from nimhost.gateway.routes import Upstream, build_table
from nimhost.refs import Ref


async def main(port: int, engine_url: str) -> None:
    gateway = Gateway(GatewaySettings())
    served = (ServedModel("default/bench", "bench-served"),)
    engine = Upstream(provider=Ref("default", "bench"), base_url=engine_url, policy="vllm", served=served)
    gateway.table = build_table([engine])
    config = uvicorn.Config(
        gateway,
        host="127.0.0.1",
        port=port,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        proxy_headers=False,
        server_header=False,
        backlog=2048,
    )
    await uvicorn.Server(config).serve()
    await gateway.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1]), sys.argv[2]))
