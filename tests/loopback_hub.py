"""A Hub on loopback, and a process that talks to it: as many routes as pushing, loading and pulling need.

The Hub's client reads its address when it is imported, so that everything that is to reach this Hub runs in a process
of its own, the `Client`, which imports once and then obeys one line after another.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import traceback
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_canaryOfTheEnvironmentXyZ0123456789"
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE = (".safetensors", ".parquet", ".png")


@dataclass(frozen=True)
class Blob:
    """A file in a repository; `sha256` only where it lies in large-file storage."""

    data: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A repository: every commit with its files, the newest last."""

    private: bool
    gated: bool = False
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    created: dict = field(default_factory=dict)  # the request that created it

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[-1][1]

    def commit(self, files: dict[str, Blob], salt: bytes = b"") -> str:
        oid = hashlib.sha1(str(len(self.commits)).encode() + salt + repr(sorted(files)).encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> dict[str, Blob] | None:
        revision = self.head if revision == "main" else self.tags.get(revision, revision)
        return next((files for oid, files in self.commits if oid == revision), None)


@dataclass(frozen=True)
class Request:
    """What arrived; the names of headers in lower case."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


class Hub:
    """The server: its repositories by (type, id), every request with its whole body, and failures to inject.

    `failures` maps a regular expression over "METHOD /path" to what happens to the next requests that match it, in
    turn: `"503"` answers so and does nothing, `"503 after"` does it and then answers so, `"429 wait 2"` says for how
    many seconds, `"drop"` and `"drop after"` break the line, `"hang"` never answers, `"spoil"` answers with other
    bytes, `"ok"` lets one through, and anything callable is called before the request is served.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.failures: dict[str, list] = {}
        self.users = {TOKEN: "me"}
        self.hanging = threading.Event()
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, folder: Path | None = None, *, repo_type: str = "model", **state) -> Repo:
        """A repository that is there already, with the files of a folder."""
        repo = self.repos[repo_type, repo_id] = Repo(**{"private": False, **state})
        files = {".gitattributes": Blob(GITATTRIBUTES)}
        for path in sorted(folder.rglob("*")) if folder else ():
            if path.is_file():
                data = path.read_bytes()
                large = hashlib.sha256(data).hexdigest() if path.name.endswith(LARGE) else None
                files[path.relative_to(folder).as_posix()] = Blob(data, large)
        repo.commit(files, repo_id.encode())
        return repo

    def seen(self, pattern: str) -> list[Request]:
        """The requests whose "METHOD /path" matches."""
        return [request for request in self.requests if re.match(pattern, f"{request.method} {request.path}")]

    def forget(self) -> None:
        """Start a new story: no requests, no failures; repositories and storage stay."""
        self.requests.clear()
        self.failures.clear()
        self.hanging.clear()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, self._read_body(), headers)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next(
                (
                    faults.pop(0)
                    for pattern, faults in self.hub.failures.items()
                    if faults and re.match(pattern, f"{self.command} {path}")
                ),
                "",
            )
        if callable(fault):
            fault()
            fault = ""
        if fault == "hang":
            self.hub.hanging.set()
            threading.Event().wait()
        kind, _, after = fault.partition(" ")
        self.muted, self.spoilt = False, False
        if after.startswith("wait "):
            self._json(int(kind), {"error": "injected"}, Retry_After=after.removeprefix("wait "))
            return
        self.muted, self.spoilt = bool(after), kind == "spoil"
        if kind in ("", "ok", "spoil") or after:
            with self.hub.lock:
                self._route(request)
        self.muted = False
        if kind == "drop":
            self.close_connection = True
        elif kind.isdigit():
            self._json(int(kind), {"error": "injected"})

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _bytes(self, status: int, data: bytes, **headers: str) -> None:
        if self.muted:
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, status: int, document: object, **headers: str) -> None:
        self._bytes(status, json.dumps(document).encode(), Content_Type="application/json", **headers)

    def _error(self, status: int, code: str, message: str = "") -> None:
        self._json(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    # Each route names its method and path; the first that fits answers.
    def _route(self, request: Request) -> None:
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, f"{request.method} {request.path}"):
                return answer(self, request, **found.groupdict())
        return self._json(404, {"error": f"no route for {request.method} {request.path}"})

    def _user(self) -> str | None:
        return self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repo(self, kind: str, repo: str, *, write: bool = False) -> Repo | None:
        """The repository, or an answer that says why not, as the real Hub words it."""
        user = self._user()
        if user is None and self.headers.get("Authorization"):
            return self._error(401, "", "Invalid credentials in Authorization header")
        found = self.hub.repos.get((kind, repo))
        owner = repo.partition("/")[0]
        if found is None or (found.private and user != owner):
            return self._error(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if found.gated and user != owner:
            return self._error(401 if user is None else 403, "GatedRepo", "Access to this model is restricted")
        if write and user != owner:
            return self._error(403, "", "You don't have the rights to do that")
        return found

    def _create(self, request: Request) -> None:
        asked = json.loads(request.body)
        user = self._user()
        owner = asked.get("organization") or user
        kind, repo = asked.get("type", "model"), f"{owner}/{asked['name']}"
        if user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if owner != user:
            return self._error(403, "", f"You don't have the rights to create a {kind} under the namespace {owner}")
        url = f"{self.hub.url}/{PREFIX[kind]}{repo}"
        if (kind, repo) in self.hub.repos:
            return self._json(409, {"error": "You already created this repo", "url": url})
        made = Repo(private=asked.get("visibility") == "private", created=asked)
        made.commit({".gitattributes": Blob(GITATTRIBUTES)}, repo.encode())
        self.hub.repos[kind, repo] = made
        return self._json(200, {"url": url, "name": repo, "id": repo})

    def _whoami(self, request: Request) -> None:
        user = self._user()
        if user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        return self._json(200, {"name": user, "type": "user", "orgs": []})

    def _validate_yaml(self, request: Request) -> None:
        self._json(200, {"errors": [], "warnings": []})

    def _preupload(self, request: Request, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(kind, repo, write=True)) is None:
            return
        answers = []
        for file in json.loads(request.body)["files"]:
            large = file["size"] > 10_000_000 or file["path"].endswith(LARGE)
            there = found.files.get(file["path"])
            oid = (there.sha256 or there.oid) if there else None
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            answers.append({"path": file["path"], **mode})
        self._json(200, {"files": answers})

    def _batch(self, request: Request, prefix: str | None, repo: str) -> None:
        if self._repo(KIND[prefix or ""], repo, write=True) is None:
            return
        objects = []
        for asked in json.loads(request.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/_lfs/{asked['oid']}"}}
            actions = {} if asked["oid"] in self.hub.stored else {"actions": upload}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        self._json(200, {"transfer": "basic", "objects": objects})

    def _store(self, request: Request, oid: str) -> None:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return self._json(400, {"error": "other content than announced"})
        self.hub.stored[oid] = request.body
        return self._json(200, {}, ETag='"x"')

    def _commit(self, request: Request, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(kind, repo, write=True)) is None:
            return None
        files = dict(found.files)
        for line in request.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header" and value.get("parentCommit") not in (None, found.head):
                return self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return self._json(400, {"error": "LFS object not found"})
                files[value["path"]] = Blob(self.hub.stored[value["oid"]], value["oid"])
            elif key == "deletedFile":
                del files[value["path"]]
        oid = found.commit(files, request.body)
        return self._json(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _paths_info(self, request: Request, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(kind, repo)) is None:
            return
        if "urlencoded" in self.headers.get("Content-Type", ""):
            paths = urllib.parse.parse_qs(request.body.decode())["paths"]
        else:
            paths = json.loads(request.body)["paths"]
        files = found.at(revision) or {}
        entries = [_entry(path, files[path]) for path in paths if path in files]
        entries += [_folder(path) for path in paths if any(name.startswith(f"{path}/") for name in files)]
        self._json(200, entries)

    def _tree(self, request: Request, kind: str, repo: str, revision: str, under: str | None) -> None:
        if (found := self._repo(kind, repo)) is None:
            return None
        files = found.at(revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        under = f"{under.strip('/')}/" if under and under.strip("/") else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(under)}
        if under and not inside:
            return self._error(404, "EntryNotFound")
        if "recursive=true" in self.path.lower():
            return self._json(200, [_entry(path, blob) for path, blob in inside.items()])
        folders = sorted({under + path[len(under) :].split("/")[0] for path in inside if "/" in path[len(under) :]})
        flat = [_entry(path, blob) for path, blob in inside.items() if "/" not in path[len(under) :]]
        return self._json(200, [*map(_folder, folders), *flat])

    def _refs(self, request: Request, kind: str, repo: str) -> None:
        if (found := self._repo(kind, repo)) is None:
            return
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in found.tags.items()]
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": found.head}]
        self._json(200, {"branches": branches, "converts": [], "tags": tags})

    def _commits(self, request: Request, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(kind, repo)) is None:
            return
        facts = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "a commit", "message": ""}
        self._json(200, [{"id": oid, **facts} for oid, _ in reversed(found.commits)])

    def _xet_token(self, request: Request, kind: str, repo: str, revision: str) -> None:
        """Leave to write into xet storage, which nobody is at."""
        if self._repo(kind, repo, write=True) is None:
            return
        nobody, until = "http://127.0.0.1:9", str(4 << 30)
        headers = {"X_Xet_Cas_Url": nobody, "X_Xet_Access_Token": "xet", "X_Xet_Token_Expiration": until}
        self._json(200, {"casUrl": nobody, "accessToken": "xet", "exp": int(until)}, **headers)

    def _tag(self, request: Request, kind: str, repo: str, revision: str) -> None:
        if (found := self._repo(kind, repo, write=True)) is None:
            return None
        tag = json.loads(request.body)["tag"]
        if tag in found.tags:
            return self._json(409, {"error": f"Tag {tag} exists already"})
        found.tags[tag] = found.head if revision == "main" else revision
        return self._json(200, {})

    def _settings(self, request: Request, kind: str, repo: str) -> None:
        if (found := self._repo(kind, repo, write=True)) is None:
            return
        found.private = json.loads(request.body)["visibility"] == "private"
        self._json(200, {})

    def _info(self, request: Request, kind: str, repo: str, revision: str | None) -> None:
        if (found := self._repo(kind, repo)) is None:
            return None
        revision = revision or "main"
        if found.at(revision) is None:
            return self._error(404, "RevisionNotFound")
        sha = found.head if revision == "main" else found.tags.get(revision, revision)
        siblings = [{"rfilename": path} for path in found.at(revision)]
        facts = {"private": found.private, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        return self._json(200, {"_id": "1", "id": repo, "modelId": repo, "sha": sha, **facts})

    def _resolve(self, request: Request, prefix: str | None, repo: str, revision: str, path: str) -> None:
        if (found := self._repo(KIND[prefix or ""], repo)) is None:
            return None
        files = found.at(revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        if path not in files:
            return self._error(404, "EntryNotFound")
        blob = files[path]
        data = bytes([blob.data[0] ^ 1]) + blob.data[1:] if self.spoilt else blob.data
        commit = revision if revision != "main" else found.head
        headers = {"ETag": f'"{blob.sha256 or blob.oid}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._bytes(200, data, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        span = f"bytes {first}-{last}/{len(data)}"
        return self._bytes(206, data[first : last + 1], Content_Range=span, **headers)


def _entry(path: str, blob: Blob) -> dict:
    large = {"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.sha256 else {}
    return {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data), **large}


def _folder(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}
KIND = {prefix: kind for kind, prefix in PREFIX.items()}
API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
PLAIN = r"/(?P<prefix>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    (r"POST /api/repos/create", _Handler._create),
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/validate-yaml", _Handler._validate_yaml),
    (rf"POST {API}/preupload/(?P<revision>.+)", _Handler._preupload),
    (rf"POST {PLAIN}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /_lfs/(?P<oid>[0-9a-f]{64})", _Handler._store),
    (rf"POST {API}/commit/(?P<revision>.+)", _Handler._commit),
    (rf"POST {API}/paths-info/(?P<revision>.+)", _Handler._paths_info),
    (rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<under>.*))?", _Handler._tree),
    (rf"GET {API}/refs", _Handler._refs),
    (rf"GET {API}/commits/(?P<revision>[^/]+)", _Handler._commits),
    (rf"GET {API}/xet-write-token/(?P<revision>.+)", _Handler._xet_token),
    (rf"POST {API}/tag/(?P<revision>.+)", _Handler._tag),
    (rf"PUT {API}/settings", _Handler._settings),
    (rf"GET {API}(?:/revision/(?P<revision>.+))?", _Handler._info),
    (rf"(?:GET|HEAD) {PLAIN}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
)


@dataclass(frozen=True)
class Done:
    """What one line to a client came to."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def json(self) -> dict:
        assert self.code == 0, self.text[-3000:]
        return json.loads(self.out)


class Client:
    """A process whose Hub is this one: `run` gives it a `dentalgemma` command, `python` some lines of code."""

    def __init__(self, hub: Hub, home: Path, **environment: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = client_environment(hub, home) | environment
        self.process = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)

    def run(self, *arguments: object, **environment: str | None) -> Done:
        return self._ask({"arguments": [str(argument) for argument in arguments], "environment": environment})

    def python(self, code: str, **environment: str | None) -> Done:
        return self._ask({"code": code, "environment": environment})

    def _ask(self, request: dict) -> Done:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the client died"
        return Done(**json.loads(answer))

    def close(self) -> None:
        self.process.kill()  # which is faster than to let it unload what it imported
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that knows no other Hub than this one."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    own |= {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"COLUMNS": "200", "NO_COLOR": "1"}
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"} | own


def _obey() -> None:
    """Do what each line of standard input asks for, and answer with one line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever writes past Python's own streams
    for line in sys.stdin:
        request = json.loads(line)
        before = dict(os.environ)
        os.environ.update({name: value for name, value in request["environment"].items() if value is not None})
        for name, value in request["environment"].items():
            if value is None:
                os.environ.pop(name, None)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _do(request)
        os.environ.clear()
        os.environ.update(before)
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


def _do(request: dict) -> int:
    try:
        if "code" in request:
            exec(request["code"], {})
        else:
            from dentalgemma.cli import main

            sys.argv = ["dentalgemma", *request["arguments"]]
            main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _obey()
