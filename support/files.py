"""Files: errors that a user can act on, writing that loses nothing, the folder of a run."""
import json
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))    # of this repository


class UserError(Exception):
    """One line: what was found, what was expected, what to do. cli (options.py) prints it."""


def in_short(error, limit=120):
    """The text of an exception as one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


def read_lines(path):
    """The lines of a text file. Bytes that are not UTF-8 become U+FFFD. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read().rstrip().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); download it again") from None


def read_json(path):
    try:
        return json.loads("\n".join(read_lines(path)))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None


def integers(text):
    """"1 5.0, 7e0" -> [1, 5, 7]: some lists were exported as floats. Raises ValueError."""
    numbers = [float(word) for word in text.replace(",", " ").split()]
    if not all(number.is_integer() for number in numbers):
        raise ValueError
    return list(map(int, numbers))


def parsed(path, parse, expected):
    """[parse(line) for each line of a text file]. Raises UserError for the first wrong line."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            found.append(parse(line))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} line {number}: {line.strip()[:60]!r}; expected {expected}; "
                            "download it again") from None
    return found


def write_atomic(path, write):
    """Call write(file) with a file of a temporary name beside `path`, then os.replace: a reader
    sees the old file or the new one, whole. Raises UserError; then the old file is untouched."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk behind a RuntimeError. One of CUDA is something else.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path} cannot be written ({in_short(cause)}); the file that was there is "
                        "untouched: free some space or choose another folder") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_picture(path, picture):
    write_atomic(path, lambda file: picture.save(file, format="PNG"))


def new_run(path, stem):
    """Make the folder of a run: path, or runs/STEM-1, -2, ... -> its path. Raises UserError."""
    number = 1
    while os.path.exists(f"runs/{stem}-{number}"):
        number += 1
    folder = path or f"runs/{stem}-{number}"
    try:
        os.makedirs(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --run, or go "
                        f"on by --resume {folder}") from None
    return folder


def done(log):
    """How many epochs a log has."""
    return log[-1]["epoch"] if log else 0


def read_log(run, epochs):
    """The lines of log.jsonl up to that epoch: a run stopped before its checkpoint has one more."""
    log = map(json.loads, read_lines(f"{run}/log.jsonl"))
    return [line for line in log if line["epoch"] <= epochs]


def write_log(run, log):
    lines = "".join(f"{json.dumps(line)}\n" for line in log)
    write_atomic(f"{run}/log.jsonl", lambda file: file.write(lines.encode()))
