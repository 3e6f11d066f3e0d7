"""`python -m common.workers package.module:function` calls the function; the process ends with its parent's."""

import sys
from pkgutil import resolve_name

from common.workers.lifeline import hold

if __name__ == "__main__":
    hold()
    resolve_name(sys.argv.pop(1))()
