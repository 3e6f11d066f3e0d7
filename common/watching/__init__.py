"""Watch an engine run: a recorder around it, its trace, and a page that replays the trace."""

from common.watching.recorder import recording
from common.watching.trace import Trace, read_trace, totals
