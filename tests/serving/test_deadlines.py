"""Clients that keep a connection without using it, over loopback against a real server."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPResponse

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response

from serving.config import ServiceSettings
from serving.deadlines import protocol_with_deadlines

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


async def echo_length(scope, receive, send):
    """Answers with the number of bytes of the body; /large answers more than the socket buffers hold."""
    request = Request(scope, receive)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
    content = b"x" * 30_000_000 if scope["path"] == "/large" else str(size).encode()
    await Response(content)(scope, receive, send)


@contextmanager
def serving(app=echo_length, **settings):
    seconds = {"head_seconds": 0.5, "body_seconds": 0.8, "answer_seconds": 0.8, **settings}
    protocol = protocol_with_deadlines(ServiceSettings(**seconds))
    config = uvicorn.Config(app, port=0, http=protocol, ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def address():
    with serving() as address:
        yield address


def connect(address):
    return socket.create_connection(address, timeout=10)


def answer(connection):
    response = HTTPResponse(connection)
    response.begin()
    return response.read()


def seconds_until_closed(connection, drip=b""):
    """How long the server keeps the connection; meanwhile it is sent `drip` five times a second."""
    started = time.monotonic()
    connection.settimeout(0.2)
    while time.monotonic() - started < 8:
        try:
            if drip:
                connection.sendall(drip)
            if connection.recv(65536) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        pytest.fail("the connection was still open after 8 s")
    return time.monotonic() - started


def test_a_connection_that_sends_nothing_is_closed(address):
    with connect(address) as idle:
        assert 0.3 < seconds_until_closed(idle) < 3


def test_a_head_that_drips_is_closed_although_bytes_arrive(address):
    with connect(address) as dripping:
        dripping.sendall(HEAD)
        assert 0.3 < seconds_until_closed(dripping, drip=b"X-A: 1\r\n") < 3


def test_a_body_that_drips_is_closed_although_bytes_arrive(address):
    with connect(address) as dripping:
        dripping.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        assert 0.6 < seconds_until_closed(dripping, drip=b"x") < 3


def test_a_second_request_has_the_same_deadline(address):
    with connect(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 2\r\n\r\nab")
        assert answer(connection) == b"2"
        connection.sendall(HEAD)
        assert 0.3 < seconds_until_closed(connection, drip=b"X-A: 1\r\n") < 3


def test_a_large_body_may_take_longer_if_it_keeps_coming(address):
    """4 MB in 2 s: beyond body_seconds, but much faster than the least speed."""
    with connect(address) as steady:
        steady.sendall(HEAD + b"Content-Length: 4000000\r\n\r\n")
        for _ in range(20):
            steady.sendall(b"x" * 200_000)
            time.sleep(0.1)
        assert answer(steady) == b"4000000"


def test_a_request_that_takes_its_time_inside_the_service_is_not_cut_off():
    async def slow(scope, receive, send):
        await Request(scope, receive).body()
        await asyncio.sleep(1.5)
        await Response(b"done")(scope, receive, send)

    with serving(slow) as address, connect(address) as patient:
        patient.sendall(HEAD + b"Content-Length: 2\r\n\r\nab")
        assert answer(patient) == b"done"


def test_a_client_that_does_not_read_the_answer_is_closed(address):
    with connect(address) as lazy:
        lazy.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(3)
        read = 0
        with pytest.raises(ConnectionError):
            while chunk := lazy.recv(1_000_000):
                read += len(chunk)
            raise ConnectionError if read < 30_000_000 else AssertionError("the whole answer came")


def test_the_rest_of_a_refused_body_is_not_waited_for():
    async def refuses(scope, receive, send):
        await Response(b"no", 413)(scope, receive, send)

    with serving(refuses) as address, connect(address) as stubborn:
        stubborn.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert b"413" in stubborn.recv(1000)
        assert seconds_until_closed(stubborn, drip=b"x" * 20_000) < 3


def test_three_hundred_idle_connections_are_gone():
    with serving() as address:
        idle = [connect(address) for _ in range(300)]
        time.sleep(1.5)
        still_open = 0
        for connection in idle:
            connection.setblocking(False)
            try:
                still_open += connection.recv(1) != b""
            except BlockingIOError:
                still_open += 1
            except ConnectionError:
                pass
            connection.close()
        assert still_open == 0


def test_there_is_a_most_of_connections():
    with serving(max_connections=3, head_seconds=5) as address:
        first = [connect(address) for _ in range(3)]
        time.sleep(0.2)
        with connect(address) as surplus:
            assert seconds_until_closed(surplus) < 2
        first[0].sendall(HEAD + b"Content-Length: 2\r\n\r\nab")
        assert answer(first[0]) == b"2"
        for connection in first:
            connection.close()
