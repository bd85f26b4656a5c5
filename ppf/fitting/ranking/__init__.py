"""Rankings: which unit of a sub-layer goes first, whatever the policy."""

from .scores import AUTO, RANKINGS, check_ranking, rank_layer, ranking_named

__all__ = ["AUTO", "RANKINGS", "check_ranking", "rank_layer", "ranking_named"]
