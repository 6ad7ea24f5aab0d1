"""The error that a user can remedy."""


class InputError(ValueError):
    """A bad value, file or combination; its one-line text names the problem and the remedy.

    Commands print it and exit with code 2; anything else that is raised is a defect and keeps its traceback.
    """
