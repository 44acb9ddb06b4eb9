"""A stand-in for Hugging Face's hub on this machine: as much of it as sharing and loading a policy asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN, USER = "hf_of_someone", "someone"
COMMIT = "X-Repo-Commit"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Files of every commit, and what each branch points to."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files, deleted: Collection[str] = ()) -> str:
        """Add files to a branch and take others away; the number of the commit."""
        number = f"{len(self.commits) + 1:040x}"
        kept = {name: content for name, content in self.files(branch).items() if name not in deleted}
        self.commits[number] = kept | files
        self.branches[branch] = number
        return number

    def files(self, revision: str) -> Files:
        """Of a branch or a commit; none if there is no such one."""
        return self.commits.get(self.branches.get(revision, revision), {})


@dataclass
class Hub:
    """What the stand-in holds, and how it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: Files = field(default_factory=dict)  # content of files that are kept beside git, by their hash
    asked: list[str] = field(default_factory=list)  # "METHOD path", in order

    def add(self, name: str, files: Files, private: bool = False) -> Repository:
        """A repository with one commit."""
        repository = self.repositories[name] = Repository(private)
        repository.commit("main", files)
        return repository


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        for pattern, answer in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                answer(self, body, *found.groups())
                return
        self._send(404, {"error": "no such page"})

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _send(self, code: int, content: object = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, name: str, to_write: bool = False) -> Repository | None:
        """A repository that one may see, or write to; None, and it is said, if not."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token != TOKEN):  # the hub does not tell which of the two
            self._send(401 if not self._token else 404, X_Error_Code="RepoNotFound")
            return None
        if to_write and (self._token != TOKEN or not name.startswith(f"{USER}/")):
            self._send(403, X_Error_Message="You are not allowed to write there")
            return None
        return found

    def whoami(self, _: bytes) -> None:
        if self._token == TOKEN:
            self._send(200, {"name": USER, "type": "user"})
        else:
            self._send(401, X_Error_Message="Invalid credentials in Authorization header")

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            self._send(403, X_Error_Message="You have no rights in that namespace")
        elif name in self.hub.repositories:
            self._send(409, {"url": f"{self.hub.url}/{name}"})
        else:
            self.hub.add(name, {".gitattributes": b""}, asked.get("visibility") == "private")
            self._send(200, {"url": f"{self.hub.url}/{name}"})

    def tree(self, _: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is not None:
            if files := repository.files(revision):
                listed = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0"} for path in files]
                self._send(200, listed)
            else:
                self._send(404, X_Error_Code="RevisionNotFound")

    def branch(self, _: bytes, name: str, branch: str) -> None:
        if (repository := self._repository(name, to_write=True)) is not None:
            there = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self._send(409 if there else 200, {})

    def valid(self, _: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, _: str) -> None:
        if self._repository(name, to_write=True) is not None:
            asked = json.loads(body)["files"]
            kinds = {"safetensors": "lfs", "png": "lfs"}
            modes = [(file["path"], kinds.get(file["path"].rpartition(".")[2], "regular")) for file in asked]
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]
            self._send(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self._repository(name, to_write=True) is not None:
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}
            self._send(200, {"objects": objects, "transfer": "basic"}, Content_Type="application/vnd.git-lfs+json")

    def put(self, body: bytes, oid: str) -> None:
        self.hub.large[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        if (repository := self._repository(name, to_write=True)) is not None:
            files, deleted = {}, []
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    deleted.append(value["path"])
            number = repository.commit(branch, files, deleted)
            self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{number}", "commitOid": number})

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        files = repository.files(revision)
        if not files:
            self._send(404, X_Error_Code="RevisionNotFound")
        elif file not in files:
            self._send(404, X_Error_Code="EntryNotFound")
        else:
            number = repository.branches.get(revision, revision)
            etag = hashlib.sha256(files[file]).hexdigest()
            self._send(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=number)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"GET /api/whoami-v2": _Answers.whoami,
    r"POST /api/repos/create": _Answers.create,
    rf"GET /api/models/{NAME}/tree/(.+)": _Answers.tree,
    rf"POST /api/models/{NAME}/branch/(.+)": _Answers.branch,
    r"POST /api/validate-yaml": _Answers.valid,
    rf"POST /api/models/{NAME}/preupload/(.+)": _Answers.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": _Answers.batch,
    r"PUT /large/(\w+)": _Answers.put,
    rf"POST /api/models/{NAME}/commit/(.+)": _Answers.commit,
    rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)": _Answers.resolve,
}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in that answers at `Hub.url` until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
