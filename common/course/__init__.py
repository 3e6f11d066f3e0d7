"""The lessons: which there are, where their files are, and which file `solutions.<slug>` stands for."""

from common.course.exercises import to_do, unfinished
from common.course.lessons import (
    GAINS,
    LESSONS,
    MODULES,
    ROOT,
    WITHHELD,
    CourseError,
    Lesson,
    counted,
    first_line,
    lesson,
    modules_of,
    shown,
)
from common.course.modules import (
    MODULES_VARIABLE,
    UnfinishedModule,
    activate,
    choose_modules,
    files_used,
    install_finder,
    parse_mine,
    substitutes,
    whose,
    withheld,
)
