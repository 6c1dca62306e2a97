"""What a row may name: a recipe is trusted, the rows of its tables are not.

By default a row names files below the folder of its source, objects in the source's own bucket, and hosts with public
addresses. A refusal is an ``ImageError`` whose reason tells the rule and the setting that widens it.
"""

import ipaddress
import os
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

import fsspec
from pydantic import Field, field_validator

from lookalike import storage
from lookalike.config import Config
from lookalike.errors import UsageError
from lookalike.vision.images import ImageError

RULES = {
    "outside_base": "a row names what lies below its base; fetch.roots allows more",
    "scheme_not_allowed": "rows name http, https and the scheme of their base; fetch.schemes allows more",
    "host_not_allowed": "rows name hosts by their public addresses; fetch.hosts allows others",
    "fetch_too_slow": "an image takes at most fetch.timeout_s",
    "too_many_redirects": "an image takes at most fetch.max_redirects",
    "not_a_regular_file": "FIFOs, devices and sockets are never read",
}
"""Reason of a refusal -> the rule, and the setting that widens it."""
HTTP = ("http", "https")
BUCKET_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "r2", "oss", "obs", "oci", "tos", "memory")
"""Schemes whose URIs begin with a bucket; a row may name what lies in the bucket of its base."""
PUBLIC = "public"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_INWARD = [ipaddress.ip_network(text) for text in ("168.63.129.16/32", "192.0.0.0/24", "3fff::/20", "fec0::/10")]
"""Metadata services of clouds, documentation and old private ranges that some Pythons call public."""


def refusal(reason: str, found: str) -> ImageError:
    """The error for what was found, with the rule of ``reason``."""
    return ImageError(reason, f"{found}; {RULES[reason]}")


class FetchRules(Config):
    """What the rows of a source may name besides files below its base, and how long an image may take."""

    schemes: list[str] = list(HTTP)
    """Schemes that a row may name wherever it points to; those other than http and https need fsspec's package for
    them, and ``file`` allows every file that the stage can read."""
    hosts: list[str] = [PUBLIC]
    """Hosts of http and https. ``public``: every host, by its public addresses alone; a name (``*.name`` with its
    subdomains), an address or a network (10.0.0.0/8) is allowed even if it is private."""
    roots: list[str] = []
    """Further folders, buckets and prefixes of URLs below which a row may name everything."""
    timeout_s: float = Field(30.0, gt=0, le=3600)
    """Most seconds for an image, with redirects and up to three tries."""
    max_redirects: int = Field(5, ge=0, le=50)
    """Most redirects of an image; each must lead to an allowed host."""

    @field_validator("hosts")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        for host in value:
            if not host or ("/" in host and _network(host) is None):
                raise UsageError(
                    f"fetch.hosts names {host!r}; give public, a name, an address or a network (10.0.0.0/8)"
                )
        return [host.lower() for host in value]


class Place(NamedTuple):
    """Where an image is, once the rules allow it."""

    uri: str
    """A local path with all links resolved, a URL or the URI of an object."""
    scheme: str
    """``file`` for a local path."""


def locate(text: str, base: str, rules: FetchRules) -> Place:
    """The place that a row names by ``text``; raises ``ImageError`` if it is none, or one that it may not name."""
    scheme = _scheme(text)
    relative = scheme == "file" and "://" not in text and not text.startswith("/")
    uri = storage.join(base, *(part for part in text.split("/") if part != ".")) if relative else text
    scheme = _scheme(uri)
    if storage.is_chain(uri) and scheme not in ("file", *HTTP):
        raise ImageError("bad_uri", f"{text!r:.200} chains file systems; give the URI of the image itself")
    if scheme == "file":
        return Place(_local(uri, base, rules), scheme)
    if scheme not in HTTP and scheme not in fsspec.available_protocols():
        raise ImageError("bad_uri", f"{text!r:.200} has an unknown scheme; correct it")
    if scheme in (*HTTP, *BUCKET_STORES) and ".." in urlsplit(uri).path.split("/"):
        raise ImageError("bad_uri", f"{text!r:.200} leads upwards; give the URI of the image itself")
    if not (scheme in rules.schemes or is_below_any(uri, [base, *rules.roots]) or _same_bucket(uri, base)):
        if scheme == _scheme(base) or scheme in map(_scheme, rules.roots):
            raise refusal("outside_base", f"{uri} is not below {base}")
        raise refusal("scheme_not_allowed", f"{uri} is not below {base}{_missing_package(scheme)}")
    return Place(uri, scheme)


def _missing_package(scheme: str) -> str:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        return f"; besides, its package is not installed: {error}"
    return ""


def _scheme(uri: str) -> str:
    head, separator, _ = uri.partition("://")
    scheme = head.lower() if separator else "file"
    return "file" if scheme == "local" else scheme


def _local(uri: str, base: str, rules: FetchRules) -> str:
    path = os.path.realpath(uri.partition("://")[2] if "://" in uri else uri)
    folders = [storage.local_path(root) for root in (base, *rules.roots) if _scheme(root) == "file"]
    if "\0" in path:
        raise ImageError("bad_uri", f"{uri!r:.200} has a null byte; correct it")
    if "file" not in rules.schemes and not any(storage.is_below(path, folder) for folder in folders):
        raise refusal("outside_base", f"{uri} leads to {path}, which is not below {' or '.join(folders) or base}")
    return path


def is_below_any(uri: str, roots: list[str]) -> bool:
    """Whether ``uri`` is below one of ``roots``, compared as texts."""
    return any(uri.startswith(f"{root.rstrip('/')}/") for root in roots)


def _same_bucket(uri: str, base: str) -> bool:
    ours, given = urlsplit(base), urlsplit(uri)
    return given.scheme in BUCKET_STORES and (given.scheme, given.netloc) == (ours.scheme, ours.netloc)


class HostCheck:
    """Which hosts and addresses may be connected to for the images of one source."""

    def __init__(self, base: str, rules: FetchRules) -> None:
        self._names = {host for host in rules.hosts if _network(host) is None}
        self._networks = [network for host in rules.hosts if (network := _network(host)) is not None]
        self._roots = [root for root in rules.roots if _scheme(root) in HTTP]
        # a recipe that names an address means it; a name may be given another address by whoever owns it
        if _scheme(base) in HTTP and (_network(host := urlsplit(base).hostname or "") or host == "localhost"):
            self._roots.append(base)

    def trusts(self, url: str) -> bool:
        """Whether the recipe itself names a prefix of ``url``, whatever addresses its host has."""
        return ".." not in urlsplit(url).path.split("/") and is_below_any(url, self._roots)

    def allowed(self, host: str, addresses: list[str]) -> list[str]:
        """Those of the ``addresses`` of ``host`` that may be connected to."""
        host = host.lower().rstrip(".")
        parents = {f"*.{host.split('.', n)[n]}" for n in range(host.count(".") + 1)}
        if host in self._names - {PUBLIC} or parents & self._names:
            return list(addresses)
        return [address for address in addresses if self._allows(address)]

    def _allows(self, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if any(ip in network for network in self._networks if network.version == ip.version):
            return True
        return PUBLIC in self._names and is_public(address) and not _is_own(address)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also when it wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner is not None:
            return is_public(str(inner))
    inward = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local
    return (
        ip.is_global and not inward and not any(ip in network for network in _INWARD if network.version == ip.version)
    )


def _is_own(address: str) -> bool:
    """Whether a public address is this machine's: its services may listen there. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0]) == address
    except OSError:  # no way there
        return False


def _network(host: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(host, strict=False)
    except ValueError:
        return None
