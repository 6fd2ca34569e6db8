"""A small Hugging Face Hub in this process, to which `huggingface_hub` clients can push models and read them back.

    with LoopbackHub() as hub:
        hub.faults.append(Fault("PUT .*lfs", "cut", times=2))
        subprocess.run([...], env={**os.environ, **hub.environment(), "HF_HOME": fresh_folder}, check=True)
    assert sorted(hub.repos["tester/model"].files) == [...]

There are only models, with one branch, and no Xet: large files go by LFS. A new repository is empty, while the Hub's
has a .gitattributes. What this stand-in doesn't know it answers by 501, which the client doesn't retry.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote

import yaml


MODEL = r"/(?P<repo_id>[^/?]+/[^/?]+?)"
REVISION = r"(?P<revision>[^/?]+)"
ROUTES = {  # a request without its query -> the method of LoopbackHub that answers, given the request and the groups
    r"GET /api/whoami-v2": "_whoami",
    r"POST /api/validate-yaml": "_validate_card",
    r"POST /api/repos/create": "_create",
    rf"GET /api/models{MODEL}/auth-check(?P<write>/write)?": "_check_rights",
    rf"GET /api/models{MODEL}(/revision/{REVISION})?": "_info",
    rf"GET /api/models{MODEL}/commits/{REVISION}": "_commits",
    rf"GET /api/models{MODEL}/tree/{REVISION}(/(?P<path>[^?]+))?": "_tree",
    rf"POST /api/models{MODEL}/paths-info/{REVISION}": "_paths_info",
    rf"POST /api/models{MODEL}/preupload/main": "_preupload",
    rf"POST /api/models{MODEL}/commit/main": "_commit",
    rf"POST {MODEL}\.git/info/lfs/objects/batch": "_lfs_batch",
    rf"PUT /lfs{MODEL}/(?P<sha256>\w+)": "_lfs_upload",
    rf"(GET|HEAD) {MODEL}/resolve/{REVISION}/(?P<path>[^?]+)": "_resolve",
}
LFS_SUFFIXES = ".bin .ckpt .distcp .model .msgpack .npz .pkl .png .pt .pth .safetensors".split()
LFS_SIZE = 10_000_000
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests in which the regular expression `pattern` is found.

    kind: a status to answer with, instead of doing what is asked for (502 to 504 by a page, as gateways do), or
        "cut": the connection ends in the middle of the request's body; of the answer's, if the request has none;
        "reset": the same, by a TCP reset instead of an orderly end;
        "lost": the connection ends without an answer, after what was asked for has been done;
        "slow": the answer comes `seconds` later.
    seconds: also the Retry-After of the statuses 429 and 503, after which the client waits for one more second.
    """

    pattern: str
    kind: int | str
    times: float = 1
    seconds: float = 0


class Refusal(Exception):
    """An answer with an error status; `code` is the X-Error-Code by which the client tells one 404 from another."""

    def __init__(self, status, message, code="", headers={}):
        headers = {"X-Error-Message": ascii(message)[1:-1], "X-Error-Code": code, **headers}
        self.answer = status, headers, json.dumps({"error": message, "errors": [{"message": message}]}).encode()


class Repo:
    """A model of the user whose name its id begins with. What a test puts into `files` belongs to the last commit.

    history: message and files (content by path) of each commit, the oldest first.
    objects: what came by LFS, by SHA-256; offered: SHA-256 and size of what clients were told to upload.
    """

    def __init__(self, private=False, files=(), gated=False):
        self.private, self.gated = private, gated
        self.history = [("initial commit", dict(files))]
        self.objects, self.offered = {}, {}

    @classmethod
    def of_folder(cls, folder):
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        return cls(files={path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    @property
    def files(self):
        return self.history[-1][1]

    @property
    def shas(self):
        """The ids of the commits, the oldest first."""
        trees = [sorted((path, oid(data)) for path, data in files.items()) for _, files in self.history]
        return [oid(repr((number, tree)).encode()) for number, tree in enumerate(trees)]

    def at(self, revision):
        """Id and files of a commit that is named by its id or as "main"."""
        snapshots = {sha: files for sha, (_, files) in zip(self.shas, self.history)}
        sha = list(snapshots)[-1] if revision in (None, "main") else revision
        if sha not in snapshots:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, snapshots[sha]

    def object(self, sha256):
        """Content of an LFS file that was uploaded or is in some commit; None if there is none."""
        committed = (data for _, files in self.history for path, data in files.items() if is_lfs(path, len(data)))
        return self.objects.get(sha256) or next((data for data in committed if lfs_oid(data) == sha256), None)


@lru_cache(4096)
def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@lru_cache(4096)
def lfs_oid(data):
    return hashlib.sha256(data).hexdigest()


def is_lfs(path, size):
    return size > LFS_SIZE or (size > 0 and PurePosixPath(path).suffix in LFS_SUFFIXES)


def listing(files):
    """Entries of the files and of the folders they are in, by path, as the Hub describes them in trees."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    entries = {path: {"type": "directory", "path": path, "oid": oid(path.encode()), "size": 0} for path in folders}
    for path, data in files.items():
        entries[path] = {"type": "file", "path": path, "oid": oid(data), "size": len(data)}
        if is_lfs(path, len(data)):
            sha256 = lfs_oid(data)
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n"
            pointer %= sha256.encode(), len(data)
            lfs = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": len(pointer)}
            entries[path] |= {"oid": oid(pointer), "lfs": lfs}
    return dict(sorted(entries.items()))


def metadata(card):
    """What the YAML at the head of a model card says; {} if there is none."""
    found = re.match(r"---\r?\n(.*?)^---\s*$", card, flags=re.MULTILINE | re.DOTALL)
    return yaml.safe_load(found[1]) or {} if found else {}


@dataclass
class Request:
    line: str  # method and path
    headers: object
    body: bytes
    user: str | None
    may_write: bool

    @property
    def json(self):
        return json.loads(self.body)


class LoopbackHub:
    """Serves on 127.0.0.1 while entered.

    token: of the user `tester`. tokens: more of them, with the names of their users; those in `read_only` can't write.
    repos: `Repo` by id; more can be put there.
    requests: what the clients asked for, such as "POST /api/repos/create".
    received: bytes of the bodies of these requests, by request.
    faults: what shall go wrong; more can be put there at any time.
    fail_commits: ids of repositories whose commits are answered by 500.
    """

    def __init__(self, token="hf_test", tokens={}, read_only=()):
        self.token, self.users, self.read_only = token, {token: "tester", **tokens}, read_only
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.received: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.fail_commits: set[str] = set()
        self._lock, self._up = threading.Lock(), False

    def __enter__(self):
        self._server = _Server(self, port=0)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.up()
        return self

    def __exit__(self, *_):
        self.down()
        self._server.server_close()

    def up(self):
        self._server.server_activate()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self._up = True

    def down(self):
        """Ends all connections and refuses new ones until `up`. The port stays reserved."""
        if self._up:
            self._up = False
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._server.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._server = _Server(self, self._server.server_port)

    def environment(self, token=None):
        """The variables of a client, read when `huggingface_hub` is imported. It should also get its own HF_HOME."""
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {**hub, "HF_TOKEN": token or self.token, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def arrived(self, line):
        """Notes a request; returns the fault that meets it, of those which still are to happen."""
        with self._lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
            return Fault("", "none")

    def answer(self, line, headers, body):
        """The status, headers and content that answer a request (its method and path)."""
        with self._lock:
            try:
                token = headers.get("Authorization", "").removeprefix("Bearer ")
                if token and token not in self.users:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                request = Request(line, headers, body, self.users.get(token), token not in self.read_only)
                for pattern, name in ROUTES.items():
                    if match := re.fullmatch(rf"{pattern}(\?.*)?", line):
                        groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                        answer = getattr(self, name)(request, **groups)
                        return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
                raise Refusal(501, f"The stand-in for the Hub doesn't know {line}")
            except Refusal as refusal:
                return refusal.answer

    def _repo(self, request, repo_id, write=False):
        repo, owner = self.repos.get(repo_id), repo_id.split("/")[0]
        hidden = repo is None or (repo.private and request.user != owner)
        if request.user is None and (hidden or write):
            # The client takes a 401 of an https:// address for "not found". Ours is http://, so it needs the code.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not (request.user == owner and request.may_write):
            raise Refusal(403, f"You don't have write access to {repo_id}")
        return repo

    def _whoami(self, request):
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        role = {"displayName": "loopback", "role": "write" if request.may_write else "read"}
        auth = {"type": "access_token", "accessToken": role}
        return {"type": "user", "name": request.user, "fullname": request.user, "orgs": [], "auth": auth}

    def _validate_card(self, request):
        """As the Hub does, refuses metadata that is not YAML, or has paths where ids belong."""
        try:
            fields = {"base_model": [], "datasets": [], **metadata(request.json["content"])}
        except (yaml.YAMLError, TypeError) as error:
            raise Refusal(400, f"Invalid metadata: {error}") from error
        for names in (fields["base_model"], fields["datasets"]):
            for name in [names] if isinstance(names, str) else names:
                if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
                    raise Refusal(400, f"Invalid metadata: {name} is not an id")
        missing = [] if metadata(request.json["content"]) else [{"message": "empty or missing yaml metadata"}]
        return {"errors": [], "warnings": missing}

    def _create(self, request):
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = request.json.get("organization") or request.user
        repo_id = f"{owner}/{request.json['name']}"
        if owner != request.user or not request.may_write:
            raise Refusal(403, f"You don't have the rights to create {repo_id}")
        url = {"url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.repos:
            return 409, {}, json.dumps({"error": "You already created this model repo", **url}).encode()
        self.repos[repo_id] = Repo(private=request.json.get("visibility") == "private")
        return url

    def _check_rights(self, request, repo_id, write):
        self._repo(request, repo_id, write=bool(write))
        return {}

    def _info(self, request, repo_id, revision):
        repo = self._repo(request, repo_id)
        sha, files = repo.at(revision)
        try:
            card = json.loads(json.dumps(metadata(files.get("README.md", b"").decode()), default=str))
        except yaml.YAMLError:
            card = {}
        entries = [entry for entry in listing(files).values() if entry["type"] == "file"]
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        if "blobs=" in request.line:
            siblings = [{**entry, "rfilename": entry["path"], "blobId": entry["oid"]} for entry in entries]
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "lastModified": DATE, "siblings": siblings}
        return {**info, "private": repo.private, "gated": "manual" if repo.gated else False, "cardData": card}

    def _commits(self, request, repo_id, revision):
        repo = self._repo(request, repo_id)
        sha, _ = repo.at(revision)
        author = [{"user": repo_id.split("/")[0]}]
        commits = [
            {"id": commit, "title": message, "message": "", "authors": author, "date": DATE}
            for commit, (message, _) in zip(repo.shas, repo.history)
        ]
        return commits[repo.shas.index(sha) :: -1]

    def _tree(self, request, repo_id, revision, path):
        entries = listing(self._repo(request, repo_id).at(revision)[1])
        if path and entries.get(path, {}).get("type") != "directory":
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        below = {name: entry for name, entry in entries.items() if not path or name.startswith(f"{path}/")}
        recursive = "recursive=true" in request.line.lower()
        parent = PurePosixPath(path or ".")
        return [entry for name, entry in below.items() if recursive or PurePosixPath(name).parent == parent]

    def _paths_info(self, request, repo_id, revision):
        entries = listing(self._repo(request, repo_id).at(revision)[1])
        wanted = [path.rstrip("/") for path in parse_qs(request.body.decode()).get("paths", [])]
        return [entries[path] for path in wanted if path in entries]

    def _preupload(self, request, repo_id):
        repo = self._repo(request, repo_id, write=True)
        ignored = request.json.get("gitIgnore") or repo.files.get(".gitignore", b"").decode()
        patterns = [line.rstrip("/") for line in ignored.splitlines() if line and not line.startswith("#")]
        answers = []
        for path, size in ((file["path"], file["size"]) for file in request.json["files"]):
            names, present = [path, *path.split("/")], listing(repo.files).get(path)
            answer = {"path": path, "uploadMode": "lfs" if is_lfs(path, size) else "regular"}
            answer["shouldIgnore"] = any(fnmatch(name, pattern) for name in names for pattern in patterns)
            answers.append(answer | ({"oid": present.get("lfs", present)["oid"]} if present else {}))
        return {"files": answers}

    def _lfs_batch(self, request, repo_id):
        repo, answers = self._repo(request, repo_id, write=True), []
        for wanted in ({"oid": item["oid"], "size": item["size"]} for item in request.json["objects"]):
            if repo.object(wanted["oid"]) is None:
                repo.offered[wanted["oid"]] = wanted["size"]
                wanted["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{repo_id}/{wanted['oid']}"}}
            answers.append(wanted)
        return {"transfer": "basic", "objects": answers}

    def _lfs_upload(self, request, repo_id, sha256):
        """As to the Hub's storage, clients come without a token, to the address that was given to them."""
        repo = self.repos.get(repo_id, Repo())
        if sha256 not in repo.offered:
            raise Refusal(403, "Nobody was told to upload this")
        if lfs_oid(request.body) != sha256 or len(request.body) != repo.offered[sha256]:
            raise Refusal(400, "The content is not what was announced")
        repo.objects[sha256] = request.body
        return {}

    def _commit(self, request, repo_id):
        repo = self._repo(request, repo_id, write=True)
        if repo_id in self.fail_commits:
            raise Refusal(500, "The test wants this commit to fail")
        (header, *items), files = map(json.loads, request.body.splitlines()), dict(repo.files)
        if header["value"].get("parentCommit", repo.shas[-1]) != repo.shas[-1]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for key, value in ((item["key"], item["value"]) for item in items):
            path = value["path"].rstrip("/")
            if key in ("deletedFile", "deletedFolder"):
                kept = {name: data for name, data in files.items() if name != path}
                if key == "deletedFolder":
                    kept = {name: data for name, data in files.items() if not name.startswith(f"{path}/")}
                if len(kept) == len(files):
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                files = kept
            else:
                data = base64.b64decode(value["content"]) if key == "file" else repo.object(value["oid"])
                if data is None:
                    raise Refusal(400, f"The LFS object of {path} was not uploaded")
                files[path] = data
        repo.history.append((header["value"]["summary"], files))
        return {"commitOid": repo.shas[-1], "commitUrl": f"{self.endpoint}/{repo_id}/commit/{repo.shas[-1]}"}

    def _resolve(self, request, repo_id, revision, path):
        repo = self._repo(request, repo_id)
        if repo.gated and request.user != repo_id.split("/")[0]:
            raise Refusal(403 if request.user else 401, f"Access to model {repo_id} is restricted", "GatedRepo")
        sha, files = repo.at(revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        data, size = files[path], len(files[path])
        headers["ETag"] = f'"{lfs_oid(data) if is_lfs(path, size) else oid(data)}"'
        if is_lfs(path, size):
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": headers["ETag"]}
        first, last = re.fullmatch(r"(?:bytes=(\d+)-(\d*))?", request.headers.get("Range", "")).groups()
        if first is None:
            return 200, headers, data
        part = data[int(first) : int(last or size) + 1]
        if not part:
            raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return 206, headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{size}"}, part


class _Server(ThreadingHTTPServer):
    """Has a port, on which connections are refused until it is activated."""

    request_queue_size = 64

    def __init__(self, hub, port):
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self.hub, self.connections = hub, set()
        self.server_bind()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may die or give up at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise an answer waits until the client acknowledges its headers

    def _serve(self):
        hub, line = self.server.hub, f"{self.command} {self.path}"
        fault, length = hub.arrived(line), int(self.headers.get("Content-Length", 0))
        cut = fault.kind in ("cut", "reset")
        body = self.rfile.read(length // 2 if cut else length)
        hub.received[line] += len(body)
        if len(body) < length or (cut and self.command == "HEAD"):
            return self._hang_up(fault)
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        if isinstance(fault.kind, int):
            wait = {"Retry-After": f"{fault.seconds:.0f}"} if fault.kind in (429, 503) else {}
            status, headers, content = Refusal(fault.kind, "The test wants this to fail", headers=wait).answer
            if 502 <= status <= 504:
                headers, content = {"Content-Type": "text/html", **wait}, b"<html><h1>Out of order</h1></html>"
        else:
            status, headers, content = hub.answer(line, self.headers, body)
        if fault.kind == "lost":
            return self._hang_up(fault)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._hang_up(fault)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _hang_up(self, fault):
        self.close_connection = True
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())

    def log_message(self, *_):
        """Silent: `LoopbackHub.requests` tells as much."""
