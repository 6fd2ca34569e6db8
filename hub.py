"""The Hugging Face Hub: the repository of a run, uploads while it goes on, and checkpoints to resume from.

    Hub                 a run's repository: `open`, `add` a checkpoint, `push_result`
    fetch_newest        what --resume_from_checkpoint hub asks for
    fetch_checkpoint    what --resume_from_checkpoint OWNER/NAME asks for

Checkpoints go up in a thread and never disturb the run: what fails is tried again, and what can't be mended by that is
reported once. Only the main process has a `Hub`.
"""

import json
import os
import re
import shlex
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import count
from pathlib import Path

from huggingface_hub import HfApi, RepoFolder, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, get_session
from huggingface_hub.utils.logging import set_verbosity_error
from tqdm.auto import tqdm

import interruption
from arguments import (
    LAST_WORK,
    STATE_FILE,
    NotUploaded,
    UserError,
    all_checkpoints,
    checkpoint_step,
    complete_checkpoints,
    first_line,
    read_training_state,
)
from model_checks import is_folder_name


AT_START = (1, 2, 4)  # seconds between attempts
AT_END = (1, 2, 4, 8, 16, 32, 60)
AFTER_A_SIGNAL = (1, 2, 4)
LAST_ATTEMPT, LAST_AFTER_A_SIGNAL = 180, 15  # seconds from the first of them on
LONGEST_WAIT = 300  # while training goes on
CONNECTING, ANSWER = 10, 300  # seconds for which nothing may come; the client itself would wait for ever
LORA_FILES = ["pytorch_lora_weights*.safetensors", "non_ema/*"]


class Hub:
    """The repository to which a run's result goes and, with --hub_strategy, its checkpoints.

    Raises UserError if there is no writing to it; if it is out of reach, only a resumed run goes on.
    """

    def __init__(self, args):
        self.args, self.api, self.is_open = args, HfApi(token=args.hub_token), False
        args.hub_model_id = args.hub_model_id or default_name(args)
        self._waiting, self._current = deque(), None  # folders
        self._change, self._closing, self._thread = threading.Condition(), False, None
        self.uploaded, self.missing = set(), []  # names of checkpoints; folders of those that are not on the Hub
        self.was_left = False  # an upload, which then goes on in threads of the client's
        LAST_WORK.append(self.close)
        try:
            persist(self.open, AT_START)
        except UserError as error:
            if not (args.resume_from_checkpoint and may_pass(error)):
                raise
            print(f"{error} The run goes on, and so do the attempts.", file=sys.stderr)
        base = args.pretrained_model_name_or_path
        if base is not None and not is_folder_name(base):  # its license, should it be out of reach at the end
            with suppress(Exception):
                hf_hub_download(base, "README.md", revision=args.revision, cache_dir=args.cache_dir)

    def open(self):
        """Create the repository if there is none; sets `args.hub_model_id` to the full name."""
        args, name = self.args, self.args.hub_model_id
        limit_waiting()
        if self.is_open:
            self.api.model_info(name)  # out of reach, it says so at once, while an upload tries for half a minute
            return
        try:
            args.hub_model_id = self.api.create_repo(
                name, exist_ok=True, private=args.hub_private_repo or None
            ).repo_id
            # A public one that exists is found without the right to write.
            self.api.auth_check(args.hub_model_id, write=True)
            public = args.hub_private_repo and not self.api.model_info(args.hub_model_id).private
        except (HTTPError, OSError, ValueError) as error:
            remedy = "log in with `hf auth login`, give --hub_token and --hub_model_id"
            remedy = "try again later" if may_pass(error) else remedy
            raise UserError(
                f"--push_to_hub: there is no writing to the repository {name} ({reason(error, args)}): {remedy}, or "
                "leave --push_to_hub out."
            ) from error
        if public:
            raise UserError(
                f"--hub_private_repo: {args.hub_model_id} exists and is public; name another --hub_model_id."
            )
        self.is_open = True

    # Checkpoints, while training goes on

    def add(self, folder):
        """Upload a checkpoint in the background; with --hub_strategy checkpoint only the newest one matters."""
        if self.args.hub_strategy == "end":
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        with self._change:
            if self.args.hub_strategy == "checkpoint":
                self._waiting.clear()
            self._waiting.append(folder)
            self._change.notify()

    def may_remove(self, folder):
        """Not the checkpoint that is being read; one that waits for its upload waits no more."""
        with self._change:
            if folder in self._waiting:
                self._waiting.remove(folder)
                say(f"{folder} is removed before it could be uploaded (--checkpoints_total_limit).")
            return folder != self._current

    def close(self):
        """Wait for the uploads, as long as the Hub is in reach; Ctrl-C leaves them.

        Returns whether any was left, so that the process has to end without waiting for threads.
        """
        with self._change:
            self._closing = True
            self._change.notify()
            busy = self._current is not None or self._waiting
        if self._thread is None or self.was_left:
            return self.was_left
        if busy:
            say("Waiting for the upload of a checkpoint; Ctrl-C leaves it.")
        before = interruption.received()
        try:
            while self._thread.is_alive():
                self._thread.join(0.2)
                if before is None and interruption.received() == "SIGINT":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            self.was_left = True
            self.missing += [self._current, *self._waiting]
            say(f"Left.{self._how_to_upload_the_missing()}")
        return self.was_left

    def _work(self):
        disable_progress_bars()
        set_verbosity_error()  # what the client would say of each attempt
        while True:
            with self._change:
                self._current = None
                self._change.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                self._current = folder = self._waiting.popleft()
            try:
                persist(lambda: self._push_checkpoint(folder), self._waits(), self._pause, self._report)
                self.uploaded.add(folder.name)
                say(f"{folder.name} is uploaded to {self.args.hub_model_id}.")
                if self.args.hub_strategy == "checkpoint":
                    self.missing.clear()
            except BaseException as error:  # whatever it is, training goes on
                if self._superseded():
                    continue
                self.missing.append(folder)
                by_hand = upload_command(self.args, folder)
                say(f"{folder} is not uploaded ({reason(error, self.args)}); `{by_hand}` does it.")
                if self._closing:
                    with self._change:
                        self.missing += self._waiting
                        self._waiting.clear()

    def _superseded(self):
        return self.args.hub_strategy == "checkpoint" and bool(self._waiting)

    def _waits(self):
        """Seconds to wait before each new attempt: for ever while training goes on, then for a while."""
        for attempt in count():
            if self._superseded():
                return
            if self._closing:
                yield from self._last_waits()
                return
            yield min(2**attempt, LONGEST_WAIT)

    def _pause(self, seconds):
        if self._closing:
            return sleep(seconds)
        with self._change:
            self._change.wait_for(lambda: self._closing or self._superseded(), seconds)

    def _report(self, error):
        say(f"{self._current.name} is not uploaded yet ({reason(error, self.args)}): trying again.")

    def _push_checkpoint(self, folder):
        self.open()
        repo, message = {"repo_id": self.args.hub_model_id}, f"Checkpoint of step {checkpoint_step(folder)}"
        files = {"folder_path": folder, "path_in_repo": folder.name, "delete_patterns": "*"}  # what another run had
        self.api.upload_folder(**repo, **files, commit_message=message)
        for path in remote_checkpoints(self.api, **repo):
            ours = self._is_ours(path, checkpoint_step(folder))
            if path.name == folder.name or ours and self.args.hub_strategy == "all_checkpoints":
                continue
            if not ours:
                say(f"{folder.name} replaces {path.name} of another run in {repo['repo_id']}.")
            with suppress(EntryNotFoundError):
                self.api.delete_folder(path.name, **repo, commit_message=f"{message} replaces {path.name}")

    def _is_ours(self, path, step):
        """Whether a checkpoint in the repository was made on the way to this step."""
        ours = path.name in self.uploaded or self.args.resume_from_checkpoint
        return ours and checkpoint_step(path) < step

    # The result

    def push_result(self, files):
        """Upload what the patterns `files` name in the output folder; returns the address of the commit.

        Raises NotUploaded, which says how to do by hand what could not be done.
        """
        self.close()
        enable_progress_bars()
        try:
            commit = persist(lambda: self._push_result(files), self._last_waits(), sleep)
        except (Exception, KeyboardInterrupt) as error:  # whatever the network, the Hub and its storage make of it
            self.was_left |= isinstance(error, KeyboardInterrupt)
            where = self.args.output_dir
            command = upload_command(self.args, where, files)
            raise NotUploaded(
                f"the upload failed ({reason(error, self.args)}); the result is safe in {where}. When the Hub is in "
                f"reach and you are logged in (`hf auth login`): `{command}`.{self._how_to_upload_the_missing()}"
            ) from error
        if self._how_to_upload_the_missing():
            raise NotUploaded(f"the result is at {commit}.{self._how_to_upload_the_missing()}")
        return commit

    def _last_waits(self):
        started, before = time.monotonic(), interruption.received()
        limit = LAST_ATTEMPT if before is None else LAST_AFTER_A_SIGNAL
        for wait in AT_END if before is None else AFTER_A_SIGNAL:
            if interruption.received() != before or time.monotonic() - started > limit:
                return
            yield wait

    def _push_result(self, files):
        self.open()
        return self.api.upload_folder(
            repo_id=self.args.hub_model_id,
            folder_path=self.args.output_dir,
            allow_patterns=files,
            delete_patterns=replaced(files),
            commit_message="End of training",
        )

    def _how_to_upload_the_missing(self):
        folders = [folder for folder in self.missing if folder is not None and folder.is_dir()]
        if self.args.hub_strategy == "checkpoint":
            folders = folders[-1:]
        commands = [f"`{upload_command(self.args, folder)}`" for folder in folders]
        return f" What is missing: {', '.join(commands)}." if commands else ""


def say(text):
    tqdm.write(text, file=sys.stderr)


def limit_waiting():
    session = get_session()
    session.timeout = type(session.timeout)(ANSWER, connect=CONNECTING)


def sleep(seconds):
    """Until a signal comes."""
    end, before = time.monotonic() + seconds, interruption.received()
    while time.monotonic() < end and interruption.received() == before:
        time.sleep(min(seconds, 0.2))


def persist(do, waits, pause=time.sleep, report=lambda error: None):
    """What `do()` returns; if it raises what may pass, wait and try again as often as there are `waits` (seconds)."""
    waits, reported = iter(waits), False
    while True:
        try:
            return do()
        except Exception as error:
            wait = next(waits, None) if may_pass(error) else None
            if wait is None:
                raise
            if not reported:
                report(error)
                reported = True
            pause(max(wait, asked_to_wait(error)))


def causes(error):
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__


def answer(error):
    """The Hub's answer to which an error goes back, or None."""
    answers = (getattr(cause, "response", None) for cause in causes(error))
    return next((answer for answer in answers if answer is not None), None)


def may_pass(error):
    """Whether trying again can help: the network, or the Hub's own trouble."""
    if answer(error) is not None:
        return answer(error).status_code in (408, 409, 412, 429) or answer(error).status_code >= 500
    if any(isinstance(cause, (OfflineModeIsEnabled, FileNotFoundError)) for cause in causes(error)):
        return False
    # A gateway's page of HTML is no JSON.
    kinds = (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return any(isinstance(cause, kinds) for cause in causes(error))


def asked_to_wait(error):
    """Seconds that the Hub has asked for (Retry-After), 0 if it has not."""
    headers = getattr(answer(error), "headers", {})
    seconds = headers.get("Retry-After", "")
    return min(int(seconds), LONGEST_WAIT) if seconds.isdecimal() else 0


def reason(error, args):
    """The Hub's own words if it has answered, without the token."""
    *_, last = causes(error)
    words = first_line(next((cause.server_message for cause in causes(error) if has_words(cause)), last)).rstrip(".")
    for token in filter(None, (args.hub_token, os.environ.get("HF_TOKEN"))):
        words = words.replace(token, "...")
    return words


def has_words(error):
    return bool(getattr(error, "server_message", None))


def default_name(args):
    return Path(os.path.abspath(args.output_dir)).name  # the same on another machine, where a link may lead elsewhere


def upload_command(args, folder, files=()):
    """What uploads files (patterns) of the output folder, or a checkpoint, by hand."""
    inside = "." if files else folder.name
    words = ["hf", "upload", args.hub_model_id, folder, inside]
    words += [word for pattern in files for word in ("--include", pattern)]
    words += [word for pattern in replaced(files) for word in ("--delete", pattern)]
    return shlex.join(map(str, words + ["--private"] * args.hub_private_repo))


def replaced(files):
    """Patterns of what an older result may have left in the repository: other shards, variants, formats."""
    return [pattern for pattern in files if "*" in pattern] + LORA_FILES if files else []


# Going on from the Hub


def is_checkpoint_on_the_hub(name):
    """Whether --resume_from_checkpoint names a repository, or a checkpoint in one."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(/checkpoint-\d+)?", name) is not None


def fetch_newest(args):
    """The newest checkpoint in the run's own repository, to the output folder, unless one as new is there.

    All processes may call this at once. Raises UserError if the Hub is out of reach and there is no checkpoint here.
    """
    here = complete_checkpoints(args.output_dir)
    try:
        repo_id = own_repository(args)
        persist(lambda: fetch(args, repo_id, after=checkpoint_step(here[-1]) if here else -1), AT_START)
    except RepositoryNotFoundError:
        pass  # the run has not begun, or has uploaded nothing yet
    except (HTTPError, OSError, ValueError) as error:
        what = f"--resume_from_checkpoint hub: the Hub can't be asked ({reason(error, args)})"
        if not here:
            raise UserError(
                f"{what}, and there is no checkpoint in {args.output_dir}; log in with `hf auth login` or give "
                "--hub_token, or try again later."
            ) from error
        print(f"{what}; going on from {here[-1]}.", file=sys.stderr)


def fetch_checkpoint(args, name, occupied):
    """A repository's newest checkpoint, or the one that is named, to the output folder; returns its folder.

    occupied: whether a result is there. All processes may call this at once. Raises UserError.
    """
    repo_id, checkpoint = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])

    def refuse_another_run(folder):
        if occupied or any(path.name != folder.name for path in all_checkpoints(args.output_dir)):
            raise UserError(
                f"--resume_from_checkpoint {name}: --output_dir {args.output_dir} holds a run already; go on with it "
                "(--resume_from_checkpoint latest), or choose another --output_dir."
            )

    try:
        folder = persist(lambda: fetch(args, repo_id, checkpoint or None, check=refuse_another_run), AT_START)
    except UserError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--resume_from_checkpoint {name}: there is neither such a folder nor a repository in reach "
            f"({reason(error, args)}); a private one needs `hf auth login` or --hub_token."
        ) from error
    if folder is None:
        raise UserError(
            f"--resume_from_checkpoint {name}: the repository has no {checkpoint or 'checkpoint'} that is complete; "
            "--hub_strategy checkpoint uploads them."
        )
    return folder


def own_repository(args):
    limit_waiting()
    name = args.hub_model_id or default_name(args)
    return name if "/" in name else f"{HfApi(token=args.hub_token).whoami()['name']}/{name}"


def fetch(args, repo_id, checkpoint=None, after=-1, check=lambda folder: None):
    """Download a complete checkpoint: the one of this name, or the newest one of a later step than `after`.

    `check` is called with its folder before. Returns the folder, None if there is none.
    """
    limit_waiting()
    api = HfApi(token=args.hub_token)
    source = {"repo_id": repo_id, "revision": api.model_info(repo_id).sha, "token": args.hub_token}
    sizes = {item.path: item.size for item in api.list_repo_tree(**source, recursive=True) if hasattr(item, "size")}
    names = {path.split("/")[0] for path in sizes if path.endswith(f"/{STATE_FILE}")}
    paths = [path for path in map(Path, names) if checkpoint_step(path) is not None and checkpoint_step(path) > after]
    for path in sorted(paths, key=checkpoint_step, reverse=True):
        if checkpoint not in (None, path.name):
            continue
        files = listed_files(hf_hub_download(filename=f"{path}/{STATE_FILE}", **source))
        # An upload that was broken off may have left a part: large folders go up in several commits.
        if files and all(sizes.get(f"{path}/{name}") == size for name, size in files.items()):
            folder = Path(args.output_dir, path)
            check(folder)
            print(f"Downloading {path} of {repo_id}.", file=sys.stderr)
            snapshot_download(**source, allow_patterns=f"{path}/*", local_dir=args.output_dir)
            if folder not in complete_checkpoints(args.output_dir):  # the client does not always say so
                raise ConnectionError("the download was broken off")
            return folder
        print(f"{repo_id}: {path} is not complete and passed over.", file=sys.stderr)


def listed_files(state_file):
    """Name -> size of the files of a checkpoint, empty if that is not what the file says."""
    try:
        return dict(read_training_state(Path(state_file).parent)["files"])
    except (UserError, KeyError, TypeError, ValueError):
        return {}


def remote_checkpoints(api, repo_id):
    paths = (Path(item.path) for item in api.list_repo_tree(repo_id) if isinstance(item, RepoFolder))
    return [path for path in paths if checkpoint_step(path) is not None]
