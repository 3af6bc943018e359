"""The command line: a dataclass as options, methods and readers by name, exit codes.

A field `epochs: int = option(80, "advice")` is the option --epochs; so is `epochs: int = 80`.
"""
import argparse
import importlib
import os
import sys
from dataclasses import field, fields
from functools import partial

from support.files import ROOT, UserError

from tqdm import tqdm

METHODS = {"dinogrl": "model.py:DinoGRL", "lsmrl": "lsmrl.py:LSMRL"}
# A progress bar; none where standard error is not a terminal.
progress = partial(tqdm, disable=None, leave=False)


def option(default, help, choices=None):
    """A dataclass field that becomes a command-line option. choices: its values (None: any)."""
    return field(default=default, metadata={"help": help, "choices": choices})


def as_typed(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return str(value) or "none"


def on_off(word):
    if word not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{word!r}; expected on or off")
    return word == "on"


class Parser(argparse.ArgumentParser):
    """Its errors are UserErrors."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         usage="%(prog)s [options]", **settings)

    def error(self, message):
        raise UserError(message)


def add_options(parser, options_class, defaults=(), small=()):
    """An option for each field of a dataclass. For --help alone: defaults, {name: value} in place
    of the fields' own, and small, what the small preset sets."""
    for f in fields(options_class):
        shown = as_typed(dict(defaults).get(f.name, f.default))
        if f.name in small:
            shown += f"; small: {as_typed(small[f.name])}"
        text = f"{f.metadata.get('help', '')} ({shown})".replace("%", "%%")
        how = {"type": type(f.default), **f.metadata, "help": text}
        if isinstance(f.default, tuple):
            how |= {"type": type(f.default[0]), "nargs": "*"}
        if isinstance(f.default, bool):
            how |= {"type": on_off, "metavar": "on|off"}
        parser.add_argument("--" + f.name.replace("_", "-"), **how)


def typed(parser, words=None):
    """-> {name: value} of what was typed; lists become tuples, as in a dataclass."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(parser.parse_args(words)).items()}


def configure(parser, words, config_class, method, resumed=None, start=None):
    """Add the options of a run and of its method to a parser -> both dataclasses, {name: value} of
    what was typed. resumed, start: checkpoints. What was typed overrides theirs."""
    parser.add_argument("--preset", choices=("paper", "small"), help="default: small for walkers")
    add_options(parser, config_class, method.recipe, method.small)
    own = parser.add_argument_group(f"of {method.__name__}")
    add_options(own, method.Options, {}, method.small)
    given = typed(parser, words)
    data = given.get("data")
    is_walkers = not data or os.path.isfile(f"{data}/walkers.json")
    values = method.recipe
    if resumed:
        values = resumed["config"] | resumed["options"]
    elif given.get("preset", "small" if is_walkers else "paper") == "small":
        values = values | method.small
    if start:
        values = values | start["options"] | {"size": start["config"]["size"]}
    values = values | given
    return fill(config_class, values), fill(method.Options, values), given


def early(words, *names):
    """Options that decide which other options exist -> {name: what was typed, or ""}."""
    parser = Parser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}", default="")
    return vars(parser.parse_known_args(words)[0])


def fill(options_class, values):
    """{name: value} -> the dataclass. Names that it does not have are left out."""
    return options_class(
        **{f.name: values[f.name] for f in fields(options_class) if f.name in values})


def load_own(what, name):
    """FILE.py:NAME -> what that file of yours defines as NAME. what: the option. Raises
    UserError."""
    path, _, attribute = name.rpartition(":")
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{what} {name}: no such file; expected FILE.py:NAME; check the path")
    folder, file = os.path.split(path)
    sys.path += [ROOT, folder]
    module = importlib.import_module(file.removesuffix(".py"))
    if not os.path.samefile(module.__file__, path):
        raise UserError(f"{what} {name}: {module.__file__} has this name too; rename your file")
    if not hasattr(module, attribute):
        raise UserError(f"{what} {name}: {path} does not define {attribute}; check the name")
    return getattr(module, attribute)


def load_method(name):
    """dinogrl, lsmrl, or FILE.py:CLASS -> the class. Raises UserError."""
    if name in METHODS:
        name = f"{ROOT}/{METHODS[name]}"
    if ":" not in name:
        raise UserError(f"--method {name} is not known; expected {', '.join(METHODS)} or "
                        "FILE.py:CLASS")
    return load_own("--method", name)


def cli(main):
    """Run main(). The exit code is what it returns, 2 after a UserError, 130 after Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:    # its message says how to continue
        line, code = str(stop) or "interrupted", 130
    except UserError as error:
        # From a loader process it comes as a whole traceback, which ends with the line.
        line, code = "error: " + str(error).split("UserError: ")[-1].strip(), 2
    print(line, file=sys.stderr)
    sys.exit(code)
