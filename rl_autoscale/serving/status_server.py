"""The controller's own pages, on the standard library: a status page, metrics, health, and a kill switch.

GET  /             status page (live charts, one static file)
GET  /status.json  what it shows
GET  /metrics      Prometheus
GET  /healthz      200 while steps are taken, 503 when the last is too old
POST /pause        kill switch; POST /resume undoes it. Both need the header ``X-RL-Autoscale: 1``, which a web page
                   of somebody else cannot send.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from rl_autoscale.fleet.errors import SpecError
from rl_autoscale.fleet.state import NO_LIMIT
from rl_autoscale.serving.controller_metrics import CONTENT_TYPE, ControllerMetrics, slo_attainment
from rl_autoscale.serving.decision_log import finite
from rl_autoscale.serving.modes import ModeSwitch
from rl_autoscale.serving.protocols import Clock
from rl_autoscale.serving.step_record import StepRecord

_UNHEALTHY_AFTER_INTERVALS = 5.0


def describe(record: StepRecord) -> dict[str, Any]:
    """One step as JSON: what the decision log holds and the status page shows."""
    pools, classes = record.state.pools, record.state.classes
    attainment = slo_attainment(record)
    return {
        "step": record.step,
        "wall_s": round(record.wall_s, 3),
        "time_s": round(record.time_s, 3),
        "mode": record.mode,
        "mode_reason": record.mode_reason,
        "source": record.source,
        "applied": record.applied,
        "reasons": list(record.reasons),
        "faults": list(record.faults),
        "breaker": record.breaker,
        "latency_s": round(record.latency_s, 6),
        "pools": {
            name: {
                "ready": float(pools.ready[p]),
                "starting": float(pools.starting[p]),
                "draining": float(pools.draining[p]),
                "asked_for": float(pools.asked_for[p]),
                "running": float(pools.running[p]),
                "waiting": float(pools.waiting[p]),
                "kv_usage": float(pools.kv_usage[p]),
                "raw": int(record.raw.target_replicas[p]),
                "shielded": int(record.shielded.target_replicas[p]),
                "final": int(record.final.target_replicas[p]),
                "max_batch_size": int(record.final.max_batch_size[p]),
                "age_s": float(pools.age_s[p]),
                "coverage": record.report.coverage.get(name),
                "failed": list(record.report.failed.get(name, ())),
            }
            for p, name in enumerate(record.pool_names)
        },
        "classes": {
            name: {
                "arrivals_per_s": float(classes.arrivals_per_s[c]),
                "queue_length": float(classes.queue_length[c]),
                "ttft_p95_s": float(classes.ttft_p95_s[c]),
                "slo_attainment": float(attainment[c]),
                "admission": float(record.final.admission[c]),
                "selectivity": float(record.final.selectivities[c]),
                "max_in_flight": int(limit) if (limit := record.final.in_flight_limits[c]) < NO_LIMIT else None,
                "age_s": float(classes.age_s[c]),
            }
            for c, name in enumerate(record.class_names)
        },
        "ages_s": {name: round(age_s, 3) for name, age_s in record.report.ages_s.items()},
        "problems": list(record.report.problems),
        "failures": record.failures,
        "outside": list(record.outside),
    }


class History:
    """A listener that remembers the last steps for the status page."""

    def __init__(self, length: int) -> None:
        self._records: deque[dict[str, Any]] = deque(maxlen=length)
        self._lock = threading.Lock()
        self.last_s: float | None = None

    def add(self, description: dict[str, Any], now_s: float) -> None:
        """Remember one described step."""
        with self._lock:
            self._records.append(finite(description))
            self.last_s = now_s

    def since(self, step: int) -> list[dict[str, Any]]:
        """Steps after the given one."""
        with self._lock:
            return [record for record in self._records if record["step"] > step]


class StatusServer:
    """Serves the pages in threads of its own; `port` is the port it really has.

    Args:
        host, port: where; port 0 takes any free one.
        history: of the controller.
        metrics: of the controller.
        modes: what pause and resume act on.
        clock: for health.
        interval_s: the control interval.

    Raises:
        SpecError: it cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        history: History,
        metrics: ControllerMetrics,
        modes: ModeSwitch,
        clock: Clock,
        interval_s: float,
    ) -> None:
        page = (resources.files("rl_autoscale") / "serving" / "status_page.html").read_bytes()

        class Handler(BaseHTTPRequestHandler):
            """One request; everything it needs is in the enclosing scope."""

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                if path == "/":
                    self._answer(200, "text/html; charset=utf-8", page)
                elif path == "/metrics":
                    self._answer(200, CONTENT_TYPE, metrics.page())
                elif path == "/status.json":
                    after = query.removeprefix("after=")
                    steps = history.since(int(after) if after.isdigit() else 0)
                    self._json(200, {"interval_s": interval_s, "steps": steps})
                elif path == "/healthz":
                    self._health()
                else:
                    self._json(404, {"error": f"no page {path}; see /, /status.json, /metrics, /healthz"})

            def do_POST(self) -> None:
                if self.headers.get("X-RL-Autoscale") != "1":
                    self._json(403, {"error": "the header 'X-RL-Autoscale: 1' is missing"})
                elif self.path == "/pause":
                    modes.pause(f"POST from {self.client_address[0]}")
                    self._json(200, {"mode": modes.current()[0]})
                elif self.path == "/resume":
                    modes.resume()
                    self._json(200, {"mode": modes.current()[0]})
                else:
                    self._json(404, {"error": "POST /pause or /resume"})

            def _health(self) -> None:
                last_s = history.last_s
                age_s = None if last_s is None else clock.monotonic_s() - last_s
                healthy = age_s is not None and age_s <= _UNHEALTHY_AFTER_INTERVALS * interval_s
                self._json(200 if healthy else 503, {"last_step_age_s": age_s})

            def _json(self, status: int, content: object) -> None:
                self._answer(status, "application/json", json.dumps(content).encode())

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Requests for metrics every few seconds are no news."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SpecError(
                f"the status page cannot listen on {host}:{port} ({error.strerror}); end what listens there (another "
                "controller?), or set status.port (0 takes any free one) or status.host"
            ) from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)
