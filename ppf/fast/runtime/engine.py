"""One model's runtime: its plan, the memory of its caches, and the sessions (with their graphs) it keeps ready."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch

from .plan import Plan
from .session import Session
from .storage import Storage

# Sessions kept, each with a graph: some shapes of requests and, for an elastic model, some policies.
MAX_SESSIONS = 16
# Cache lengths are rounded up to this many positions, so that requests of similar length share a session.
POSITION_STEP = 256


class Engine:
    """Sessions of one model, the most recently used ones kept. ``lock`` is held while one of them generates."""

    def __init__(self, plan: Plan, groups: tuple[int, ...] | None = None):
        """``groups``: the most kv-groups a plan of this model may have in each layer; by default those of ``plan``."""
        self._storage = Storage(groups or plan.groups, plan.head_dim, plan.dtype, plan.device)
        self._sessions: OrderedDict[tuple[Plan, int, int], Session] = OrderedDict()
        self.lock = threading.Lock()

    def session(self, plan: Plan, batch: int, positions: int) -> Session:
        """A session for ``batch`` sequences of ``positions`` tokens, its graph recorded."""
        # Buffers made inside torch.inference_mode() could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self._session(plan, batch, positions)

    def _session(self, plan: Plan, batch: int, positions: int) -> Session:
        positions = -(-positions // POSITION_STEP) * POSITION_STEP
        if self._storage.reserve(batch * positions):
            self._sessions.clear()
        key = (plan, batch, positions)
        if key not in self._sessions:
            session = Session(plan, self._storage, batch, positions)
            session.capture()
            self._sessions[key] = session
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def forget(self, plan: Plan) -> None:
        """Drop the sessions of ``plan``."""
        for key in [key for key in self._sessions if key[0] is plan]:
            del self._sessions[key]
