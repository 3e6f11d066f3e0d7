"""The grader: what a lesson's `test_<slug>.py` is written with.

    from common.grading import close, exercise

    @exercise("1.3", points=2)
    class TestSoftmax:
        def test_sums_to_one(self, code):
            close(code.softmax(x).sum(-1), torch.ones(3), "the sum of softmax(x)")

`code` is the module under test. Checks judge what a function gives, never how; each compares by the functions below,
so that a failure can be explained and set beside the known mistakes.
"""

from common.grading.compare import close, equal, holds, refuses
from common.grading.marks import exercise, together

__all__ = ["close", "equal", "exercise", "holds", "refuses", "together"]
