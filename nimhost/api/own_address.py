"""Does a URL lead to the nimhost that it is given to? Pure: what only a name server knows is found out when asked."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from nimhost.config import Server
from nimhost.errors import InvalidRequest

_PORTS = {"http": 80, "https": 443}


def check_not_own(url: str, server: Server) -> None:
    """Raises InvalidRequest, naming the field: a provider there would be asked by itself, and ask itself again."""
    if is_own(url, server):
        raise InvalidRequest.field(
            "is where nimhost itself listens: a request would go round in circles. For another name for a model, see: "
            "nimhost inference virtual-models create --help",
            "host_url",
            input=url,
        )


def is_own(url: str, server: Server) -> bool:
    parts = urlsplit(url)
    if (parts.port or _PORTS.get(parts.scheme)) != server.port:
        return False
    name, bound = (parts.hostname or "").rstrip("."), _address(server.host)
    if name in {server.host.lower(), *(host.lower() for host in server.allowed_hosts)}:
        return True
    on_loopback = server.host == "localhost" or (bound is not None and (bound.is_loopback or bound.is_unspecified))
    if name == "localhost" or name.endswith(".localhost"):
        return on_loopback
    address = _address(name)
    if address is None:
        return False
    if bound is None or bound.is_unspecified:
        return on_loopback and (address.is_loopback or address.is_unspecified)
    return address == bound or (on_loopback and address.is_unspecified)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address
