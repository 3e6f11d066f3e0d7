"""`PDB=1 make test-N.M`: in the debugger."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common.course import ROOT


@pytest.mark.slow
def test_leaving_the_debugger_ends_the_checks_and_none_of_them_has_passed():
    command = [sys.executable, "-m", "common", "test-exercise", "1.3"]
    environment = os.environ | {"PDB": "1", "SOLUTION": "1", "COURSE_PYTHON": "here"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input="p scores.shape\nq\n", text=True, capture_output=True
    )
    assert done.returncode and "torch.Size" in done.stdout and "passed" not in done.stdout, done.stdout + done.stderr
