"""The one door to HTTP on real sockets: any status is an answer, and nobody holds its reader longer than allowed."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time

import pytest

from rl_autoscale.serving.http_client import HttpError, send


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /STATUS with this status."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:]))
        self.send_header("Location", "/200")
        self.end_headers()
        self.wfile.write(b"body of " + self.path.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_any_status_is_an_answer_with_its_body(address, status):
    answer = send("GET", f"{address}/{status}", timeout_s=10.0)
    assert (answer.status, answer.body) == (status, f"body of /{status}".encode())


@pytest.fixture
def trickle():
    """Start a server that begins as told and then gives a byte every 20 ms, for as long as someone reads."""
    over = threading.Event()
    threads = []

    def start(beginning: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with listener, contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(beginning)
                    while not over.wait(0.02):
                        connection.sendall(b"x")

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    over.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "beginning",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: ",
        b"HTTP/1.1 ",
    ],
)
def test_a_server_that_trickles_is_given_up_at_the_time_limit(trickle, beginning):
    url = trickle(beginning)
    began_s = time.monotonic()
    with pytest.raises(HttpError, match="timed out"):
        send("GET", url, timeout_s=0.2)
    assert time.monotonic() - began_s < 10.0  # the machine may be busy; without the limit it lasts for ever
