"""A worker's start: `python -m common.workers package.module:function` calls the function under a lifeline."""

import importlib
import sys

from common.workers.lifeline import hold

if __name__ == "__main__":
    hold()
    module, _, function = sys.argv.pop(1).partition(":")
    getattr(importlib.import_module(module), function)()
