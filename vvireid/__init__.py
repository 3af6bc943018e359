"""The files of this repository as one importable name, for scripts that lie elsewhere.

    pip install -e .                                          once, in the repository
    from vvireid.evaluate import load_run, embed_images       anywhere

The files beside this folder are scripts, and import one another by bare names: data, model, train.
Installed under such names they would get in the way of everybody's own. So `vvireid.data` is
data.py, and where one of our files says `import data`, it gets `vvireid.data`; for all other code
`data` means what it meant before.

Ours, not the papers': all of it.
"""
import builtins
import importlib
import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
__path__ = [ROOT]    # where vvireid.data is looked for
OURS = {file.removesuffix(".py") for file in os.listdir(ROOT) if file.endswith(".py")} | {"support"}


def import_ours(name, globals=None, locals=None, fromlist=(), level=0):
    """Python's __import__, as our files have it: bare names of ours mean those in this package."""
    if level or name.partition(".")[0] not in OURS:
        return builtins.__import__(name, globals, locals, fromlist, level)
    whole = f"{__name__}.{name}"
    if fromlist:    # from data import Tracklet
        return builtins.__import__(whole, globals, locals, fromlist)
    return importlib.import_module(whole)    # import data


class Loader(SourceFileLoader):
    def exec_module(self, module):
        module.__builtins__ = {**vars(builtins), "__import__": import_ours}
        super().exec_module(module)


def import_file(name, path):
    """A file of somebody's own, such as a method's: bare names of ours mean the same in it."""
    if name not in sys.modules:
        spec = spec_from_file_location(name, path, loader=Loader(name, path))
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:    # a half of it is not to be found by the next who asks
            del sys.modules[name]
            raise
    return sys.modules[name]


class Finder:
    """Finds vvireid.* as usual, and has them loaded by Loader."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if not name.startswith(__name__ + "."):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, Finder)
