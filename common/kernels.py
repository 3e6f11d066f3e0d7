"""Fast paths beside the exercises' plain ones. (To come.)"""


def enabled() -> bool:
    return False
