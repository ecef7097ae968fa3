"""The wire of the API server in `fake_kubernetes`: paths and verbs, answers, watches, and faults made on demand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One request as role rules see it."""

    verb: str
    group: str
    resource: str  # plural, with "/scale" or "/status" after it
    namespace: str
    name: str
    query: dict[str, str] = field(default_factory=dict, compare=False)
    body: Json | None = field(default=None, compare=False)


@dataclass
class Fault:
    """An answer in place of the real one, or none at all."""

    status: int
    matching: str = ""  # part of "verb resource"; empty for any request
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False  # do the work, then answer this: a reply lost on its way


class Refused(Exception):
    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Answers(Protocol):
    """The server behind the wire."""

    def answer(self, request: Request) -> tuple[int, Json]: ...

    def watch(self, request: Request) -> Iterator[bytes]: ...

    def take_fault(self, request: Request, *, after: bool) -> Fault | None: ...


def allows(rule: Json, request: Request) -> bool:
    names = rule.get("resourceNames")
    return (
        request.group in rule["apiGroups"]
        and request.resource in rule["resources"]
        and request.verb in rule["verbs"]
        and (not names or request.name in names)
    )


PATH = re.compile(r"^/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)/(?P<rest>.+)$")


def parse(method: str, target: str, body: Json | None) -> Request:
    url = urlsplit(target)
    query = {key: values[-1] for key, values in parse_qs(url.query).items()}
    match = PATH.match(url.path)
    if match is None:
        raise Refused(404, "", "404 page not found")
    parts = match["rest"].strip("/").split("/")
    namespace = ""
    if parts[0] == "namespaces" and len(parts) > 2:
        namespace, parts = parts[1], parts[2:]
    plural, name, sub = (*parts, "", "")[:3]
    verbs = {"POST": "create", "PUT": "update", "PATCH": "patch"}
    verb = verbs.get(method, "")
    if method == "DELETE":
        verb = "delete" if name else "deletecollection"
    if method == "GET":
        verb = "get" if name else "watch" if query.get("watch", "").lower() in ("true", "1") else "list"
    resource = f"{plural}/{sub}" if sub else plural
    return Request(verb, match["group"] or "", resource, namespace, name, query, body)


def handler(fake: Answers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            try:
                request = parse(self.command, self.path, json.loads(raw) if raw else None)
                if fault := fake.take_fault(request, after=False):
                    self.send_fault(fault)
                elif request.verb == "watch":
                    self.stream(request)
                else:
                    status, answer = fake.answer(request)
                    if fault := fake.take_fault(request, after=True):
                        self.send_fault(fault)
                    else:
                        self.send_json(status, answer)
            except Refused as refused:
                self.send_json(refused.status, _status(refused.status, refused.reason, str(refused)))

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def send_fault(self, fault: Fault) -> None:
            if fault.status == 0:  # cut the line
                self.close_connection = True
                return
            self.send_json(fault.status, _status(fault.status, "Fault", "as the test asked"), fault.headers)

        def send_json(self, status: int, answer: Json, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(answer).encode()
            self.send_response_only(status)
            sent = {"Date": formatdate(usegmt=True), "Content-Type": "application/json", **(headers or {})}
            for name, value in {**sent, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def stream(self, request: Request) -> None:
            self.send_response_only(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in fake.watch(request):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")

    return Handler


def _status(code: int, reason: str, message: str) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }
