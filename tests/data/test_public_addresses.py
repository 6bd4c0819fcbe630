"""Who is asked when a stranger gives a link: names are resolved here, and connections end at a loopback server."""

import ipaddress
import socket
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from data.public_addresses import NotPublic, PublicOpener, is_public, public_addresses

PUBLIC, OTHER_PUBLIC = "93.184.216.34", "2606:2800:220:1::1"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        target = self.server.redirects.get(self.path)
        self.server.hosts.append(self.headers["Host"])
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        self.end_headers()
        self.wfile.write(b"picture")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    server.redirects = {}
    server.hosts = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Network:
    """A resolver with these names, and connections that all end at one loopback server."""

    def __init__(self, server, **names):
        self.server = server
        self.names = {name.replace("_", "."): list(addresses) for name, addresses in names.items()}
        self.resolved = []
        self.connected = []

    def resolve(self, host, port, **options):
        self.resolved.append(host)
        addresses = self.names.get(host)
        if addresses is None:
            return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options)
        return [(0, 0, 0, "", (address, port)) for address in addresses]

    def connect(self, address, timeout, source_address):
        self.connected.append(address)
        return socket.create_connection(self.server.server_address, 5)

    def get(self, link):
        opener = PublicOpener(resolve=self.resolve, connect=self.connect)
        with opener.open(urllib.request.Request(link), timeout=5) as answer:
            return answer.read()


def refused(network, link):
    with pytest.raises(urllib.error.URLError) as error:
        network.get(link)
    return error.value.reason


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    ],
)  # fmt: skip
def test_addresses_inside_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", [PUBLIC, OTHER_PUBLIC, "8.8.8.8", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_addresses_outside_are(address):
    assert is_public(ipaddress.ip_address(address))


def test_a_public_host_is_asked_at_the_address_that_was_checked(server):
    network = Network(server, shop_example=[PUBLIC])
    assert network.get("http://shop.example/tea.jpg") == b"picture"
    assert network.connected == [(PUBLIC, 80)]
    assert network.resolved == ["shop.example"]  # once: a second look-up could give another answer
    assert server.hosts == ["shop.example"]  # the header has the name


def test_one_address_inside_is_enough_to_refuse(server):
    network = Network(server, shop_example=[PUBLIC, "10.0.0.5"])
    assert isinstance(refused(network, "http://shop.example/"), NotPublic)
    assert network.connected == []


@pytest.mark.parametrize(
    "link",
    [
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://2130706433/",
        "http://0x7f.1/",
        "https://10.0.0.1/",
        "http://0/",
    ],
)
def test_numbers_of_inside_are_refused_however_they_are_written(server, link):
    network = Network(server)
    assert isinstance(refused(network, link), NotPublic)
    assert network.connected == []


def test_a_redirect_is_checked_like_a_link(server):
    network = Network(server, shop_example=[PUBLIC], inside_example=["192.168.0.7"])
    server.redirects = {"/a": "http://inside.example/secret"}
    assert isinstance(refused(network, "http://shop.example/a"), NotPublic)
    assert [host for host, _ in network.connected] == [PUBLIC]


@pytest.mark.parametrize(
    "link", ["ftp://shop.example/a", "file:///etc/passwd", "data:,a", "gopher://shop.example/"]
)
def test_only_http_and_https(server, link):
    network = Network(server, shop_example=[PUBLIC])
    refused(network, link)
    assert network.connected == []


def test_no_redirect_to_another_kind_of_link(server):
    network = Network(server, shop_example=[PUBLIC])
    server.redirects = {"/a": "file:///etc/passwd"}
    with pytest.raises(urllib.error.URLError):
        network.get("http://shop.example/a")


def test_a_proxy_of_the_environment_is_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    network = Network(server, shop_example=[PUBLIC])
    assert network.get("http://shop.example/") == b"picture"


def test_the_next_address_is_tried(server):
    network = Network(server, shop_example=[OTHER_PUBLIC, PUBLIC])
    connect = network.connect

    def first_fails(address, timeout, source_address):
        if address[0] == OTHER_PUBLIC:
            network.connected.append(address)
            raise ConnectionRefusedError
        return connect(address, timeout, source_address)

    network.connect = first_fails
    assert network.get("http://shop.example/") == b"picture"
    assert network.connected == [(OTHER_PUBLIC, 80), (PUBLIC, 80)]


def test_a_host_without_addresses_is_refused(server):
    network = Network(server, shop_example=[])
    with pytest.raises(NotPublic, match="has no address"):
        public_addresses("shop.example", 80, resolve=network.resolve)
