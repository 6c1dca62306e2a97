"""Images behind URLs: bytes, seconds, redirects and addresses bounded, whatever the server does."""

import asyncio
import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

import lookalike
from lookalike.data.sources.fetch_rules import HTTP, FetchRules, HostCheck, is_below_any, refusal
from lookalike.vision.images import ImageError

CONNECTIONS = 8  # at a time in one task
TRIES = 3
REDIRECT = (301, 302, 303, 307, 308)
GONE = (404, 410)
CHUNK_BYTES = 1 << 16
HEADERS = {
    "User-Agent": f"lookalike/{lookalike.__version__}",
    "Accept": "image/*, */*;q=0.1",
    "Accept-Encoding": "identity",  # what arrives is what counts against the bound
}


def _session(resolver: AbstractResolver) -> aiohttp.ClientSession:
    """A session with its own connections, so that none is used again under other rules."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS, resolver=resolver, use_dns_cache=False),
        headers=HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None),
    )


class _Resolver(AbstractResolver):
    """Resolves a name to those of its addresses that are allowed; aiohttp connects to these and asks nobody again."""

    def __init__(self, check: HostCheck) -> None:
        self._check, self._resolver = check, aiohttp.ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
        found = await self._resolver.resolve(host, port, family)
        kept = set(self._check.allowed(host, [entry["host"] for entry in found]))
        if found and not kept:
            raise refusal("host_not_allowed", f"{host} has the address {found[0]['host']}")
        return [entry for entry in found if entry["host"] in kept]

    async def close(self) -> None:
        await self._resolver.close()


class HttpFetch:
    """Fetches the images of one batch; an asynchronous context manager."""

    def __init__(self, base: str, rules: FetchRules, max_bytes: int) -> None:
        self._base, self._rules, self._max_bytes = base, rules, max_bytes
        self._check = HostCheck(base, rules)
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> "HttpFetch":
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self._sessions.values():
            await session.close()

    async def image(self, url: str) -> bytes | ImageError:
        """The first bytes behind ``url``, up to ``max_bytes`` + 1, or why there are none.

        Tried again while its server or network fails and time is left.
        """
        problem: object = None
        try:
            async with asyncio.timeout(self._rules.timeout_s):
                for _ in range(TRIES):
                    try:
                        return await self._follow(url)
                    except ImageError as refused:
                        return refused
                    except (aiohttp.InvalidURL, ValueError) as error:
                        return ImageError("bad_uri", f"{url} is no URL: {error}; correct it")
                    except (aiohttp.ClientError, OSError) as error:
                        problem = error
        except TimeoutError:
            return refusal("fetch_too_slow", f"{url} took more than {self._rules.timeout_s:g} s: {problem}")
        return ImageError("unreachable", f"{url} could not be read in {TRIES} tries: {problem}")

    async def _follow(self, url: str) -> bytes:
        place = URL(url)
        for _ in range(self._rules.max_redirects + 1):
            async with self._session_of(place).get(place, allow_redirects=False) as answer:
                if answer.status not in REDIRECT:
                    return await self._read(answer)
                place = place.join(URL(answer.headers.get("Location", "")))
        raise refusal("too_many_redirects", f"{url} was redirected more than {self._rules.max_redirects} times")

    def _session_of(self, place: URL) -> aiohttp.ClientSession:
        """The session that may fetch ``place``; raises ``ImageError`` if the rules refuse its scheme or its address."""
        url, host = str(place), place.raw_host or ""
        trusted = self._check.trusts(url)
        if place.scheme not in HTTP or not (
            trusted or place.scheme in self._rules.schemes or is_below_any(url, [self._base])
        ):
            raise refusal("scheme_not_allowed", f"{url} has the scheme {place.scheme!r}")
        if not trusted and (":" in host or host.replace(".", "").isdigit()):  # no name, so no resolver sees it
            try:
                allowed = self._check.allowed(host, [host])
            except ValueError:  # such as 127.1, which the system takes for 127.0.0.1
                allowed = []
            if not allowed:
                raise refusal("host_not_allowed", f"{url} names the address {host}")
        if trusted not in self._sessions:
            self._sessions[trusted] = _session(aiohttp.ThreadedResolver() if trusted else _Resolver(self._check))
        return self._sessions[trusted]

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        if answer.status in GONE:
            raise ImageError("not_found", f"there is nothing at {answer.url}; restore it or correct its record")
        answer.raise_for_status()
        content = bytearray()
        while len(content) <= self._max_bytes and (piece := await answer.content.read(CHUNK_BYTES)):
            content += piece
        return bytes(content[: self._max_bytes + 1])
