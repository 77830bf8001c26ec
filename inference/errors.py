"""The one exception that means "the user can mend this": a single line on what was wrong and what to do."""


class UserError(Exception):
    """A mistake in a command, a prompt or a checkpoint. Scripts print it as `error: …` and exit with status 2."""


class Damage(UserError):
    """What is wrong with a checkpoint: a whole line for people, and its place and facts apart for programs."""

    def __init__(self, text: str, file: object = None, tensor: str = "", expected: object = None, found: object = None):
        super().__init__(text)
        self.file, self.tensor, self.expected, self.found = file, tensor, expected, found
