"""Model merging: methods whose weight is W0 + Σ c·(mask ∘) Δ, on the library's kernels.

`TaskVectors` reads a base and K fine-tuned checkpoints of it; `fold` sums all their tensors in one pass, with the
gradient of every coefficient in one more.
"""

from .adamerging import adamerging
from .adapt import Experts, agreement, entropy
from .atlas import atlas, random_parts
from .checkpoints import save_merged
from .codiemb import fusion
from .concrete import ConcreteModel, concrete
from .doge import doge
from .emr import emr
from .fold import fold
from .generated import from_generator
from .lines import block_depths, lines
from .masks import MaskedDelta
from .merged import MergedModel
from .scalearn import ScaLearn
from .self_positioning import self_positioning, slerp_coefficients
from .tall import consensus, tall_masks
from .task_arithmetic import task_arithmetic
from .ties import elected, ties
from .tinting import tinting
from .twin import TwinModel
from .vectors import TaskVectors

__all__ = [
    "ConcreteModel",
    "Experts",
    "MaskedDelta",
    "MergedModel",
    "ScaLearn",
    "TaskVectors",
    "TwinModel",
    "adamerging",
    "agreement",
    "atlas",
    "block_depths",
    "concrete",
    "consensus",
    "doge",
    "elected",
    "emr",
    "entropy",
    "fold",
    "from_generator",
    "fusion",
    "lines",
    "random_parts",
    "save_merged",
    "self_positioning",
    "slerp_coefficients",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tinting",
]
