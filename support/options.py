"""The command line: a dataclass as options, methods by name, progress bars, exit codes.

    @dataclass
    class Config:
        epochs: int = option(80, "0 evaluates the untrained model", least=0, most=10_000)

    add_options(parser, Config, small)    --epochs N, with its help and its defaults
    check_ranges(config)                  every value within its limits, wherever it comes from
    cli(main)                             one line and exit code 2 for whatever a user can cause

Quick question: why does each number have a largest value? (A checkpoint is somebody else's file. A
million workers or a width of a million would take the machine before anything could be refused.)

Ours, not the papers': all of it.
"""
import argparse
import ctypes
import difflib
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import field, fields

from support.files import ROOT, UserError, in_short, printable

from tqdm import tqdm

# -------------------------------------------------------------- options ----


def option(default, help, least=None, most=None, group="method", each=int):
    """A dataclass field that becomes a command-line option, with its advice, the smallest and the
    largest value that can work, and the group under which --help lists it. each: the type of a
    tuple's elements."""
    metadata = {"help": help, "least": least, "most": most, "group": group, "each": each}
    return field(default=default, metadata=metadata)


def option_name(field_name):
    return "--" + field_name.replace("_", "-")


def as_typed(value):
    """A value as it would be typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value == "" else str(value)


def on_off(word):
    if word not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{word!r}; expected on or off")
    return word == "on"


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, and name the option that was probably meant."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         usage="%(prog)s [options]", **settings)

    def parse_args(self, words=None):
        found, unknown = self.parse_known_args(words)
        if unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options"
            self.error(f"{unknown[0]} is not known; {hint}")
        return found

    def print_help(self, file=None):
        say(self.format_help().rstrip())

    def error(self, message):
        raise UserError(message)


def add_options(parser, config_class, small):
    """An option for each field of a dataclass. small: what the small preset changes, {name:
    value}."""
    groups = {group.title: group for group in parser._action_groups}
    for f in fields(config_class):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = as_typed(f.default)
        if small.get(f.name, f.default) != f.default:
            default += f"; small: {as_typed(small[f.name])}"
        how = {"help": f"{f.metadata['help']} ({default})".replace("%", "%%")}
        kind = type(f.default)
        if kind is tuple:
            kind, how["nargs"] = f.metadata["each"], "*"
        if kind is bool:
            how |= {"type": on_off, "metavar": "on|off"}
        else:
            how |= {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        groups[title].add_argument(option_name(f.name), **how)


def given_options(namespace):
    """What was typed, {name: value}, lists as the tuples that a dataclass holds."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(namespace).items()}


def check_ranges(config):
    """Raises UserError for a value of another type than its default's, or beyond its limits. A
    checkpoint may hold anything: nothing is believed before this has looked at it."""
    for f in fields(config):
        value, default = getattr(config, f.name), f.default
        name = option_name(f.name)
        whole_for_float = type(default) is float and type(value) is int
        if type(value) is not type(default) and not whole_for_float:
            raise UserError(f"{name} is {in_short(repr(value), 60)}; expected "
                            f"{type(default).__name__}, as in {default!r}")
        numbers = value if isinstance(value, tuple) else (value,)
        each = f.metadata["each"]
        if isinstance(value, tuple) and not all(type(n) is each for n in numbers):
            expected = {int: "whole numbers", str: "text"}[each]
            raise UserError(f"{name} {in_short(repr(value), 60)}; expected {expected}")
        least, most = f.metadata["least"], f.metadata["most"]
        if isinstance(value, tuple) and least is not None and len(value) != len(default):
            raise UserError(f"{name} {as_typed(value)[:60]}; expected {len(default)} numbers")
        if least is None:
            continue
        # Of a nan neither is true.
        if not all(least <= n <= most for n in numbers):
            raise UserError(f"{name} {as_typed(value)[:60]}; expected {least} to {most}")


def stored_config(config_class, values, what):
    """A checkpoint's configuration {name: value} -> the dataclass, checked; what it does not say
    has its default. Raises UserError."""
    known = {f.name for f in fields(config_class)}
    values = {name: value for name, value in values.items() if name in known}
    if isinstance(values.get("data"), str):    # of one folder, in older checkpoints
        values["data"] = (values["data"],)
    config = config_class(**values)
    try:
        check_ranges(config)
        config.check()
    except UserError as error:
        raise UserError(f"{what} has a configuration that cannot be used: {error}") from None
    return config


# ------------------------------------------------------- code of one's own ----

PACKAGE = __name__.removesuffix("support.options")    # "", or "vvireid.", where we are part of it
METHODS = {"dinogrl": "model.py:DinoGRL", "lsmrl": "lsmrl.py:LSMRL"}


@contextmanager
def one_line(what, path):
    """Whatever is raised in here becomes a UserError that begins with `what`, and says in which
    line of the file of one's own at `path`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:    # whatever a stranger's code may raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{what}: {path}{where} raised {type(error).__name__}: {in_short(error)}; "
                        "mend it there") from error


def load_own(option, name, expected):
    """FILE.py:NAME, given for an option -> the path of FILE.py, and what it defines as NAME or
    None. Raises UserError, which may say what was `expected`.

    It runs that file. The file's folder is where its own imports are looked for."""
    what = f"{option} {name}"
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not attribute.isidentifier():
        raise UserError(f"{what} is not known; expected {expected}")
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{what}: no file {path}; check the path")
    folder, file = os.path.split(path)
    for where in (folder,) if PACKAGE else (ROOT, folder):
        if where not in sys.path:
            sys.path.append(where)
    module_name = file.removesuffix(".py")
    if "." in module_name:
        raise UserError(f"{what}: Python cannot import {file}; give it a name of one dot")
    with one_line(what, path):
        if PACKAGE:
            module = sys.modules[PACKAGE[:-1]].import_file(module_name, path)
        else:
            module = importlib.import_module(module_name)
    found = getattr(module, "__file__", None)    # none of what is built into Python
    if not found or not os.path.samefile(found, path):
        raise UserError(f"{what}: another module is called {module_name} already "
                        f"({found or 'built-in'}); give your file another name")
    return path, getattr(module, attribute, None)


def load_method(name):
    """dinogrl, lsmrl, or FILE.py:CLASS of one's own -> the class. Raises UserError.

    A method is a torch module with the attribute Options (a dataclass of `option`s with check() and
    `small`), made by CLASS(config, classes, pretrained), and embed, forward, parameter_groups and
    warm_up_steps as in model.py."""
    if name in METHODS:
        file, class_name = METHODS[name].split(".py:")
        return getattr(importlib.import_module(PACKAGE + file), class_name)
    known = f"{', '.join(METHODS)}, or FILE.py:CLASS of your own"
    path, method = load_own("--method", name, known)
    if not hasattr(method, "Options"):
        class_name = name.rpartition(":")[2]
        what = f"no class {class_name}" if method is None else f"{class_name} without Options"
        raise UserError(f"--method {name}: {path} has {what}; expected a method's class, such as "
                        "one derived from DinoGRL or LSMRL")
    return method


# ------------------------------------------------------------- terminal ----

def say(text=""):
    """print, to a standard output that may have gone. Raises UserError that names it."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Or Python would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        closed = isinstance(error, BrokenPipeError)
        reason = "whoever read it has gone (| head?)" if closed else error
        raise UserError(f"standard output cannot be written: {reason}; the files of the run are "
                        "written before anything is printed") from None


def tell(text):
    """A line on standard error, past open bars. Nothing stops where nobody listens."""
    try:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass


BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
PATIENCE = 60    # seconds after which a log gets a line of a bar's next tenth


class Bar:
    """A progress bar. On a terminal a line that changes; in a file or a pipe a line at its end, if
    it is to be kept, and one for each tenth of it that comes a minute after the last line."""

    def __init__(self, desc, total, *, keep=False, hidden=False):
        self.desc, self.total, self.keep, self.hidden = desc, total, keep, hidden
        self.done, self.tenth, self.note = 0, 0, ""
        self.began = self.spoke = time.monotonic()
        self.bar = None
        if not hidden and sys.stderr is not None and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=desc, bar_format=BAR, leave=keep, dynamic_ncols=True)

    def update(self, number=1, note=""):
        """number: of steps that are done since; note: what stands behind the count."""
        self.done += number
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(number)
            return
        tenth = 10 * self.done // max(1, self.total)
        now = time.monotonic()
        if tenth > self.tenth and self.done < self.total and now - self.spoke > PATIENCE:
            self._line()
            self.spoke = now
        self.tenth = tenth

    def close(self):
        if self.bar is not None:
            self.bar.close()
        elif self.keep:
            self._line()

    def _line(self):
        if not self.hidden:
            elapsed = time.monotonic() - self.began
            tell(tqdm.format_meter(self.done, self.total, elapsed, bar_format=BAR, prefix=self.desc,
                                   postfix=self.note))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is None:
            self.close()
        elif self.bar is not None:
            self.bar.close()


def progress(items, desc, total=None):
    """The items, one after the other, with a bar beside them."""
    with Bar(desc, len(items) if total is None else total) as bar:
        for item in items:
            yield item
            bar.update()


# ----------------------------------------------------------- exit codes ----

def keep_memory():
    """Asks glibc to keep freed memory for the next step: handing 100 MB back to the system and
    asking for them again costs a CPU a quarter of its time."""
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2 ** 31 - 1)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)
        libc.mallopt(top_pad, 2 ** 28)
    except (OSError, AttributeError, TypeError):    # another C library: only slower
        pass


def fill_standard_streams():
    """A standard stream that is closed is replaced by /dev/null: the next file that is opened would
    take its place and get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)    # gets the lowest number that is free
            os.set_inheritable(opened, True)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")    # a file's name may be no text


def is_torchrun_s():
    """Has torchrun started this process?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_of_process():
    """This process's number among torchrun's, 0 where it is alone."""
    return int(os.environ["RANK"]) if is_torchrun_s() else 0


def take_turn():
    """torchrun ends all processes when the first one ends: what all have to say is said once, by
    the first, if the others wait a little."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(2 * rank_of_process())


def do_nothing(*arguments):
    pass


def stop_politely(number, frame):
    """SIGTERM, as a job scheduler sends it, is a Ctrl-C."""
    if hasattr(signal, "SIGCHLD"):
        # The loader processes got it too, and torch would raise that they have died.
        signal.signal(signal.SIGCHLD, do_nothing)
    raise KeyboardInterrupt


def hold_sigterm():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def release_sigterm():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def end_by_sigterm():
    """In a process that was forked: whoever forked it ends it so."""
    if signal.getsignal(signal.SIGTERM) is stop_politely:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    release_sigterm()


if hasattr(os, "register_at_fork"):
    # Python forgets a signal that comes while it forks, and the child would be waited for for ever.
    os.register_at_fork(before=hold_sigterm, after_in_parent=release_sigterm,
                        after_in_child=end_by_sigterm)


def leave_signals_to_parent():
    """For the processes of a pool: Ctrl-C reaches each one of a terminal, and whoever made the pool
    ends it. A worker that took SIGTERM for a Ctrl-C, as its parent does, might miss it and wait
    for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def what_went_wrong(error):
    """An exception -> the line that a user can act on, or None if it is a fault of ours."""
    words = in_short(error, 300)
    if isinstance(error, UserError):
        # A loader's process hands its exception on as a whole traceback, which ends with it.
        return str(error).split(f"{UserError.__module__}.UserError: ", 1)[-1].strip()
    too_many = "Too many open files" in words or "received 0 items of ancdata" in words
    if too_many:
        return "too many open files; raise the limit (ulimit -n) or lower --workers"
    if isinstance(error, OSError):
        return f"{words}; check the disk and the permissions"
    lost = ("gloo", "nccl", "peer", "socket")
    is_lost = is_torchrun_s() and any(word in words.lower() for word in lost)
    if isinstance(error, RuntimeError) and is_lost:
        return f"process {rank_of_process()} has lost the others ({words[:120]}); start again"
    if isinstance(error, RuntimeError) and "DataLoader worker" in words:
        return f"a loader process ended ({words[:160]}); expected memory for it: lower --workers"
    return None


def cli(main):
    """Runs main(): exit code 0 or what it returns; 2 and one line for whatever a user can cause;
    130 for Ctrl-C or SIGTERM."""
    fill_standard_streams()
    keep_memory()
    gc.freeze()    # whoever looked for garbage among what is imported took half a second, twice
    signal.signal(signal.SIGTERM, stop_politely)
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:    # train.py says in it how to go on
        if rank_of_process() == 0:
            tell(printable(stop) or "interrupted")
        sys.exit(130)
    except Exception as error:
        line = what_went_wrong(error)
        if line is None:
            raise
        # What is torn down halfway complains of that, after the reason has been given.
        sys.unraisablehook = do_nothing
        take_turn()
        tell("error: " + printable(line))
        sys.exit(2)
