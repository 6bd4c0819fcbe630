"""Fetches links that strangers give, and asks nobody but hosts of the public internet.

A link may name a host inside: http://127.0.0.1/, http://169.254.169.254/ (secrets of cloud machines), or a name of
somebody's that resolves to such an address. So every name is resolved once, all of its addresses have to be public, and
the connection goes to one of these very addresses: a second look-up could give another answer. Redirects are new
requests and are checked in the same way.

A timeout of a socket starts again with every byte that comes. A server that sends one byte per second, or that answers
"100 Continue" for ever, would keep a request as long as it likes, so `PublicOpener.limit` closes the connection after a
time for the whole of it.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 addresses whose last 32 bits are the IPv4 address that a gateway asks."""


class NotPublic(OSError):
    """The host has an address that is not of the public internet, or none."""


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet; one that holds an IPv4 address has to hold a public one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address.teredo:
            inner = address.teredo[1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


def public_addresses(
    host: str,
    port: int,
    *,
    resolve: Callable[..., Any] = socket.getaddrinfo,
    allow: Callable[[Address], bool] = is_public,
) -> list[str]:
    """The addresses of a host, in the order of the resolver.

    Raises:
        NotPublic: one of them is not allowed, or there is none.
    """
    found = []
    for *_, socket_address in resolve(host, port, type=socket.SOCK_STREAM):
        address = ipaddress.ip_address(
            socket_address[0].split("%")[0]
        )  # without the name of a network interface
        if not allow(address):
            raise NotPublic(f"{host} is not a host of the public internet")
        found.append(str(address))
    if not found:
        raise NotPublic(f"{host} has no address")
    return found


class Limit:
    """Time for everything that a request does; when it is over, its connections are closed."""

    def __init__(self) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def watch(self, connection: socket.socket) -> None:
        # a copy of the descriptor: TLS takes the socket itself apart, and http.client closes it when it likes
        copy = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            self._sockets.append(copy)
        if self.over:
            self.end()

    def end(self) -> None:
        """What is waiting for the server then gets the end of the connection."""
        self.over = True
        with self._lock:
            for connection in self._sockets:
                with suppress(OSError):  # the server may have closed it already
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()


class PublicOpener:
    """`open` as urllib's openers have it, for public http and https addresses only.

    Args:
        resolve, connect: how names become addresses, and addresses connections.
        allow_private: ask hosts of one's own network, too, and the proxy that the environment names. A proxy resolves
            names itself, so that nothing here could be checked.
    """

    def __init__(
        self,
        *,
        resolve: Callable[..., Any] = socket.getaddrinfo,
        connect: Callable[..., socket.socket] = socket.create_connection,
        allow_private: bool = False,
    ):
        self.resolve = resolve
        self.connect = connect
        self.allow = (lambda address: True) if allow_private else is_public
        self._of_thread = threading.local()
        self.opener = urllib.request.OpenerDirector()
        # no handler of ftp:, file: or data:
        for handler in (
            *([urllib.request.ProxyHandler()] if allow_private else []),
            urllib.request.UnknownHandler(),
            _PublicHTTP(self.connect_to),
            _PublicHTTPS(self.connect_to),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self.opener.add_handler(handler)

    def open(self, request: urllib.request.Request, timeout: float) -> Any:
        """Raises urllib.error.URLError, with NotPublic as its reason where the host is refused."""
        return self.opener.open(request, timeout=timeout)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[Limit]:
        """Within the block, what this thread opens is closed after these seconds, its answer read or not.

        A closed connection looks like the end of an answer, so ask `Limit.over` before you take it for whole. The
        resolver of the operating system is not interrupted; it gives up by itself.
        """
        limit = Limit()
        timer = threading.Timer(seconds, limit.end)
        timer.daemon = True
        timer.start()
        self._of_thread.limit = limit
        try:
            yield limit
        finally:
            del self._of_thread.limit
            timer.cancel()
            limit.close()

    def connect_to(
        self, address: tuple[str, int], timeout: Any = None, source_address: Any = None
    ) -> socket.socket:
        """In place of socket.create_connection."""
        host, port = address
        last_error = OSError(f"{host} has no address")
        for allowed in public_addresses(host, port, resolve=self.resolve, allow=self.allow):
            try:
                connection = self.connect((allowed, port), timeout, source_address)
            except OSError as error:
                last_error = error
                continue
            if limit := getattr(self._of_thread, "limit", None):
                limit.watch(connection)
            return connection
        raise last_error


class _PublicHTTP(urllib.request.HTTPHandler):
    def __init__(self, connect_to: Callable[..., socket.socket]):
        super().__init__()
        self.connect_to = connect_to

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_connection_class(http.client.HTTPConnection, self.connect_to), request)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def __init__(self, connect_to: Callable[..., socket.socket]):
        super().__init__()
        self.connect_to = connect_to

    def https_open(self, request: urllib.request.Request) -> Any:
        # the certificate is checked against the name of the host, not against its address
        return self.do_open(_connection_class(http.client.HTTPSConnection, self.connect_to), request)


def _connection_class(base: type, connect_to: Callable[..., socket.socket]) -> Any:
    """http.client's connection with another way to connect; the host's name stays for the headers and for TLS."""

    class PublicConnection(base):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self._create_connection = connect_to

    return PublicConnection
