"""With which login images are pulled, and their registries asked about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nimhost.errors import NotFound
from nimhost.refs import NGC_KEY, Ref

NGC_REGISTRY = "nvcr.io"
NGC_USER = "$oauthtoken"

Secret = Callable[[Ref], Awaitable[str]]
"""The value of a secret; raises NotFound."""


async def ngc_login(image: str, secret: Secret) -> tuple[str, str] | None:
    """(user, key) for an image of NVIDIA's registry; None for any other, and where there is no key.

    For those there is the user's `docker login`: see `Containers.login`.
    """
    if not image.startswith(f"{NGC_REGISTRY}/"):
        return None
    try:
        return NGC_USER, await secret(NGC_KEY)
    except NotFound:
        return None
