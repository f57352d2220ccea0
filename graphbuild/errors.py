"""The errors users meet: each says what is wrong and what to do next, and knows the command's exit code.

None says what stands in a URL for a password (`public`).
"""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^\s/?#@]*@", re.I)
_QUERY = re.compile(r"""(https?://(?:(?!https?://)[^?\n])*) \?\S+? (?=[)\]},.:;'"]*(?:\s|$|,\w+://))""", re.I | re.X)


def public(text: str) -> str:
    """A text, path or URL without the user's name in URLs and the query of HTTP's, which may be a signature or token.

    Whatever outlasts a command or is shown holds URLs in this form: records, names of files, messages, logs.
    """
    return _QUERY.sub(r"\1", _USER.sub("", text)) if "://" in text else text


def install_extra(extra: str) -> str:
    """The command that installs an extra: from the clone, as no package index is known to have this project."""
    return f"pip install '.[{extra}]' in the folder of graphbuild's clone"


class GraphbuildError(Exception):
    """Base of all deliberate failures. `cause` names the file, row or option; `fix` is the next step."""

    exit_code = 1

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(public(cause), public(fix))
        self.cause, self.fix = self.args

    def __str__(self) -> str:
        return f"{self.cause}\n  -> {self.fix}" if self.fix else self.cause


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


class ImageError(InputError):
    """An image that cannot be used; `cause` is the reason, without the image's name."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause, "replace the image, or leave it out")


class ConfigError(GraphbuildError):
    """An option or recipe field is wrong, or differs from what the store was built with.

    `fix` may be empty as a ShardError's may: a worker refuses a state of other options.
    """

    exit_code = 2

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(cause, fix)


class StageError(GraphbuildError):
    """A stage could not be finished; what was finished is kept."""


class StorageError(StageError):
    """A server did not answer, or a disk is full: nothing is wrong with the content, and trying again may help."""


class QualityError(GraphbuildError):
    """The result was built but misses a promised floor, such as recall."""
