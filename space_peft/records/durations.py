"""How long something took, as people say it."""


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, whichever has few digits.

    Args:
        seconds (`float`): The time.
    """
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
