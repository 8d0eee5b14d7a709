"""What is minimised: the weights of the two losses, the support and the divergence."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_kd.errors import NemoKDError
from nemo_kd.loss.divergences import DIVERGENCES
from nemo_kd.loss.names import DIVERGENCE_ALIASES, SUPPORT_ALIASES, check_name
from nemo_kd.loss.supports import SUPPORTS

DEFAULT_ALPHA = 0.9  # the best of docs/results.md
MAX_TEMPERATURE = 100.0
"""The divergence is multiplied by T², and float32's rounding of it too: 0.001 nats at 100, 0.1 at
1000, noise above."""


@dataclass(frozen=True)
class KDConfig:
    """loss = (1 - alpha) · CE + alpha · T² · D(teacher, student), each token, in nats.

    Errors: NemoKDError on construction for values that do not exist, exclude each other, or make
    the divergence infinite.
    """

    alpha: float | None = None
    """Weight of the distillation in [0, 1]; None means 0.9 unless the weights below are given."""
    sft_weight: float | None = None
    """Instead of `alpha`: the weight of the cross-entropy; 1 if only `kd_weight` is given."""
    kd_weight: float | None = None
    """Instead of `alpha`: the weight of the distillation; 1 if only `sft_weight` is given."""
    support: str = "bucket"
    """`bucket`, `vocab` or `topk`: what the K stored values are compared over."""
    divergence: str = "forward_kl"
    """`forward_kl`, `reverse_kl`, `jsd`, `skew_forward_kl`, `skew_reverse_kl` or
    `total_variation`."""
    beta: float = 0.5
    """The teacher's weight in the mixture of `jsd`, in (0, 1)."""
    skew: float = 0.1
    """The share mixed in by `skew_forward_kl` and `skew_reverse_kl`, in (0, 1)."""
    temperature: float = 1.0
    """Divides both models' logits; the divergence is multiplied by its square."""
    positions: str = "all"
    """Where the distillation is learned: `all` answer tokens, or `top_entropy(SHARE)`, that share
    in (0, 1] of a micro-batch's where the student's entropy is largest."""
    count_padding: bool = False
    """Let the vocabulary's padding columns into the student's softmax, as NeMo's loss does."""

    def __post_init__(self) -> None:
        check_name("support", self.support, SUPPORTS, SUPPORT_ALIASES)
        check_name("divergence", self.divergence, DIVERGENCES, DIVERGENCE_ALIASES)
        self._check_weights()
        for name in ("beta", "skew"):
            if not 0 < getattr(self, name) < 1:
                raise NemoKDError(
                    f"{name} is {getattr(self, name)}: expected a value inside (0, 1). "
                    "The limits are `forward_kl` and `reverse_kl`."
                )
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise NemoKDError(
                f"temperature is {self.temperature}: expected a value > 0 and at most "
                f"{MAX_TEMPERATURE:g}."
            )
        _ = self.share
        if self.support == "vocab" and DIVERGENCES[self.divergence].needs_teacher_everywhere:
            raise NemoKDError(
                f"divergence {self.divergence!r} is infinite on support 'vocab', where the teacher "
                "has no mass outside its K: use support 'bucket' or 'topk', or 'skew_reverse_kl'."
            )

    @property
    def weights(self) -> tuple[float, float]:
        """(weight of the cross-entropy, weight of the distillation)."""
        if self.sft_weight is not None or self.kd_weight is not None:
            sft, kd = self.sft_weight, self.kd_weight
            return (1.0 if sft is None else sft, 1.0 if kd is None else kd)
        alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        return 1 - alpha, alpha

    @property
    def share(self) -> float:
        """The share of the answer tokens that the distillation is learned at; 1: all."""
        if self.positions == "all":
            return 1.0
        name, _, rest = self.positions.partition("(")
        try:
            share = float(rest.removesuffix(")")) if rest.endswith(")") else 0.0
        except ValueError:
            share = 0.0
        if name != "top_entropy" or not 0 < share <= 1:
            raise NemoKDError(
                f"positions is {self.positions!r}: expected all, or top_entropy(SHARE) with a "
                "share in (0, 1], as top_entropy(0.2)."
            )
        return share

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that need a log-sum-exp: 1 for the cross-entropy, then the KD's."""
        return (1.0,) if self.temperature == 1 else (1.0, self.temperature)

    def _check_weights(self) -> None:
        explicit = {"sft_weight": self.sft_weight, "kd_weight": self.kd_weight}
        given = {name: weight for name, weight in explicit.items() if weight is not None}
        if self.alpha is not None and given:
            raise NemoKDError(
                f"alpha = {self.alpha} and {given} are both given: use alpha, or sft_weight and "
                "kd_weight."
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise NemoKDError(f"alpha is {self.alpha}: expected a value in [0, 1].")
        for name, weight in given.items():
            if not 0 <= weight < float("inf"):
                raise NemoKDError(f"{name} is {weight}: expected a finite value >= 0.")
        if not any(self.weights):
            raise NemoKDError("sft_weight and kd_weight are both 0: nothing would be learned.")
