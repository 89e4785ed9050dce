"""Python starts with this where its folder is on the path: PyTorch cannot be found, as if it were not installed."""

import sys
from importlib.machinery import ModuleSpec, PathFinder


class WithoutTorch(PathFinder):
    """Finds every module but `torch`."""

    @classmethod
    def find_spec(cls, name, path=None, target=None) -> ModuleSpec | None:
        return None if name == "torch" else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
