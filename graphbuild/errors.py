"""The errors users meet: each says what is wrong and what to do next, and knows the command's exit code."""

from __future__ import annotations


class GraphbuildError(Exception):
    """Base of all deliberate failures. `cause` names the file, row or option; `fix` is the next step."""

    exit_code = 1

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.cause}\n  -> {self.fix}"


class InputError(GraphbuildError):
    """A file that graphbuild was given is missing, malformed or does not fit the others."""

    exit_code = 2


class ShardError(InputError):
    """A tar and its sidecar are missing, damaged, or do not belong together.

    torch's DataLoader rebuilds an exception of a worker process from its text alone, so `fix` may be empty
    here: the text of the rebuilt error already holds it.
    """

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(cause, fix)

    def __str__(self) -> str:
        return super().__str__() if self.fix else self.cause


class ImageError(InputError):
    """An image that cannot be used; `cause` is the reason, without the image's name."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause, "replace the image, or leave it out")


class ConfigError(GraphbuildError):
    """An option or recipe field is wrong, or differs from what the store was built with."""

    exit_code = 2


class StageError(GraphbuildError):
    """A stage could not be finished; what was finished is kept."""


class StorageError(StageError):
    """A server did not answer, or a disk is full: nothing is wrong with the content, and trying again may help."""


class QualityError(GraphbuildError):
    """The result was built but misses a promised floor, such as recall."""
