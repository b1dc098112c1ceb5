"""A transport for servers that are not trusted: bounded replies, bounded time, a named proxy."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

CONNECT_S = 30.0
"""Time to connect, in seconds."""
MAX_REPLY_BYTES = 16 << 20
"""Size of a reply; longer ones are errors."""
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which a server may succeed later and has billed nothing."""


class Bounded(httpx2.AsyncBaseTransport):
    """Reads every reply whole, within `deadline_s` and MAX_REPLY_BYTES.

    Neither dripped bytes nor an endless or compressed body get around these bounds.
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
        request.extensions["timeout"] = {"connect": connect_s}  # all else: the deadline
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
        await self._inner.aclose()


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment names for `url`; None for a loopback address."""
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
