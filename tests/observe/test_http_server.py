import errno
import http.client
import re
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.http.address import ListenAddress
from kproxy.http.message import BadRequestError, Head, Request, Response, parse_head, text
from kproxy.http.server import (
    MAX_CONNECTIONS,
    REQUEST_SECONDS,
    RETRY_SECONDS,
    WRITE_SECONDS,
    HttpServer,
)
from tests.observe.http_client import eventually, raw, refused, request

LOOPBACK = ListenAddress("127.0.0.1", 0)


def echo(request: Request) -> Response:
    return text(200, f"{request.method} {request.path} {request.query} {request.body.decode()}")


@pytest.fixture
def port(server) -> int:
    return server.listen(LOOPBACK, echo).address.port


def test_any_method_is_answered(port):
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        assert request(port, "/a?b=c", method=method).body.decode() == f"{method} /a b=c "


def test_head_has_the_headers_of_get_and_no_body(port):
    reply = request(port, "/a", method="HEAD")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["Content-Length"] == str(len("HEAD /a  "))


def test_request_body_reaches_the_handler(port):
    assert request(port, "/", method="PUT", body=b"7").body == b"PUT /  7"


def test_a_body_too_long_to_be_read_does_not_cost_the_client_its_answer(port):
    reply = request(port, "/", method="POST", body=b"x" * 20_000_000)
    assert (reply.status, reply.body) == (200, b"POST /  ")


def test_a_connection_serves_many_requests(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.connect()
    first_socket = connection.sock
    for number in range(20):
        connection.request("GET", f"/{number}")
        assert connection.getresponse().read().decode() == f"GET /{number}  "
    assert connection.sock is first_socket
    connection.close()


def test_pipelined_requests_are_answered_in_order(port):
    said = raw(port, b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(50)))
    assert re.findall(rb"GET /(\d+)", said) == [b"%d" % n for n in range(50)]


def test_http_1_0_client_gets_its_answer_and_the_end(port):
    said = raw(port, b"GET /old HTTP/1.0\r\n\r\n")
    assert said.startswith(b"HTTP/1.0 200 OK\r\n")
    assert said.endswith(b"GET /old  ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /\r\n\r\n", b"400"),  # HTTP/0.9
        (b"GET / HTTP/2.0\r\n\r\n", b"505"),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nContent-Type: multipart/mixed; boundary*=idna'en'x\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 20_000, b"431"),
    ],
)
def test_what_is_no_request_is_refused_and_the_server_goes_on(port, sent, status):
    assert raw(port, sent).split()[1] == status
    assert request(port).status == 200


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.from_regex(rb"\A[A-Z]{1,5} \S{0,20} HTTP/\S{1,8}\r\n(\S+: ?.*\r\n){0,4}\Z"))
def test_no_bytes_break_the_parser(data):
    try:
        parsed = parse_head(data)
    except BadRequestError as error:
        status = error.response.status
    else:
        status = 200 if isinstance(parsed, Head) else 0
    assert status in {200, 400, 431, 505}


def test_a_failing_handler_is_a_500_and_the_next_request_is_served(server):
    def fail(request: Request) -> Response:
        raise RuntimeError("broken")

    port = server.listen(LOOPBACK, fail).address.port
    assert request(port).status == 500
    assert request(port).status == 500


def test_clients_that_send_nothing_or_half_a_request_delay_nobody(port):
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for client in slow[::2]:
        client.sendall(b"GET / HTTP/1.1\r\nHost:")
    begun = time.monotonic()
    assert all(request(port).status == 200 for _ in range(20))
    assert time.monotonic() - begun < 2
    for client in slow:
        client.close()


def test_a_client_that_does_not_take_its_answer_delays_nobody(server):
    port = server.listen(LOOPBACK, lambda request: text(200, "x" * (len(request.path) > 1) * 20_000_000)).address.port
    with socket.create_connection(("127.0.0.1", port)) as greedy:
        greedy.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert request(port).status == 200


def test_a_client_that_takes_its_time_gets_a_large_answer_in_full(server):
    port = server.listen(LOOPBACK, lambda _: text(200, "x" * 5_000_000)).address.port
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        received = 0
        while data := client.recv(10_000):
            received += len(data)
    assert received > 5_000_000


def test_many_clients_at_once_are_all_answered(port):
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda n: request(port, f"/{n}").body.decode(), range(500)))
    assert replies == [f"GET /{n}  " for n in range(500)]


def test_an_overdue_client_is_cut_off(server, clock, port):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET / HT")
        assert request(port).status == 200  # the server has seen both connections
        clock.advance(REQUEST_SECONDS + 0.1)
        server.wake()
        assert client.recv(100) == b""


def test_a_client_that_never_reads_is_cut_off(server, clock):
    port = server.listen(LOOPBACK, lambda _: text(200, "x" * 20_000_000)).address.port
    other = server.listen(LOOPBACK, echo).address.port
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        client.recv(1)  # the answer has begun
        clock.advance(WRITE_SECONDS + 0.1)
        server.wake()
        assert request(other).status == 200  # the server has looked at the clock
        assert sum(len(data) for data in iter(lambda: client.recv(1 << 20), b"")) < 20_000_000


def test_beyond_the_limit_a_new_client_takes_the_place_of_the_one_that_waits_longest(port, clock):
    held = []
    for _ in range(MAX_CONNECTIONS):
        client = socket.create_connection(("127.0.0.1", port), timeout=5)
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        client.recv(4096)  # served, and idle from now on
        clock.advance(0.01)
        held.append(client)
    late = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(20)]
    assert request(port).status == 200
    closed, _, _ = select.select(held + late, [], [], 5)
    assert set(closed) == set(held[:21])
    for client in held + late:
        client.close()


def test_slow_work_does_not_hold_up_other_requests(server):
    release = threading.Event()

    def work() -> Response:
        release.wait(5)
        return text(200, "done")

    slow = server.listen(LOOPBACK, lambda _: work).address.port
    quick = server.listen(LOOPBACK, echo).address.port
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(request, slow)
        assert request(quick).status == 200
        assert not pending.done()
        release.set()
        assert pending.result(5).body == b"done"


def test_slow_work_whose_client_has_gone_harms_nobody(server):
    begun, release, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> Response:
        begun.set()
        release.wait(5)
        done.set()
        return text(200, "x" * 1_000_000)

    listener = server.listen(LOOPBACK, lambda _: work)
    with socket.create_connection(("127.0.0.1", listener.address.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert begun.wait(5)
    with socket.create_connection(("127.0.0.1", listener.address.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        listener.close()
        release.set()
        assert done.wait(5)
    assert request(server.listen(LOOPBACK, echo).address.port).status == 200


def test_a_closed_listener_frees_its_port_and_ends_its_connections(server):
    listener = server.listen(LOOPBACK, echo)
    port = listener.address.port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/")
    connection.getresponse().read()
    listener.close()
    assert connection.sock.recv(10) == b""
    connection.close()
    assert refused(port)
    server.listen(ListenAddress("127.0.0.1", port), echo)
    assert request(port).status == 200


def test_an_address_in_use_is_an_error(server, port):
    with pytest.raises(OSError, match=rf"127.0.0.1.*{port}") as caught:
        server.listen(ListenAddress("127.0.0.1", port), echo)
    assert caught.value.errno == errno.EADDRINUSE


def test_an_address_in_use_is_tried_again_every_five_seconds(server, clock):
    failures = []
    with socket.create_server(("127.0.0.1", 10256)):
        server.listen_or_retry(ListenAddress("127.0.0.1", 10256), echo, failures.append)
        assert [error.errno for error in failures] == [errno.EADDRINUSE]
        clock.advance(RETRY_SECONDS)
        server.wake()
        assert eventually(lambda: len(failures) == 2)
    clock.advance(RETRY_SECONDS - 1)
    server.wake()
    assert refused(10256)
    clock.advance(1)
    server.wake()
    assert eventually(lambda: not refused(10256))
    assert request(10256).status == 200
    assert len(failures) == 2


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_serves_both_families(server, wildcard):
    server.listen(ListenAddress(wildcard, 10256), echo)
    assert request(10256, host="127.0.0.1").status == 200
    assert request(10256, host="::1").status == 200


def test_a_wildcard_of_one_family_leaves_the_other_free(server):
    server.listen(ListenAddress("0.0.0.0", 30999, "tcp4"), lambda _: text(200, "four"))
    server.listen(ListenAddress("::", 30999, "tcp6"), lambda _: text(200, "six"))
    assert request(30999, host="127.0.0.1").body == b"four"
    assert request(30999, host="::1").body == b"six"


def test_an_address_of_one_family_is_served_there_only(server):
    server.listen(ListenAddress("::1", 30999), echo)
    assert request(30999, host="::1").status == 200
    assert refused(30999)


def test_a_closed_server_says_so():
    server = HttpServer()
    port = server.listen(LOOPBACK, echo).address.port
    server.close()
    assert refused(port)
    with pytest.raises(OSError, match="closed"):
        server.listen(LOOPBACK, echo)


def test_nothing_wakes_the_thread_while_nobody_asks():
    server = HttpServer()
    server.listen(LOOPBACK, echo)
    task = next(thread for thread in threading.enumerate() if thread.name == "http" and thread.is_alive()).native_id

    def switches() -> int:
        status = Path(f"/proc/self/task/{task}/status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[1])

    eventually(lambda: False, 0.1)
    before = switches()
    eventually(lambda: False, 0.3)
    assert switches() == before
    server.close()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0.0.0.0:10256", ListenAddress("0.0.0.0", 10256)),
        ("[::]:10256", ListenAddress("::", 10256)),
        ("[::1]:80", ListenAddress("::1", 80)),
    ],
)
def test_listen_addresses_are_written_as_in_the_configuration(written, read):
    assert ListenAddress.parse(written) == read
    assert str(read) == written


@pytest.mark.parametrize(
    "written", ["", "10256", "1.2.3.4", "::1:80", "1.2.3.4:99999", "1.2.3.4:x", "localhost:80", "[1.2.3.4:1"]
)
def test_what_is_no_listen_address_is_refused(written):
    with pytest.raises(ValueError, match=r"address|IP"):
        ListenAddress.parse(written)
