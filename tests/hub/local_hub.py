"""
A Hub on this machine: real HTTP, as much of the Hub's routes as pushing, listing and loading a model need. A Space
lies among the models.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from typing_extensions import Self


NO_COMMIT = "0" * 40


@dataclass
class Repo:
    """A repository: the files of every commit, the commit that each branch points to, and of a Space the SDK."""

    private: bool
    sdk: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {NO_COMMIT: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": NO_COMMIT})
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """The files on `main`."""
        return self.commits[self.branches["main"]]


@dataclass
class Failure:
    """What goes wrong with the next requests: `status` 0 cuts the connection."""

    method: str
    part: str
    status: int
    times: int


class LocalHub:
    """
    A server on 127.0.0.1, on a free port, as a context manager.

    Args:
        users (`dict[str, str]`): User names by token. A user writes to the namespace of the same name alone.
    """

    def __init__(self, users: dict[str, str]):
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, part: str, status: int, times: int = 1) -> None:
        """Let the next requests whose path contains `part` fail."""
        self.failures.append(Failure(method, part, status, times))

    def environment(self, home: str, token: str | None) -> dict[str, str]:
        """What a process needs to take this for the Hub; read when huggingface_hub is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.requests.append(f"{method} {path}")
        path = re.sub("^(/api)?/spaces/", lambda match: "/api/models/" if match[1] else "/", path)
        for failure in self.hub.failures:
            if failure.times and failure.method == method and failure.part in path:
                failure.times -= 1
                if failure.status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                self._send(failure.status, {"error": "as ordered"})
                return
        try:
            for route_method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in route_method:
                    action(self, body, **match.groupdict())
                    return
            raise _Refused(404, f"no route {method} {path}")
        except _Refused as refusal:
            self._send(refusal.status, {"error": str(refusal)}, {"X-Error-Code": refusal.code} if refusal.code else {})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- Who may do what ----

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise _Refused(401, "Invalid user token.")
        return self.hub.users.get(token)

    def _readable(self, repo: str) -> Repo:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self._user() != repo.split("/")[0]):
            raise _Refused(404 if self._user() else 401, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, repo: str) -> Repo:
        found = self._readable(repo)
        if self._user() != repo.split("/")[0]:
            raise _Refused(403, f"you may not write to {repo}")
        return found

    def _commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, f"no revision {revision}", "RevisionNotFound")
        return commit

    # ---- Routes ----

    def whoami(self, body: bytes) -> None:
        if self._user() is None:
            raise _Refused(401, "Who are you?")
        self._send(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        namespace = asked.get("organization") or user
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        if namespace not in self.hub.users.values():
            raise _Refused(404, f"Namespace {namespace} not found")
        if namespace != user:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {namespace!r}.")
        repo = f"{namespace}/{asked['name']}"
        status = 409 if repo in self.hub.repos else 200
        self.hub.repos.setdefault(repo, Repo(asked.get("visibility") == "private", asked.get("sdk")))
        folder = "spaces/" if asked.get("type") == "space" else ""
        self._send(status, {"url": f"{self.hub.url}/{folder}{repo}"})

    def create_collection(self, body: bytes) -> None:
        asked = json.loads(body)
        slug = f"{asked['namespace']}/{asked['title']}"
        if self._user() != asked["namespace"]:
            raise _Refused(403, f"you may not write to {asked['namespace']}")
        status = 409 if slug in self.hub.collections else 200
        new = {"owner": {"name": asked["namespace"]}, "position": 0, "theme": "blue", "upvotes": 0, "items": []}
        asked = {"slug": slug, "title": asked["title"], "private": asked["private"]}
        self.hub.collections.setdefault(slug, {**new, **asked, "lastUpdated": "2026-01-01T00:00:00.000Z"})
        self._send(status, self.hub.collections[slug])

    def collection(self, body: bytes, slug: str) -> None:
        self._send(200, self.hub.collections[slug])

    def add_item(self, body: bytes, slug: str) -> None:
        item, items = json.loads(body)["item"], self.hub.collections[slug]["items"]
        self._readable(item["id"])
        if item["id"] in [own["id"] for own in items]:
            raise _Refused(409, "it is there")
        items.append({**item, "_id": str(len(items)), "position": len(items)})
        self._send(200, self.hub.collections[slug])

    def validate(self, body: bytes) -> None:
        try:
            metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if isinstance(metadata, dict) else ["no mapping"]
        except (IndexError, yaml.YAMLError) as error:
            wrong = [str(error)]
        self._send(400 if wrong else 200, {"errors": [{"message": text} for text in wrong], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._commit_of(self._writable(repo), revision)
        is_large = re.compile(r"\.(safetensors|bin|pt|pth)$").search
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        self._writable(repo)
        objects = []
        for item in json.loads(body)["objects"]:
            href = f"{self.hub.url}/blobs/{item['oid']}"
            actions = {} if item["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            if actions:
                actions["actions"]["verify"] = {"href": f"{href}/verify"}
            objects.append({**item, **actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "damaged on the way")
        self.hub.blobs[oid] = body
        self._send(200, {})

    def verify_blob(self, body: bytes, oid: str) -> None:
        self._send(200 if oid in self.hub.blobs else 404, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._writable(repo)
        files = dict(found.commits[self._commit_of(found, revision)])
        for line in body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                found.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
        commit = hashlib.sha1(body + str(len(found.commits)).encode()).hexdigest()
        found.commits[commit], found.branches[revision] = files, commit
        self._send(200, {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        found = self._writable(repo)
        found.branches.setdefault(revision, found.branches["main"])
        self._send(200, {})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        found = self._readable(repo)
        commit = self._commit_of(found, revision or "main")
        names = [{"rfilename": name} for name in found.commits[commit]]
        content = {"id": repo, "modelId": repo, "sha": commit, "private": found.private, "siblings": names}
        self._send(200, {**content, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        found = self._readable(repo)
        files = found.commits[self._commit_of(found, revision)]
        inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in inside.items()
        ]
        self._send(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        found = self._readable(repo)
        commit = self._commit_of(found, revision)
        if name not in found.commits[commit]:
            raise _Refused(404, f"{name} does not exist", "EntryNotFound")
        content = found.commits[commit][name]
        self._send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit})


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", r"/api/collections", _Handler.create_collection),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", _Handler.collection),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", _Handler.add_item),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/blobs/(?P<oid>\w+)", _Handler.put_blob),
    ("POST", r"/blobs/(?P<oid>\w+)/verify", _Handler.verify_blob),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>.+)", _Handler.branch),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(?P<revision>.+))?", _Handler.info),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]
