"""Small pieces for training TAPS in any loop, and the plain recipe of ``python -m taps_fast train``.

The rest is in `TapsModel`: a task's parameter groups (`task_parameters`), its `penalty`, joint training (`train_base`).
"""

from .pieces import GateLog, Point, accumulate, penalty_weight, tradeoff

__all__ = ["GateLog", "Point", "accumulate", "penalty_weight", "tradeoff"]
