"""
A server on loopback that speaks the part of the Hub's protocol which this package and `from_pretrained` need.

Accounts, repositories, preupload, LFS batches and uploads, commits, resolve, trees, collections; kept in memory.
Faults are queued by a part of the path: see [`Hub.fail`]. It stands for the Hub's answers as its client reads them;
Xet storage is not spoken, so the client must have `HF_HUB_DISABLE_XET`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "x" * 34
LARGE = (".safetensors", ".wav", ".png")


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: int = 1

    @property
    def sha(self) -> str:
        content = repr((self.commits, sorted(self.files.items())))
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Fault:
    method: str
    part: str
    kind: int | str
    headers: dict[str, str]


class Hub(ThreadingHTTPServer):
    """The server; `with Hub() as hub:` runs it in a thread."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def fail(self, part: str, kind: int | str, times: int = 1, method: str = "", **headers: str) -> None:
        """
        Queues a fault for requests whose path has `part`: an HTTP status; `"hang"`, no answer for 3 s; `"half"`, the
        connection ends in the middle of the upload.
        """
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults += [Fault(method, part, kind, names)] * times

    def seen(self, method: str, part: str) -> int:
        """How many requests there were."""
        return sum(one == method and part in path for one, path in self.requests)

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *words) -> None:
        pass

    # ------------------------------------------------------------ plumbing

    def reply(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        more = {"X-Error-Code": code} if code else {}
        self.reply(status, {"error": message}, X_Error_Message=message, **more, **headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def faulted(self) -> bool:
        for fault in self.server.faults:
            if fault.part in self.path and fault.method in ("", self.command):
                self.server.faults.remove(fault)
                break
        else:
            return False
        if fault.kind == "half":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.connection.close()
            self.close_connection = True
            return True
        self.body()
        if fault.kind == "hang":
            time.sleep(3)
            self.close_connection = True
        else:
            self.error(int(fault.kind), f"fault {fault.kind}", **fault.headers)
        return True

    def answer(self) -> None:
        self.server.requests.append((self.command, self.path))
        if self.faulted():
            return
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        with self.server.lock:
            for method, pattern, call in ROUTES:
                if method in (self.command, "GET" if self.command == "HEAD" else "") and (
                    found := re.fullmatch(pattern, path)
                ):
                    call(self, query, **found.groupdict())
                    return
        self.body()
        self.error(404, f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refused(self, write: bool = False) -> bool:
        if self.known or not write:
            return False
        self.body()
        self.error(401, "Invalid username or password.")
        return True

    def repo(self, kind: str | None, name: str) -> Repo | None:
        """The repository, where there is one that the caller may see; else this answers."""
        key = f"datasets/{name}" if kind and kind.startswith("datasets") else name
        found = self.server.repos.get(key)
        if found is None or (found.private and not self.known):
            self.body()
            self.error(404 if self.known else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    # ------------------------------------------------------------ routes

    def whoami(self, query) -> None:
        if not self.refused(write=True):
            self.reply(200, {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def yaml(self, query) -> None:
        self.body()
        self.reply(200, {"errors": [], "warnings": []})

    def create(self, query) -> None:
        if self.refused(write=True):
            return
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        key = f"datasets/{name}" if asked.get("type") == "dataset" else name
        url = f"{self.server.url}/{key}"
        if key in self.server.repos:
            self.reply(409, {"error": "You already created this repo", "url": url})
            return
        self.server.repos[key] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
        self.reply(200, {"url": url, "name": name})

    def info(self, query, kind, name, revision=None) -> None:
        if repo := self.repo(kind, name):
            files = [{"rfilename": file} for file in sorted(repo.files)]
            self.reply(200, {"id": name, "sha": repo.sha, "private": repo.private, "siblings": files, "tags": []})

    def tree(self, query, kind, name, revision, folder="") -> None:
        if repo := self.repo(kind, name):
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            inside = {file: data for file, data in repo.files.items() if file.startswith(folder and f"{folder}/")}
            rows = [
                {"type": "file", "path": file, "size": len(data), "oid": git_oid(data)}
                for file, data in inside.items()
                if deep or "/" not in file[len(folder and f"{folder}/") :]
            ]
            self.reply(200, rows)

    def preupload(self, query, kind, name, revision) -> None:
        if self.refused(write=True) or (repo := self.repo(kind, name)) is None:
            return
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": git_oid(repo.files[file["path"]]) if file["path"] in repo.files else None,
            }
            for file in json.loads(self.body())["files"]
        ]
        self.reply(200, {"files": rows})

    def batch(self, query, kind, name) -> None:
        if self.refused(write=True) or self.repo(kind, name) is None:
            return
        objects = []
        for one in json.loads(self.body())["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            objects.append(one | ({} if one["oid"] in self.server.objects else {"actions": upload}))
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, query, oid) -> None:
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            self.error(400, "The content is not that of its checksum")
            return
        self.server.objects[oid] = content
        self.reply(200, b"")

    def commit(self, query, kind, name, revision) -> None:
        if self.refused(write=True) or (repo := self.repo(kind, name)) is None:
            return
        files = dict(repo.files)
        for line in self.body().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    self.error(400, f"LFS object {value['oid']} was not uploaded")
                    return
                files[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repo.files, repo.commits = files, repo.commits + 1
        self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def resolve(self, query, kind, name, revision, file) -> None:
        repo = self.repo(kind, name)
        if repo is None:
            return
        if file not in repo.files:
            self.error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=repo.sha)
            return
        content = repo.files[file]
        self.reply(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=repo.sha)

    # ------------------------------------------------------------ collections

    def create_collection(self, query) -> None:
        if self.refused(write=True):
            return
        asked = json.loads(self.body())
        slug = f"{asked['namespace']}/{re.sub(r'[^a-z0-9]+', '-', asked['title'].lower())}-{'0' * 24}"
        if slug in self.server.collections:
            self.reply(409, {"error": "exists", "slug": slug})
            return
        self.server.collections[slug] = {
            "slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}, "items": [], "position": 0,
            "lastUpdated": "2026-01-01T00:00:00.000Z", "private": asked["private"], "theme": "blue", "upvotes": 0,
            "description": asked.get("description"),
        }  # fmt: skip
        self.reply(200, self.server.collections[slug])

    def collection(self, query, slug) -> None:
        found = self.server.collections.get(slug)
        if found is None:
            self.error(404, "no such collection")
        else:
            self.reply(200, found)

    def add_item(self, query, slug) -> None:
        if self.refused(write=True):
            return
        item = json.loads(self.body())
        items = self.server.collections[slug]["items"]
        if any(one["id"] == item["item"]["id"] for one in items):
            self.error(409, "already there")
            return
        items.append({
            "_id": str(len(items)), "id": item["item"]["id"], "type": item["item"]["type"], "position": len(items),
            "note": {"text": item["note"]} if item.get("note") else None,
        })  # fmt: skip
        self.reply(200, self.server.collections[slug])


def git_oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


KIND, NAME = "(?P<kind>models|datasets)", "(?P<name>[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.yaml),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", f"/api/{KIND}/{NAME}", Handler.info),
    ("GET", f"/api/{KIND}/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/{KIND}/{NAME}/tree/{REVISION}", Handler.tree),
    ("GET", f"/api/{KIND}/{NAME}/tree/{REVISION}/(?P<folder>.+)", Handler.tree),
    ("POST", f"/api/{KIND}/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/{KIND}/{NAME}/commit/{REVISION}", Handler.commit),
    ("POST", f"/(?P<kind>datasets/)?{NAME}\\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Handler.upload),
    ("POST", "/api/collections", Handler.create_collection),
    ("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)", Handler.collection),
    ("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items", Handler.add_item),
    ("GET", f"/(?P<kind>datasets/)?{NAME}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
]
