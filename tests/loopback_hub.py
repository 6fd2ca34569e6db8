"""A small Hugging Face Hub in this process, to which `huggingface_hub` clients can push models and read them back.

    with LoopbackHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(), "HF_HOME": fresh_folder}, check=True)
    assert sorted(hub.repos["tester/model"].files) == [...]

`huggingface_hub` reads these variables when it is imported, so clients are subprocesses. There are only models with
one branch, and no pull requests: what it doesn't know it answers by 501, which the client doesn't retry.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml


LFS_SUFFIXES, LFS_BYTES = (".bin", ".ckpt", ".pt", ".safetensors"), 10_000_000
MODEL, REVISION = r"/(?P<repo_id>[^/?]+/[^/?]+?)", r"/(?P<revision>[^/?]+)"
ROUTES = {  # a request without its query -> the method of LoopbackHub that answers, given the body and the groups
    r"GET /api/whoami-v2": "_whoami",
    r"POST /api/validate-yaml": "_validate_card",
    r"POST /api/repos/create": "_create",
    rf"GET /api/models{MODEL}(/revision{REVISION})?": "_info",
    rf"GET /api/models{MODEL}/tree{REVISION}(/(?P<folder>[^?]+))?(?P<recursive>\?.*recursive=true)?": "_tree",
    rf"POST /api/models{MODEL}/preupload{REVISION}": "_preupload",
    rf"POST /api/models{MODEL}/commit{REVISION}": "_commit",
    rf"POST {MODEL}\.git/info/lfs/objects/batch": "_lfs_batch",
    r"PUT /lfs/(?P<sha256>[0-9a-f]{64})": "_lfs_put",
    rf"(GET|HEAD) {MODEL}/resolve{REVISION}/(?P<path>[^?]+)": "_resolve",
}


class Refusal(Exception):
    """An answer with an error status; `code` is the X-Error-Code by which the client tells one 404 from another."""

    def __init__(self, status, message, code=None, headers=(), **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": ascii(message)[1:-1], **({"X-Error-Code": code} if code else {})}
        self.headers.update(headers)


@dataclass
class Repo:
    """A model. `snapshots` maps the sha of each state to its files by path; the last one is the present state."""

    private: bool = False
    commits: list[tuple[str, list[str]]] = field(default_factory=list)  # message, sorted paths added
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=lambda: {secrets.token_hex(20): {}})

    @property
    def sha(self):
        return next(reversed(self.snapshots))

    @property
    def files(self):
        return self.snapshots[self.sha]

    def commit(self, message, added, deleted=()):
        """added: contents by path. deleted: paths of files, or of folders if they end in a slash."""
        folders = tuple(path for path in deleted if path.endswith("/"))
        kept = {p: data for p, data in self.files.items() if p not in deleted and not p.startswith(folders)}
        self.commits.append((message, sorted(added)))
        self.snapshots[secrets.token_hex(20)] = kept | added

    def at(self, revision):
        """The sha and the files of `revision`, which is main or a sha."""
        sha = self.sha if revision == "main" else revision
        if sha not in self.snapshots:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.snapshots[sha]


def is_lfs(path, size, data):
    """Whether a file goes through LFS: a large or binary one, but the client never sends an empty one that way."""
    return size > 0 and (size > LFS_BYTES or path.endswith(LFS_SUFFIXES) or b"\0" in data[:512])


def oid(path, data):
    """By what the client knows a file's content: SHA-256 in LFS, else git's SHA-1."""
    lfs = is_lfs(path, len(data), data)
    return (hashlib.sha256(data) if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()


def read_card(text):
    """A model card's metadata and what is wrong with it; as the Hub does, refuses paths where ids belong."""
    match = re.match(r"---\s*\n(.*?)^---\s*$", text, flags=re.DOTALL | re.MULTILINE)
    try:
        metadata = (yaml.safe_load(match[1]) if match else None) or {}
    except yaml.YAMLError as error:
        return {}, [f"bad YAML: {error}"]
    if not isinstance(metadata, dict):
        return {}, ["the metadata is not a mapping"]
    ids = {key: metadata.get(key) or [] for key in ("base_model", "datasets")}
    ids = [(key, value) for key, values in ids.items() for value in (values if isinstance(values, list) else [values])]
    wrong = [(key, value) for key, value in ids if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(value))]
    return metadata, [f'"{key}" with value "{value}" is not valid. Use an id from hf.co.' for key, value in wrong]


class LoopbackHub:
    """Serves on 127.0.0.1 while entered. `repos` maps ids to `Repo`, `requests` is what the clients asked for.

    fail_commits: how many of the next commits are answered by 500 (-1: all); can be set at any time.
    require_token: needed for writing and for private models. Another one is refused everywhere, as on the Hub.
    """

    def __init__(self, fail_commits=0, require_token="hf_test"):
        self.fail_commits, self.token = fail_commits, require_token
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path with query, authorization header
        self._blobs: dict[str, bytes | None] = {}  # LFS objects by SHA-256; None: announced, not there yet
        self._lock = threading.Lock()

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self):
        """The variables of a client. It should also get a cache of its own: HF_HOME."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return variables | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def answer(self, method, target, authorization, body):
        """The status, headers and content that answer a request."""
        with self._lock:
            self.requests.append((method, target, authorization))
            try:
                if authorization not in (None, f"Bearer {self.token}"):
                    raise Refusal(401, "Invalid credentials in Authorization header")
                self._trusted = authorization is not None
                for pattern, name in ROUTES.items():
                    if match := re.fullmatch(rf"{pattern}([?&](?!create_pr=).*)?", f"{method} {target}"):
                        if not self._trusted and (name == "_whoami" or method == "POST" and name != "_validate_card"):
                            raise Refusal(401, "Invalid username or password.")
                        groups = {key: unquote(value) for key, value in match.groupdict().items() if value}
                        answer = getattr(self, name)(body, **groups)
                        return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
                raise Refusal(501, f"The stand-in for the Hub doesn't know {method} {target}")
            except Refusal as refusal:
                return refusal.status, refusal.headers, json.dumps(refusal.body).encode()

    def _repo(self, repo_id):
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self._trusted):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _whoami(self, body):
        return {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def _validate_card(self, body):
        metadata, problems = read_card(json.loads(body)["content"])
        if problems:
            raise Refusal(400, "Invalid metadata", errors=[{"message": problem} for problem in problems])
        return {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]}

    def _create(self, body):
        wanted = json.loads(body)
        if wanted.get("type", "model") != "model":
            raise Refusal(501, "The stand-in for the Hub has only models")
        repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.endpoint}/{repo_id}")
        self.repos[repo_id] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return {"url": f"{self.endpoint}/{repo_id}"}

    def _info(self, body, repo_id, revision="main"):
        repo = self._repo(repo_id)
        sha, files = repo.at(revision)
        card = read_card(files.get("README.md", b"").decode())[0]
        siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
        return {"id": repo_id, "sha": sha, "private": repo.private, "cardData": card, "siblings": siblings}

    def _tree(self, body, repo_id, revision, folder="", recursive=""):
        """Lists files; also folders, if not recursive."""
        files = self._repo(repo_id).at(revision)[1]
        prefix, entries = f"{folder}/" if folder else "", {}
        for path in sorted(path for path in files if path.startswith(prefix)):
            name, *inside = path[len(prefix) :].split("/")
            if inside and not recursive:
                entries[name] = {"type": "directory", "path": prefix + name, "oid": "0" * 40}
            else:
                size = len(files[path])
                entries[path] = {"type": "file", "path": path, "size": size, "oid": oid(path, files[path])}
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return list(entries.values())

    def _preupload(self, body, repo_id, revision):
        files, answers = self._repo(repo_id).at(revision)[1], []
        for file in json.loads(body)["files"]:
            path, lfs = file["path"], is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            answers[-1] |= {"oid": oid(path, files[path])} if path in files else {}
        return {"files": answers}

    def _lfs_batch(self, body, repo_id):
        self._repo(repo_id)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for wanted in objects:
            if self._blobs.setdefault(wanted["oid"]) is None:
                wanted["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, body, sha256):
        """Needs no token, like the signed addresses that the Hub hands out."""
        if sha256 not in self._blobs or hashlib.sha256(body).hexdigest() != sha256:
            raise Refusal(403, "Not an object that was announced")
        self._blobs[sha256] = body
        return {}

    def _commit(self, body, repo_id, revision):
        repo = self._repo(repo_id)
        if self.fail_commits:
            self.fail_commits = max(self.fail_commits - 1, -1)
            raise Refusal(500, "The test wants this commit to fail")
        if revision != "main":
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        message, added, deleted = "", {}, []
        for item in map(json.loads, body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key in ("file", "lfsFile"):
                data = base64.b64decode(value["content"]) if key == "file" else self._blobs.get(value["oid"])
                if data is None:
                    raise Refusal(400, f"LFS pointer of {value['path']} pointed to a file that does not exist")
                added[value["path"]] = data
            else:  # deletedFile or deletedFolder
                deleted.append(value["path"].rstrip("/") + "/" * (key == "deletedFolder"))
        if problems := read_card(added.get("README.md", b"").decode())[1]:
            raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(problems)}")
        repo.commit(message, added, deleted)
        return {"commitOid": repo.sha, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{repo.sha}"}

    def _resolve(self, body, repo_id, revision, path):
        sha, files = self._repo(repo_id).at(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{oid(path, files[path])}"'}, files[path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise an answer waits until the client acknowledges its headers

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = self.server.hub.answer(self.command, self.path, self.headers["Authorization"], body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, *_):
        """Silent: `LoopbackHub.requests` tells as much."""
