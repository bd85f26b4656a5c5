"""Tasks that people judge models by (ARC, HellaSwag, LAMBADA, gsm8k, …), scored by lm_eval; see docs/tasks.md."""

from .harness import Tasks, require_lm_eval

__all__ = ["Tasks", "require_lm_eval"]
