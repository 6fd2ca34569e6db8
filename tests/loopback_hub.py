"""A small Hugging Face Hub in this process, to which `huggingface_hub` clients can push models and read them back.

    with LoopbackHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(), "HF_HOME": fresh_folder}, check=True)
    assert sorted(hub.repos["tester/model"].files) == [...]

The user is `tester`. There are only models, in their present state whatever the revision, without LFS; what this
stand-in doesn't know it answers by 501, which the client doesn't retry.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml


MODEL = r"/(?P<repo_id>[^/?]+/[^/?]+?)"
ROUTES = {  # a request without its query -> the method of LoopbackHub that answers, given the body and the groups
    r"POST /api/validate-yaml": "_validate_card",
    r"POST /api/repos/create": "_create",
    rf"GET /api/models{MODEL}/auth-check/write": "_check_write",
    rf"GET /api/models{MODEL}(/revision/[^/?]+)?": "_info",
    rf"GET /api/models{MODEL}/tree/[^/?]+": "_tree",
    rf"POST /api/models{MODEL}/preupload/main": "_preupload",
    rf"POST /api/models{MODEL}/commit/main": "_commit",
    rf"(GET|HEAD) {MODEL}/resolve/[^/?]+/(?P<path>[^?]+)": "_resolve",
}


class Refusal(Exception):
    """An answer with an error status; `code` is the X-Error-Code by which the client tells one 404 from another."""

    def __init__(self, status, message, code=""):
        headers = {"X-Error-Message": ascii(message)[1:-1], "X-Error-Code": code}
        self.answer = status, headers, json.dumps({"error": message}).encode()


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)  # by path

    @classmethod
    def of_folder(cls, folder):
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        return cls(files={path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    @property
    def sha(self):
        return oid(b"".join(self.files.values()))


def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub:
    """Serves on 127.0.0.1 while entered.

    repos: `Repo` by id; more can be put there.
    requests: what the clients asked for, such as "POST /api/repos/create".
    fail_commits: ids of repositories whose commits are answered by 500.
    token: needed for writing and for private models. Another one is refused everywhere, as on the Hub.
    """

    def __init__(self, token="hf_test"):
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.fail_commits: set[str] = set()
        self.token, self._lock = token, threading.Lock()

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
        """The variables of a client, read when `huggingface_hub` is imported. It should also get its own HF_HOME."""
        hub = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {**hub, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def answer(self, request, headers, body):
        """The status, headers and content that answer a request (its method and path)."""
        with self._lock:
            self.requests.append(request)
            try:
                self._trusted = "Authorization" in headers
                if headers.get("Authorization", f"Bearer {self.token}") != f"Bearer {self.token}":
                    raise Refusal(401, "Invalid credentials in Authorization header")
                for pattern, name in ROUTES.items():
                    if match := re.fullmatch(rf"{pattern}(\?.*)?", request):
                        answer = getattr(self, name)(body, **match.groupdict())
                        return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
                raise Refusal(501, f"The stand-in for the Hub doesn't know {request}")
            except Refusal as refusal:
                return refusal.answer

    def _repo(self, repo_id, write=False):
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self._trusted):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not (self._trusted and repo_id.startswith("tester/")):
            raise Refusal(403, f"You don't have write access to {repo_id}")
        return repo

    def _validate_card(self, body):
        """As the Hub does, refuses metadata that is not YAML, or has paths where ids belong."""
        try:
            _, text, _ = re.split(r"^---\n", json.loads(body)["content"], maxsplit=2, flags=re.MULTILINE)
            metadata = {"base_model": [], "datasets": [], **yaml.safe_load(text)}
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise Refusal(400, f"Invalid metadata: {error}") from error
        for names in (metadata["base_model"], metadata["datasets"]):
            for name in [names] if isinstance(names, str) else names:
                if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
                    raise Refusal(400, f"Invalid metadata: {name} is not an id")
        return {"errors": [], "warnings": []}

    def _create(self, body):
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if not self._trusted or not repo_id.startswith("tester/"):
            raise Refusal(403, f"You don't have the rights to create {repo_id}")
        if repo_id in self.repos:
            return 409, {}, json.dumps({"url": f"{self.endpoint}/{repo_id}"}).encode()
        self.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{repo_id}"}

    def _check_write(self, body, repo_id):
        self._repo(repo_id, write=True)
        return {}

    def _info(self, body, repo_id):
        repo = self._repo(repo_id)
        info = {"id": repo_id, "sha": repo.sha, "private": repo.private}
        return info | {"siblings": [{"rfilename": path} for path in repo.files]}

    def _tree(self, body, repo_id):
        files = self._repo(repo_id).files.items()  # recursively, as the client asks for them
        return [{"type": "file", "path": path, "size": len(data), "oid": oid(data)} for path, data in files]

    def _preupload(self, body, repo_id):
        self._repo(repo_id, write=True)
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        return {"files": [{"path": file["path"], **mode} for file in json.loads(body)["files"]]}

    def _commit(self, body, repo_id):
        repo = self._repo(repo_id, write=True)
        if repo_id in self.fail_commits:
            raise Refusal(500, "The test wants this commit to fail")
        files = [item["value"] for item in map(json.loads, body.splitlines()) if item["key"] == "file"]
        repo.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        return {"commitOid": repo.sha, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{repo.sha}"}

    def _resolve(self, body, repo_id, path):
        repo = self._repo(repo_id)
        if path not in repo.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return 200, {"X-Repo-Commit": repo.sha, "ETag": f'"{oid(repo.files[path])}"'}, repo.files[path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise an answer waits until the client acknowledges its headers

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = self.server.hub.answer(f"{self.command} {self.path}", self.headers, body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *_):
        """Silent: `LoopbackHub.requests` tells as much."""
