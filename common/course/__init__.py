"""The lessons: the list of them, where their files are, and which file `solutions.<slug>` is."""

from common.course.exercises import unfinished
from common.course.lessons import (
    GAINS,
    LESSONS,
    MODULES,
    ROOT,
    WITHHELD,
    CourseError,
    Lesson,
    counted,
    lesson,
    modules_of,
    shown,
)
from common.course.modules import (
    MODULES_VARIABLE,
    activate,
    choose_modules,
    files_used,
    install_finder,
    parse_mine,
    substitutes,
    whose,
    withheld,
)
