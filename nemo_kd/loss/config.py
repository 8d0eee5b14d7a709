"""Settings of the loss: the weights of its two terms, the support and the divergence."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real

from nemo_kd.errors import NemoKDError
from nemo_kd.loss.divergences import DIVERGENCES
from nemo_kd.loss.names import DIVERGENCE_ALIASES, SUPPORT_ALIASES, check_name
from nemo_kd.loss.supports import SUPPORTS

DEFAULT_ALPHA = 0.9  # the best of docs/results.md
MAX_TEMPERATURE = 100.0
"""T² multiplies the divergence and its rounding error: 0.001 nats at T = 100, 0.1 at 1000."""


@dataclass(frozen=True)
class KDConfig:
    """loss = (1 - alpha) · CE + alpha · T² · D(teacher, student) per token, in nats.

    Errors: NemoKDError on construction for unknown names, values out of range, settings that
    exclude each other or have no effect, and a divergence that would be infinite.
    """

    alpha: float | None = None
    """Weight of the distillation in [0, 1]; None means 0.9 unless the weights below are given."""
    sft_weight: float | None = None
    """Instead of `alpha`: the weight of the cross-entropy; 1 if only `kd_weight` is given."""
    kd_weight: float | None = None
    """Instead of `alpha`: the weight of the distillation; 1 if only `sft_weight` is given."""
    support: str = "bucket"
    """`bucket`, `vocab` or `topk`: the outcomes that teacher and student are compared on."""
    divergence: str = "forward_kl"
    """`forward_kl`, `reverse_kl`, `jsd`, `skew_forward_kl` or `skew_reverse_kl`."""
    beta: float = 0.5
    """The teacher's weight in the mixture of `jsd`, in (0, 1)."""
    skew: float = 0.1
    """The fraction mixed in by `skew_forward_kl` and `skew_reverse_kl`, in (0, 1)."""
    temperature: float = 1.0
    """Divides both models' logits; the divergence is multiplied by its square."""
    count_padding: bool = False
    """Include the vocabulary's padding columns in the student's softmax, as NeMo's loss does."""

    def __post_init__(self) -> None:
        self._check_types()
        check_name("support", self.support, SUPPORTS, SUPPORT_ALIASES)
        check_name("divergence", self.divergence, DIVERGENCES, DIVERGENCE_ALIASES)
        self._check_weights()
        for name in ("beta", "skew"):
            if not 0 < getattr(self, name) < 1:
                raise NemoKDError(
                    f"{name} is {getattr(self, name)}: expected a value in (0, 1). "
                    "At the limits use `forward_kl` or `reverse_kl`."
                )
        self._check_parameters()
        check_temperature("temperature", self.temperature)
        if self.support == "vocab" and DIVERGENCES[self.divergence].needs_teacher_everywhere:
            raise NemoKDError(
                f"divergence {self.divergence!r} is infinite on support 'vocab', where the teacher "
                "has no mass outside its K ids: use support 'bucket' or 'topk', or divergence "
                "'skew_reverse_kl'."
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
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the student's log-sum-exp is needed: 1 (cross-entropy), then T."""
        return (1.0,) if self.temperature == 1 else (1.0, self.temperature)

    def _check_types(self) -> None:
        """Refuse a text such as "false", which would count as true, and None where it has no sense.

        A mapping read from YAML, an environment variable or argparse may contain them.
        """
        for field in fields(self):
            value, annotation = getattr(self, field.name), str(field.type)
            if value is None and annotation.endswith("| None"):
                continue
            expected = _expected(annotation.split(" ")[0], value)
            if expected:
                raise NemoKDError(f"{field.name} is {value!r}: expected {expected}")

    def _check_parameters(self) -> None:
        """Refuse a parameter of a divergence that was not selected."""
        for name, default in (("beta", KDConfig.beta), ("skew", KDConfig.skew)):
            value = getattr(self, name)
            if value == default or DIVERGENCES[self.divergence].parameter == name:
                continue
            users = [each for each, found in DIVERGENCES.items() if found.parameter == name]
            raise NemoKDError(
                f"{name} is {value}, but divergence {self.divergence!r} has no {name}: set "
                f"divergence to {' or '.join(users)}, or leave {name} at {default}"
            )

    def _check_weights(self) -> None:
        explicit = {"sft_weight": self.sft_weight, "kd_weight": self.kd_weight}
        given = {name: weight for name, weight in explicit.items() if weight is not None}
        if self.alpha is not None and given:
            raise NemoKDError(
                f"alpha = {self.alpha} and {given} are both given: use alpha, or sft_weight and "
                "kd_weight."
            )
        check_alpha("alpha", self.alpha)
        for name, weight in given.items():
            if not 0 <= weight < float("inf"):
                raise NemoKDError(f"{name} is {weight}: expected a finite value >= 0.")
        if not any(self.weights):
            raise NemoKDError("sft_weight and kd_weight are both 0: nothing would be learned.")


def _expected(kind: str, value: object) -> str:
    """Return what a field annotated as float, int or bool should be; "" if `value` is."""
    flag = type(value).__name__ in ("bool", "bool_")  # numpy's too
    if kind == "float" and (flag or not isinstance(value, Real)):
        return "a number"
    if kind == "int" and (flag or not isinstance(value, Integral)):
        return "a whole number"
    return "True or False" if kind == "bool" and not flag else ""


def check_alpha(name: str, value: float | None) -> None:
    """Raise NemoKDError for a weight of the distillation outside [0, 1]; None is accepted."""
    if value is not None and not 0 <= value <= 1:
        raise NemoKDError(f"{name} is {value}: expected a value in [0, 1].")


def check_temperature(name: str, value: float | None) -> None:
    """Raise NemoKDError for a temperature that is not in (0, 100]; None is accepted."""
    if value is not None and not 0 < value <= MAX_TEMPERATURE:
        raise NemoKDError(
            f"{name} is {value}: expected a value > 0 and at most {MAX_TEMPERATURE:g}."
        )
