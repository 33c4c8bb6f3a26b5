"""Plans and audits for human eyes: text for terminals, HTML for notebooks.

Importing this gives `Plan` its looks: text in a terminal, printed too, HTML in a notebook.
"""

from ..ir.audit import Audit
from ..ir.plan import Plan
from .html import plan_html
from .text import audit_text, plan_text

__all__ = ["audit_text", "plan_html", "plan_text"]

Plan.__repr__ = Plan.__str__ = plan_text  # type: ignore[method-assign]
Plan._repr_html_ = plan_html  # type: ignore[attr-defined]
Audit.__repr__ = audit_text  # type: ignore[method-assign]
