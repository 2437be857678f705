"""The gateway as the daemon runs it, behind its server and gate, with one engine. Arguments: PORT ENGINE_URL."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import Any

import uvloop

from nimhost.api.app import entry
from nimhost.config import Settings
from nimhost.entities import ServedModel
from nimhost.gateway.memory import settle
from nimhost.gateway.proxy import Gateway
from nimhost.gateway.routes import Upstream, build_table
from nimhost.listening import Server
from nimhost.refs import Ref


async def control(_scope: Any, _receive: Any, _send: Any) -> None:
    raise NotImplementedError("only the gateway is measured")


async def main(port: int, engine_url: str) -> None:
    settings = Settings()
    gateway = Gateway(settings.gateway)
    served = (ServedModel("default/bench", "bench-served"),)
    engine = Upstream(provider=Ref("default", "bench"), base_url=engine_url, policy="vllm", served=served)
    gateway.table = build_table([engine])
    server = Server(entry(control, gateway, settings), 1.0, on_stop=lambda: None)
    settle()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    await server.serve(sockets=[socket.create_server(("127.0.0.1", port), backlog=2048)])
    await gateway.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
