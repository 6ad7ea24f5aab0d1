"""How a block is decoded: one small frozen dataclass per method.

Thresholds are leaves of the pytree, so another value doesn't compile again; what changes the computation is static.
"""

from flax import struct

from dmax_jax.errors import InputError

EMBEDDINGS = ("soft", "unnormalised", "hard")
STOP_RULES = ("either", "consistency", "confidence", "never")


def _within_unit(name: str, value: float) -> None:
    if isinstance(value, int | float) and not 0 <= value <= 1:  # under jit it is a tracer, checked before
        raise InputError(f"{name}={value} is not within 0 to 1")


@struct.dataclass
class Policy:
    """What all methods share.

    temperature: 0 takes the most probable token; above 0 a token is drawn from softmax(logits / temperature), and its
    confidence is its probability at temperature 1.
    fill_leftover_masks: positions still masked when their block ends get their best non-mask token. The official code
    leaves the mask tokens in the output.
    max_steps: forwards after which a block is left whether it has stopped or not; its length is the most in any case.
    """

    max_steps: int | None = None
    temperature: float = struct.field(default=0.0, pytree_node=False)
    fill_leftover_masks: bool = struct.field(default=True, pytree_node=False)

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must be a number of at least 0")
        if isinstance(self.max_steps, int) and self.max_steps < 1:
            raise InputError(f"max_steps={self.max_steps} must be at least 1")


@struct.dataclass
class SpdPolicy(Policy):
    """Soft Parallel Decoding (paper, section 3.3): promotion threshold tau and acceptance threshold.

    The static fields switch parts of the method off, for the paper's ablations (Tables 3 and 4).
    """

    threshold: float = 0.5
    accept_threshold: float = 0.9
    contiguous_prefix: bool = struct.field(default=True, pytree_node=False)  # off: promote wherever tau is reached
    embedding: str = struct.field(default="soft", pytree_node=False)  # soft | unnormalised (Eq. 9 alone) | hard
    stop: str = struct.field(default="either", pytree_node=False)  # either | consistency | confidence | never

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("embedding", EMBEDDINGS), ("stop", STOP_RULES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")
        _within_unit("threshold", self.threshold)
        _within_unit("accept_threshold", self.accept_threshold)


@struct.dataclass
class ThresholdPolicy(Policy):
    """Commits every masked position at or above the threshold, at least the best one; committed tokens are final."""

    threshold: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        _within_unit("threshold", self.threshold)


@struct.dataclass
class HierarchicalPolicy(ThresholdPolicy):
    """Also commits the best position of each contiguous masked run if it is above the low threshold."""

    low_threshold: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        _within_unit("low_threshold", self.low_threshold)


@struct.dataclass
class CreditPolicy(ThresholdPolicy):
    """Threshold decoding of logits that a decayed sum of earlier top-1 confidences has raised."""

    alpha: float = 0.7  # weight of the logarithm of the credit
    gamma: float = 0.2  # exponent of a confidence before it is added
    decay: float = 0.8  # of the credit per step

    def __post_init__(self):
        super().__post_init__()
        _within_unit("decay", self.decay)
