"""An API server in this process: HTTP on loopback, objects in memory, and the manners of a real one.

What it does (conflicts on stale versions, refusals of invalid objects, dry runs, pages, watches, grace periods, role
rules) is held to a real server by ``backends/test_kubernetes_conformance.py``, which runs on both. What it leaves out
(admission, defaults, server-side apply, OpenAPI, more than equality in selectors) no test here may rely on.

The wire is `fake_kubernetes_http`, what objects are is `fake_kubernetes_objects`.

Controllers are one function, `_reconcile`: a Deployment or StatefulSet has its pods as soon as it is written. There is
no scheduler and no kubelet: tests write pod status through the API, as they do on a real server without nodes.
"""

from __future__ import annotations

import base64
import copy
import json
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path

from kubernetes import client as kube
from serving.fake_kubernetes_http import Fault, Json, Refused, Request, allows, handler
from serving.fake_kubernetes_objects import BUILT_IN, Kind, is_ready, merge, replicas, scale_of, selected, validate


class FakeKubernetes:
    """The server; use it as a context manager.

    Attributes:
        requests: what was asked, in order.
        rules: rules of a Role, as in its manifest; None allows everything.
        faults: answers to give instead, each used up by requests it matches.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.rules: list[Json] | None = None
        self.faults: list[Fault] = []
        self._kinds = {(kind.group, kind.plural): kind for kind in BUILT_IN}
        self._objects: dict[tuple[str, str, str], dict[str, Json]] = {}
        self._snapshots: dict[str, list[Json]] = {}
        self._log: list[tuple[int, tuple[str, str, str], str, Json]] = []
        self._version = 100
        self._changed = threading.Condition(threading.RLock())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> FakeKubernetes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def client(self) -> kube.ApiClient:
        """A client as `kubernetes_api.connect` makes it."""
        settings = kube.Configuration(host=self.url)
        settings.retries = False
        settings.proxy = None
        return kube.ApiClient(settings)

    def kubeconfig(self, folder: Path) -> Path:
        """Write the file that leads here."""
        path = folder / "kubeconfig"
        path.write_text(
            f"apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: '{self.url}'}}}}]\n"
            "users: [{name: u, user: {}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n",
            encoding="utf-8",
        )
        return path

    # requests

    def answer(self, request: Request) -> tuple[int, Json]:
        """Do what a request asks; raises Refused."""
        with self._changed:
            self._authorise(request)
            kind = self._kinds.get((request.group, request.resource.partition("/")[0]))
            if kind is None:
                raise Refused(404, "", "404 page not found")
            sub = request.resource.partition("/")[2]
            if sub == "scale" and kind.scale:
                return 200, self._scale(kind, request)
            if sub not in ("", "status"):
                raise Refused(404, "NotFound", "the server could not find the requested resource")
            if request.verb in ("list", "deletecollection"):
                return 200, self._list(kind, request)
            act = {"get": self._get, "create": self._create, "update": self._update, "patch": self._update}
            if request.verb == "delete":
                return 200, self._delete(kind, request)
            return (201 if request.verb == "create" else 200), act[request.verb](kind, request)

    def watch(self, request: Request) -> Iterator[bytes]:
        """Events of a kind after a version, one JSON line each, until ``timeoutSeconds`` are over."""
        with self._changed:
            self._authorise(request)
        key = (request.group, request.resource, request.namespace)
        seen = int(request.query.get("resourceVersion") or 0)
        deadline = datetime.now(UTC) + timedelta(seconds=float(request.query.get("timeoutSeconds", 1)))
        position = 0
        while True:
            with self._changed:
                left_s = (deadline - datetime.now(UTC)).total_seconds()
                if position == len(self._log) and left_s > 0:
                    self._changed.wait(left_s)
                fresh, position = self._log[position:], len(self._log)
            for version, where, event, obj in fresh:
                if where == key and version > seen and selected(obj, request.query.get("labelSelector", "")):
                    yield json.dumps({"type": event, "object": obj}).encode() + b"\n"
            if left_s <= 0:
                return

    def _authorise(self, request: Request) -> None:
        self.requests.append(request)
        if self.rules is None or any(allows(rule, request) for rule in self.rules):
            return
        raise Refused(403, "Forbidden", f'{request.resource} "{request.name}" is forbidden: cannot {request.verb}')

    def _get(self, kind: Kind, request: Request) -> Json:
        return copy.deepcopy(self._find(kind, request))

    def _list(self, kind: Kind, request: Request) -> Json:
        limit = int(request.query.get("limit") or 0)
        token = request.query.get("continue")
        if token:
            cursor = json.loads(base64.b64decode(token))
            if cursor["snapshot"] not in self._snapshots:
                raise Refused(410, "Expired", "The provided continue parameter is too old")
            items, start, version = self._snapshots[cursor["snapshot"]], cursor["start"], cursor["version"]
        else:
            found = self._objects.get((kind.group, kind.plural, request.namespace), {})
            items = [obj for _, obj in sorted(found.items()) if selected(obj, request.query.get("labelSelector", ""))]
            start, version = 0, str(self._version)
        meta: Json = {"resourceVersion": version}
        end = start + limit if limit else len(items)
        if end < len(items):
            snapshot = str(uuid.uuid4())
            self._snapshots[snapshot] = items
            cursor = {"snapshot": snapshot, "start": end, "version": version}
            meta["continue"] = base64.b64encode(json.dumps(cursor).encode()).decode()
            meta["remainingItemCount"] = len(items) - end
        version_name = f"{kind.group}/{kind.version}".lstrip("/")
        return {
            "kind": f"{kind.name}List",
            "apiVersion": version_name,
            "metadata": meta,
            "items": copy.deepcopy(items[start:end]),
        }

    def _create(self, kind: Kind, request: Request) -> Json:
        obj = copy.deepcopy(request.body or {})
        meta = obj.setdefault("metadata", {})
        if not meta.get("name"):
            raise Refused(422, "Invalid", f"{kind.name} is invalid: metadata.name: Required value")
        validate(kind, obj)
        if meta["name"] in self._objects.get((kind.group, kind.plural, request.namespace), {}):
            raise Refused(409, "AlreadyExists", f'{kind.plural} "{meta["name"]}" already exists')
        meta.update(uid=str(uuid.uuid4()), creationTimestamp=_now(), generation=1)
        if kind.namespaced:
            meta["namespace"] = request.namespace
        obj.update(kind=kind.name, apiVersion=f"{kind.group}/{kind.version}".lstrip("/"))
        if kind.name == "Pod":
            obj.setdefault("status", {"phase": "Pending"})
        if kind.name in ("Deployment", "StatefulSet"):
            obj["spec"].setdefault("replicas", 1)
        if not _dry(request):
            self._store(kind, request.namespace, obj, "ADDED")
        return copy.deepcopy(obj)

    def _update(self, kind: Kind, request: Request) -> Json:
        old = self._find(kind, request)
        sent = copy.deepcopy(request.body or {})
        new = merge(copy.deepcopy(old), sent) if request.verb == "patch" else sent
        self._check_version(kind, old, (sent.get("metadata") or {}).get("resourceVersion"), request.verb)
        if request.resource.endswith("/status"):
            new = {**copy.deepcopy(old), "status": new.get("status") or {}}
        elif "status" in old:
            new["status"] = copy.deepcopy(old["status"])
        for name in ("uid", "creationTimestamp", "resourceVersion", "generation", "namespace"):
            if name in old["metadata"]:
                new.setdefault("metadata", {})[name] = old["metadata"][name]
        validate(kind, new)
        if new == old or _dry(request):
            return new
        if new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        self._store(kind, request.namespace, new, "MODIFIED")
        return copy.deepcopy(new)

    def _delete(self, kind: Kind, request: Request) -> Json:
        obj = copy.deepcopy(self._find(kind, request))
        grace = (request.body or {}).get("gracePeriodSeconds", request.query.get("gracePeriodSeconds"))
        self._remove(kind, request.namespace, obj, None if grace is None else int(grace))
        return obj

    def _scale(self, kind: Kind, request: Request) -> Json:
        obj = self._find(kind, request)
        if request.verb == "get":
            return scale_of(kind, obj)
        sent = request.body or {}
        asked = (sent.get("spec") or {}).get("replicas", 0 if request.verb == "update" else replicas(obj))
        if not isinstance(asked, int) or asked < 0:
            message = f"Scale is invalid: spec.replicas: Invalid value: {asked}: must be greater than or equal to 0"
            raise Refused(422, "Invalid", message)
        self._check_version(kind, obj, (sent.get("metadata") or {}).get("resourceVersion"), "patch")
        new = copy.deepcopy(obj)
        new["spec"]["replicas"] = asked
        if new != obj and not _dry(request):
            new["metadata"]["generation"] = obj["metadata"]["generation"] + 1
            self._store(kind, request.namespace, new, "MODIFIED")
        return scale_of(kind, new)

    # the store

    def _find(self, kind: Kind, request: Request) -> Json:
        try:
            return self._objects[kind.group, kind.plural, request.namespace][request.name]
        except KeyError:
            raise Refused(404, "NotFound", f'{kind.plural} "{request.name}" not found') from None

    def _check_version(self, kind: Kind, old: Json, sent: str | None, verb: str) -> None:
        if sent and sent != old["metadata"]["resourceVersion"]:
            message = "the object has been modified; please apply your changes to the latest version and try again"
            raise Refused(409, "Conflict", f"Operation cannot be fulfilled on {kind.plural}: {message}")
        if not sent and verb == "update" and (kind.needs_version or kind.custom):
            message = "metadata.resourceVersion: Invalid value: must be specified for an update"
            raise Refused(422, "Invalid", f"{kind.name} is invalid: {message}")

    def _store(self, kind: Kind, namespace: str, obj: Json, event: str) -> None:
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        key = (kind.group, kind.plural, namespace)
        if event == "DELETED":
            self._objects[key].pop(obj["metadata"]["name"], None)
        else:
            self._objects.setdefault(key, {})[obj["metadata"]["name"]] = copy.deepcopy(obj)
        self._log.append((self._version, key, event, copy.deepcopy(obj)))
        self._changed.notify_all()
        if event != "DELETED":
            self._after_write(kind, namespace, obj)

    def _after_write(self, kind: Kind, namespace: str, obj: Json) -> None:
        if kind.name == "CustomResourceDefinition":
            self._define(obj["spec"])
        if kind.name in ("Deployment", "StatefulSet"):
            self._reconcile(kind, namespace, obj)

    def _define(self, spec: Json) -> None:
        version = spec["versions"][0]
        scale = (version.get("subresources") or {}).get("scale")
        names = spec["names"]
        self._kinds[spec["group"], names["plural"]] = Kind(
            names["kind"],
            spec["group"],
            version["name"],
            names["plural"],
            scale=scale is not None,
            selector_path=(scale or {}).get("labelSelectorPath", ""),
            custom=True,
        )

    def _remove(self, kind: Kind, namespace: str, obj: Json, grace_s: int | None) -> None:
        """Delete; a pod on a node stays, marked, until its grace is given as zero (by the kubelet, or by force)."""
        if kind.name == "Pod" and (obj["spec"].get("nodeName")) and grace_s != 0:
            grace_s = obj["spec"].get("terminationGracePeriodSeconds", 30) if grace_s is None else grace_s
            killed = datetime.now(UTC) + timedelta(seconds=grace_s)
            obj["metadata"].update(deletionTimestamp=_stamp(killed), deletionGracePeriodSeconds=grace_s)
            self._store(kind, namespace, obj, "MODIFIED")
            return
        self._store(kind, namespace, obj, "DELETED")

    def _reconcile(self, kind: Kind, namespace: str, owner: Json) -> None:
        pods = self._objects.setdefault(("", "pods", namespace), {})
        mine = [
            pod
            for pod in pods.values()
            if pod["metadata"].get("fakeOwner") == owner["metadata"]["uid"]
            and "deletionTimestamp" not in pod["metadata"]
        ]
        pod_kind = self._kinds["", "pods"]
        for _ in range(replicas(owner) - len(mine)):
            template = copy.deepcopy(owner["spec"]["template"])
            meta = {**(template.get("metadata") or {}), "uid": str(uuid.uuid4()), "namespace": namespace}
            meta.update(creationTimestamp=_now(), fakeOwner=owner["metadata"]["uid"], generation=1)
            meta["name"] = f"{owner['metadata']['name']}-{meta['uid'][:10]}"
            pod = {"kind": "Pod", "apiVersion": "v1", "metadata": meta, "spec": template["spec"]}
            self._store(pod_kind, namespace, {**pod, "status": {"phase": "Pending"}}, "ADDED")
        mine.sort(key=lambda pod: (is_ready(pod), -int(pod["metadata"]["resourceVersion"])))
        for pod in mine[: max(0, len(mine) - replicas(owner))]:
            self._remove(pod_kind, namespace, copy.deepcopy(pod), None)

    def take_fault(self, request: Request, *, after: bool) -> Fault | None:
        """The fault that this request meets, used up by one."""
        for fault in self.faults:
            if fault.times > 0 and fault.after == after and fault.matching in f"{request.verb} {request.resource}":
                fault.times -= 1
                return fault
        return None


def _dry(request: Request) -> bool:
    return request.query.get("dryRun") == "All"


def _stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _now() -> str:
    return _stamp(datetime.now(UTC))
