"""What the zoo says when it cannot build what was asked."""

from __future__ import annotations


class ModelError(ValueError):
    """A model, or an option of a model, that the zoo does not have.

    The message has the shape of every error here: what failed, with the
    values; `where` the user wrote it; what to `try`.
    """

    def __init__(self, problem: str, *, where: str, hint: str) -> None:
        self.what, self.where, self.hint = problem, where, hint
        super().__init__(f"{problem}\n  where  {where}\n  try    {hint}")
