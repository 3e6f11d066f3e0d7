"""The grader. A lesson's checks, `test_<slug>.py`, are written with the names that this package exports:

    from common.grading import close, exercise

    @exercise("1.3", points=2)
    class TestSoftmax:
        def test_sums_to_one(self, code):
            close(code.softmax(x).sum(-1), torch.ones(3), "the sum of softmax(x)")

`code` is the module under test. Checks judge a function's result, never its implementation. They compare with the
functions below, so that a failure can be explained and compared with the known mistakes.
"""

import importlib

__all__ = ["close", "elsewhere", "equal", "exercise", "holds", "refuses", "together"]


def __getattr__(name: str):
    """Import a name on first use: the runner is in this package too, and starts sooner without torch."""
    if name in __all__:
        module = "plugin" if name in ("exercise", "together") else "compare"
        return getattr(importlib.import_module(f"common.grading.{module}"), name)
    raise AttributeError(name)
