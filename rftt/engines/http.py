"""Transport requests to untrusted servers: replies and times are bounded, a proxy is named."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

CONNECT_S = 30.0
"""Time to connect, in seconds."""
MAX_REPLY_BYTES = 16 << 20
"""Maximum size of a reply. A longer one is an error."""
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which a retry may succeed. The failed attempt was not billed."""


class Bounded(httpx2.AsyncBaseTransport):
    """A transport that reads each reply completely, within `deadline_s` and MAX_REPLY_BYTES.

    The bounds also hold for slow, endless and compressed bodies.
    """

    def __init__(self, url: str, *, deadline_s: float, max_connections: int) -> None:
        proxy = proxy_of(url)
        self._deadline_s = deadline_s
        parts = urlsplit(proxy or "")
        self.route = f" through the proxy {parts.hostname}:{parts.port}" if proxy else ""
        """Names the proxy of the environment in errors, without its password."""
        limits = httpx2.Limits(max_connections=max_connections)
        self._inner = httpx2.AsyncHTTPTransport(proxy=proxy, limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send `request` and return its reply. Raises httpx2.TransportError only."""
        request.headers["accept-encoding"] = "identity"
        connect_s = min(CONNECT_S, self._deadline_s / 2)
        # Only connecting has its own limit. The deadline below covers everything else.
        request.extensions["timeout"] = {"connect": connect_s}
        body = bytearray()
        try:
            async with asyncio.timeout(self._deadline_s):
                response = await self._inner.handle_async_request(request)
                try:
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise httpx2.RemoteProtocolError("the reply is compressed")
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) > MAX_REPLY_BYTES:
                            raise httpx2.ReadError(f"reply over {MAX_REPLY_BYTES} bytes")
                finally:
                    await response.aclose()
        except TimeoutError as error:
            message = f"no whole reply within {self._deadline_s:g} s"
            raise httpx2.ReadTimeout(message, request=request) from error
        return httpx2.Response(
            response.status_code, headers=response.headers, content=bytes(body), request=request
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()


def proxy_of(url: str) -> str | None:
    """Return the environment's proxy for `url`, or None. A loopback address never uses one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def is_loopback(host: str) -> bool:
    """Return whether `host` is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
