"""A worker's start: `python -m common.workers package.module:function` calls the function under a lifeline."""

import sys

from common.workers.calls import find
from common.workers.lifeline import hold

if __name__ == "__main__":
    hold()
    find(sys.argv.pop(1))()
