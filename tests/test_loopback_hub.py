"""The stand-in for the Hub, as the real client sees it."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from loopback_hub import Fault, LoopbackHub, Repo


pytestmark = pytest.mark.usefixtures("time_limit")
CARD = "---\nbase_model: tester/base\ntags:\n- lora\n---\n# A model\n"
WEIGHTS = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
CLIENT = """
import json
import sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import get_session

def read(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in files}

api, other, reader, wrong = HfApi(), *(HfApi(token=f"hf_{name}") for name in ("other", "reader", "wrong"))
nobody = HfApi(token=False)
for line in sys.stdin:
    try:
        answer = eval(json.loads(line))
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer, default=vars), flush=True)
"""


class Client:
    """A process that evaluates expressions. What they return comes back by JSON, errors as text."""

    def __init__(self, hub, home):
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", CLIENT], env=environment, text=True, **pipes)

    def start(self, code):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def result(self):
        return json.loads(self.process.stdout.readline())

    def __call__(self, code):
        self.start(code)
        return self.result()


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(tokens={"hf_other": "someone", "hf_reader": "tester"}, read_only={"hf_reader"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.process.kill()
    client.process.communicate()


@pytest.fixture
def repo(hub):
    hub.repos["tester/model"] = repo = Repo()
    return repo


@pytest.fixture
def folder(tmp_path):
    """Of files that go by LFS, and of others."""
    for name, content in {
        "README.md": CARD.encode(),
        "checkpoint-1/model.safetensors": WEIGHTS,
        "checkpoint-1/state of 1.json": b"{}",
        "checkpoint-1/empty.bin": b"",
    }.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def upload(folder, more=""):
    return f"api.upload_folder(repo_id='tester/model', folder_path={str(folder)!r}, commit_message='more'{more}).oid"


def download(folder, more=""):
    return f"read(snapshot_download('tester/model', local_dir={str(folder)!r}{more}))"


def sent(hub, method="PUT"):
    return sum(size for request, size in hub.received.items() if request.startswith(method))


def requests(hub, word, since):
    return [request for request in hub.requests[since:] if word in request]


def unhex(files):
    return {path: bytes.fromhex(content) for path, content in files.items()}


def test_a_folder_comes_back_as_it_was(hub, client, folder, tmp_path):
    before, seen = sent(hub), len(hub.requests)
    assert client("api.create_repo('model-by-client', private=True)").endswith("/tester/model-by-client")
    sha = client(upload(folder).replace("tester/model", "tester/model-by-client"))
    repo = hub.repos["tester/model-by-client"]
    assert repo.private and repo.files == contents(folder)
    assert requests(hub, "PUT", seen) == [f"PUT /lfs/tester/model-by-client/{SHA256}"]
    assert sent(hub) - before == len(WEIGHTS)
    got = client(download(tmp_path / "back").replace("tester/model", "tester/model-by-client"))
    assert unhex(got) == contents(folder)
    assert [message for message, _ in repo.history] == ["initial commit", "more"] and repo.shas[-1] == sha


def test_what_is_there_already_is_not_sent_again(hub, repo, client, folder):
    client(upload(folder))
    before, commits = sent(hub), len(repo.history)
    client(upload(folder))
    assert len(repo.history) == commits  # the client sees that nothing has changed
    client(upload(folder, ", path_in_repo='copy'"))
    assert repo.files["copy/checkpoint-1/model.safetensors"] == WEIGHTS and sent(hub) == before


def test_folders_and_files_are_deleted(repo, client, folder):
    client(upload(folder))
    client(upload(folder / "checkpoint-1", ", path_in_repo='checkpoint-10'"))
    client("api.delete_folder('checkpoint-1', 'tester/model').oid")
    assert {path.split("/")[0] for path in repo.files} == {"README.md", "checkpoint-10"}
    (folder / "checkpoint-1" / "model.safetensors").unlink()
    client(upload(folder / "checkpoint-1", ", path_in_repo='checkpoint-10', delete_patterns='*'"))
    assert sorted(repo.files) == ["README.md", "checkpoint-10/empty.bin", "checkpoint-10/state of 1.json"]
    assert "A file with this name doesn't exist" in client("api.delete_folder('checkpoint-1', 'tester/model').oid")
    assert "EntryNotFound" in client("api.delete_file('checkpoint-10', 'tester/model').oid")


def test_a_gitignore_keeps_files_out(repo, client, folder):
    (folder / ".gitignore").write_text("checkpoint-*/\n")
    client(upload(folder))
    assert sorted(repo.files) == [".gitignore", "README.md"]


def test_old_commits_can_be_read(repo, client, folder, tmp_path):
    first = client(upload(folder))
    (folder / "README.md").write_text("# Changed\n")
    client(upload(folder, ", delete_patterns='checkpoint-1/*'"))
    second = client("api.delete_folder('checkpoint-1', 'tester/model').oid")
    assert unhex(client(download(tmp_path / "old", f", revision={first!r}")))["README.md"] == CARD.encode()
    assert unhex(client(download(tmp_path / "new"))) == {"README.md": b"# Changed\n"}
    commits = client("[(commit.commit_id, commit.title) for commit in api.list_repo_commits('tester/model')]")
    assert commits[0] == [second, "Delete folder checkpoint-1 with huggingface_hub"]
    assert commits[2] == [first, "more"] and commits[3][1] == "initial commit" and len(commits) == 4
    assert "RevisionNotFound" in client("api.model_info('tester/model', revision='0' * 40).sha")
    assert "412" in client(upload(folder, f", path_in_repo='late', parent_commit={first!r}"))


def test_what_the_client_learns_about_a_model(repo, client, folder):
    client(upload(folder))
    assert client("api.model_info('tester/model').card_data.to_dict()") == {
        "base_model": "tester/base",
        "tags": ["lora"],
    }
    names = "sorted(file.rfilename for file in api.model_info('tester/model').siblings)"
    assert client(names) == client("sorted(api.list_repo_files('tester/model'))") == sorted(contents(folder))
    top = client("[type(entry).__name__ + entry.path for entry in api.list_repo_tree('tester/model')]")
    assert top == ["RepoFileREADME.md", "RepoFoldercheckpoint-1"]
    below = client("[entry.path for entry in api.list_repo_tree('tester/model', 'checkpoint-1', expand=True)]")
    assert below == sorted(set(contents(folder)) - {"README.md"})
    asked = "['checkpoint-1/model.safetensors', 'README.md', 'no.txt']"
    file, card = client(f"api.get_paths_info('tester/model', {asked})")
    assert file["lfs"]["sha256"] == SHA256 and file["lfs"]["size"] == file["size"] == len(WEIGHTS)
    assert card["lfs"] is None
    expected = subprocess.run(["git", "hash-object", folder / "README.md"], capture_output=True, text=True)
    assert card["blob_id"] == expected.stdout.strip()


def test_tokens(hub, client, folder):
    hub.repos["tester/model"] = Repo(private=True, files={"a.txt": b"1"})
    hub.repos["someone/model"] = Repo(files={"a.txt": b"2"})
    assert client("[a.whoami()['name'] for a in (api, other, reader)]") == ["tester", "someone", "tester"]
    assert "Invalid user token" in client("wrong.whoami()")
    look, write = "{}.model_info({!r}).private", "{}.auth_check({!r}, write=True)"
    assert client(look.format("api", "tester/model")) is client(look.format("reader", "tester/model")) is True
    assert client(look.format("nobody", "someone/model")) is client(look.format("api", "someone/model")) is False
    for user, status in (("other", 404), ("nobody", 401)):
        error = client(look.format(user, "tester/model"))
        assert error.startswith("RepositoryNotFoundError") and str(status) in error
    error = client(look.format("wrong", "someone/model"))
    assert "401" in error and "Invalid credentials" in error and "NotFound" not in error
    assert client(write.format("api", "tester/model")) is client(write.format("other", "someone/model")) is None
    for user, name in (("reader", "tester/model"), ("api", "someone/model")):
        assert "403" in client(write.format(user, name))
        error = client(f"{user}.upload_file(path_or_fileobj=b'3', path_in_repo='a.txt', repo_id={name!r})")
        assert f"You don't have write access to {name}" in error
    assert [hub.repos[f"{user}/model"].files["a.txt"] for user in ("tester", "someone")] == [b"1", b"2"]
    assert "403" in client("reader.create_repo('new')") and "tester/new" not in hub.repos


def test_a_gated_model_can_be_seen_but_not_loaded(hub, client):
    hub.repos["someone/gated"] = Repo(files={"a.txt": b"1"}, gated=True)
    assert client("api.model_info('someone/gated').gated") == "manual"
    assert client("hf_hub_download('someone/gated', 'a.txt')").startswith("GatedRepoError: 403")
    assert client("other.hf_hub_download('someone/gated', 'a.txt')").endswith("a.txt")


def test_the_client_repeats_uploads_that_failed(hub, repo, client, folder):
    """Each of five objects meets another fault, at the same time."""
    sizes = {429: 1, 503: 1, "lost": 1, "cut": 0.5, "reset": 0.5}  # what arrives before the fault
    expected, (old,) = Counter(), list(folder.glob("*/*.safetensors"))
    for number, (kind, size) in enumerate(sizes.items()):
        (folder / f"{number}.pt").write_bytes(content := bytes([number]) + WEIGHTS[1:])
        address = f"PUT /lfs/tester/model/{hashlib.sha256(content).hexdigest()}"
        expected[address] = len(content) * (1 + size)
        hub.faults.append(Fault(address, kind))
    old.unlink()
    before = Counter(hub.received)
    assert client(upload(folder)) == repo.shas[-1]
    assert repo.files == contents(folder) and all(fault.times == 0 for fault in hub.faults)
    assert {address: hub.received[address] - before[address] for address in expected} == expected


def test_the_client_does_not_repeat_a_commit(hub, repo, client, folder):
    hub.faults.append(Fault("tester/model/commit", 500))
    assert client(upload(folder)).startswith("HfHubHTTPError") and len(repo.history) == 1
    hub.faults.append(Fault("tester/model/commit", "lost"))
    assert client(upload(folder)).startswith("RemoteProtocolError") and repo.files == contents(folder)


def test_what_a_gateway_says_is_no_json(hub, repo, client, folder):
    hub.faults.append(Fault("POST /api/validate-yaml", 502))
    assert client(upload(folder)).startswith("JSONDecodeError") and len(repo.history) == 1


def test_cards(hub, repo, client):
    validate = "api._validate_yaml({!r})"
    for text in (CARD, "# No metadata\n\n---\n\nsome: [text\n\n---\n"):
        assert client(validate.format(text)) is None
        repo.files["README.md"] = text.encode()
        fields = client("getattr(api.model_info('tester/model').card_data, 'base_model', None)")
        assert fields == ("tester/base" if text == CARD else None)
    for metadata in ("base_model: /tmp/base", "base_model: [a", "- a"):
        assert client(validate.format(f"---\n{metadata}\n---\n")).startswith("ValueError: Invalid metadata")


def test_a_download_that_was_cut_goes_on_where_it_ended(hub, repo, client, tmp_path):
    repo.files["model.bin"] = WEIGHTS
    seen = len(hub.requests)
    hub.faults.append(Fault("GET .*resolve", "cut"))
    assert unhex(client(download(tmp_path / "a"))) == {"model.bin": WEIGHTS}
    assert len(requests(hub, "GET /tester/model/resolve", seen)) == 2
    hub.faults.append(Fault("GET .*resolve", "reset"))
    assert client(download(tmp_path / "b")).startswith("ReadError")  # which the client doesn't repeat


def test_ranges(repo, client, hub):
    repo.files["model.bin"] = WEIGHTS
    address = f"{hub.endpoint}/tester/model/resolve/main/model.bin"
    asked = (
        "[(r.status_code, r.headers.get('Content-Range'), r.content.hex()) for r in [get_session().get({!r}, {})]][0]"
    )
    for wanted, first, last in (
        ("100-199", 100, 199),
        ("299990-", 299_990, 299_999),
        ("299990-400000", 299_990, 299_999),
    ):
        status, place, content = client(asked.format(address, f"headers={{'Range': 'bytes={wanted}'}}"))
        assert (status, place) == (206, f"bytes {first}-{last}/300000")
        assert bytes.fromhex(content) == WEIGHTS[first : last + 1]
    assert client(asked.format(address, "headers={'Range': 'bytes=300000-'}"))[0] == 416


def test_a_slow_answer_comes_late(hub, repo, client):
    hub.faults.append(Fault("GET /api/models/tester/model", "slow", seconds=0.5))
    start = time.monotonic()
    assert client("api.model_info('tester/model').private") is False
    assert time.monotonic() - start >= 0.5


def test_down_and_up_again(hub, repo, client, folder):
    assert client("api.whoami()['name']") == "tester"  # over a connection that stays open
    hub.down()
    seen = len(hub.requests)
    assert "ConnectError" in client("api.whoami()")
    (folder / "README.md").unlink()  # cards are checked by a request that the client does not repeat
    client.start(upload(folder))
    time.sleep(0.3)
    assert hub.requests[seen:] == []
    hub.up()
    assert client.result() == repo.shas[-1] and repo.files == contents(folder)


def test_down_ends_what_is_under_way(hub, repo, client, folder):
    (folder / "README.md").unlink()
    hub.faults.append(Fault("POST .*preupload", "slow", seconds=0.5))
    seen = len(hub.requests)
    client.start(upload(folder))
    while not requests(hub, "preupload", seen):
        time.sleep(0.01)
    hub.down()
    hub.up()
    assert client.result() == repo.shas[-1]
    assert len(requests(hub, "preupload", seen)) == 2
