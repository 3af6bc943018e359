"""Files: errors that a user can act on, reading and writing that loses nothing, a run's folder.

    raise UserError("what was found; what was expected; what to do")
    write_atomic(path, write)      the old file or the new one, never half of it
    RunFolder(path).claim(...)     one run at a time, whose files nobody overwrites

Quick question: why write to another name first, and then rename? (A rename is one step for the
system: whoever is killed in the middle leaves the old file, whole, and a leftover beside it.)

Ours, not the papers': all of it.
"""
import json
import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))    # of this repository


class UserError(Exception):
    """Anything a user can cause or cure: one line that says what was found, what was expected and
    what to do."""


def printable(text):
    """Text as one line for a terminal: control characters, line breaks and bytes that are no text
    are escaped. A file's name may hold any of them, and a terminal would obey it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def in_short(error, limit=120):
    """What an exception says, in one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


# --------------------------------------------------------------- reading ----

def read_lines(path):
    """A text file's lines. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read().rstrip().splitlines()
    except FileNotFoundError:
        raise UserError(f"no file {path}; it belongs to the dataset: see docs/data.md") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); download it again") from None


# --------------------------------------------------------------- writing ----

def temporary_name(path):
    """Beside `path`, so that a rename is enough; with the writer's number, so that two do not
    meet."""
    return f"{path}.{os.getpid()}.tmp"


def write_atomic(path, write):
    """write(file) to a temporary name beside `path`, then os.replace: a reader sees the old file or
    the new one, whole. Raises UserError; then the old file is untouched."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({in_short(error)}); what stood there before is "
                        "untouched: free some space or choose another folder") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_picture(path, picture):
    """picture: a PIL image; written as PNG."""
    write_atomic(path, lambda file: picture.save(file, format="PNG"))


def check_writable(path):
    """Raises UserError if no file could be written at `path`: asked before the work, not after
    it."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder} for {path}; make it first")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no file; choose another name")
    try:
        open(temporary_name(path), "wb").close()
        os.remove(temporary_name(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({in_short(error)}); choose another "
                        "folder") from None


# ----------------------------------------------------------- a run's folder ----

def try_lock(file):
    """Locks an open file until it is closed or its process ends -> False if another process has
    it."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            # Not flock: loader processes would inherit it, and hold it after a killed run's end.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:    # a file system without locks: nobody can have one
        return True
    return True


class RunFolder:
    """Where a run lives: config.json, log.jsonl (a line an epoch), last.pt, results.json, pictures.

    `lock` is held while the run is alive; the system drops it with the process, however that ends,
    so that a dead run's lock is no obstacle.

    path: None for a new folder runs/STEM-N. resume: the folder of the run that is gone on with, or
    None."""

    CONFIG, LOG, CHECKPOINT, LOCK = "config.json", "log.jsonl", "last.pt", "lock"
    # What write_atomic was writing when a run was killed.
    LEFTOVER = re.compile(r"(config\.json|log\.jsonl|last\.pt|results\.json|.*\.png)\.\d+\.tmp")

    def __init__(self, path, resume=None):
        self.path, self.resume, self.log, self.lock = path, resume, [], None
        self.whole_epochs = 0    # that the checkpoint holds

    def file(self, name):
        return os.path.join(self.path, name)

    @property
    def is_resumed(self):
        """Does the run go on where it was, and not in another folder?"""
        if not self.resume or not os.path.exists(self.path):
            return False
        return os.path.samefile(self.path, self.resume)

    def is_alive(self):
        """Has another process the lock? Not to be asked of a run of one's own: the system drops a
        process's lock when it closes the file, however often that is open."""
        path = self.file(self.LOCK)
        if not os.path.exists(path):
            return False
        with open(path, "a") as file:
            return not try_lock(file)

    def check(self):
        """Raises UserError if the folder cannot be taken; writes nothing."""
        if self.path is None or self.is_resumed:
            return
        try:
            names = set(os.listdir(self.path)) if os.path.lexists(self.path) else set()
        except OSError as error:
            raise UserError(f"{self.path} cannot be used ({error}); choose another --run") from None
        # These alone are left by a run that was stopped before its first checkpoint.
        names = {name for name in names if not self.LEFTOVER.fullmatch(name)}
        if names - {self.CONFIG, self.LOCK}:
            go_on = ""
            if self.CHECKPOINT in names:
                go_on = f", or go on with it by --resume {self.path}"
            raise UserError(f"{self.path} is not empty; choose another --run{go_on}")
        above = os.path.abspath(self.path)
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above) or not os.access(above, os.W_OK):
            raise UserError(f"{self.path} cannot be made in {above}; choose another --run")

    def claim(self, stem, whole_epochs):
        """Makes the folder, locks it and reads the log of the `whole_epochs` that are done. Raises
        UserError if it holds another run, or one that is alive."""
        try:
            if self.path is None:
                self.path = self._make_new(stem)
            os.makedirs(self.path, exist_ok=True)
            self.lock = open(self.file(self.LOCK), "a")    # noqa: SIM115 - open while the run lives
        except OSError as error:
            raise UserError(f"{self.path} cannot be used ({error}); choose another --run") from None
        if not try_lock(self.lock):
            raise UserError(f"{self.path} belongs to a run that is alive; wait for it, stop it, or "
                            "choose another --run")
        self.check()    # again, now that nobody else can change it
        for name in os.listdir(self.path):
            if self.LEFTOVER.fullmatch(name):
                os.remove(self.file(name))
        self.whole_epochs = whole_epochs
        if self.is_resumed:
            self._read_log()

    def _make_new(self, stem):
        os.makedirs("runs", exist_ok=True)
        number = 1
        while True:
            path = os.path.join("runs", f"{stem}-{number}")
            try:
                os.mkdir(path)    # fails where it exists: two runs that start at once get two
                return path
            except FileExistsError:
                number += 1

    def _read_log(self):
        path = self.file(self.LOG)
        if not os.path.exists(path):
            return
        try:
            lines = [json.loads(line) for line in read_lines(path)]
            # A run that was killed between its log and its checkpoint has a line more.
            self.log = [line for line in lines if line["epoch"] <= self.whole_epochs]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} has a line that is none ({type(error).__name__}: "
                            f"{in_short(error, 80)}); expected one JSON object an epoch; remove "
                            "that line") from None

    def write_log(self):
        lines = "".join(f"{json.dumps(line)}\n" for line in self.log)
        write_atomic(self.file(self.LOG), lambda file: file.write(lines.encode()))
