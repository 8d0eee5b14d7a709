"""Check whether a configured loss can learn from a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.loss.linearity import nonlinear_settings
from nemo_kd.store import Store, StoreError, StoreSpec
from nemo_kd.store.codecs import Sampled

Naming = Callable[[str], str]
"""A field of `KDConfig` → what users set it by."""
FIELD: Naming = "KDConfig.{}".format


@dataclass(frozen=True)
class StoreFacts:
    """What decides whether a loss can learn from a store, apart from its samples."""

    origin: str
    spec: StoreSpec
    alpha: float | None = None
    """The store's own weight of the distillation; None: that of the training."""


def check_schedule(
    store: Store | StoreFacts,
    config: KDConfig,
    alpha: float | None = None,
    *,
    training: bool = True,
    naming: Naming = FIELD,
) -> None:
    """Apply `check_learnable` to both ends of a schedule; `alpha` is the store's own weight.

    A validation, whose metrics are over all positions, is checked without `top_entropy_fraction`.
    """
    ends = [(config, "")]
    if isinstance(config, KDSchedule):
        ends = [(config.at(0, 1), ""), (config.end, " at the end of the schedule")]
    for kd, when in ends:
        if alpha is not None:
            kd = replace(kd, alpha=alpha, sft_weight=None, kd_weight=None)
        kd = kd if training else replace(kd, top_entropy_fraction=1.0)
        check_learnable(store, kd, when, naming=naming)


def check_learnable(
    store: Store | StoreFacts, config: KDConfig, when: str = "", *, naming: Naming = FIELD
) -> None:
    """Refuse a store that the distillation of `config` cannot learn from, or only with a bias.

    `when` names in messages the step that has these settings, `naming` the settings. A distillation
    of weight 0 accepts any store.

    Errors: StoreError for draws from the teacher and a gradient that is not linear in it, and for
    one id per token on support `topk`.
    """
    if not config.weights[1]:
        return
    spec = store.spec
    if config.support == "topk" and spec.top_k == 1:
        raise StoreError(
            f"store {store.origin} has one id per token (K = 1): with {naming('support')}=topk "
            "both distributions are 1 at that id, and nothing is learned from the teacher; set "
            f"{naming('support')}=bucket, or dump with a larger dump.top_k"
        )
    if spec.profile != Sampled.name:
        return
    wrong = nonlinear_settings(config)
    if wrong:
        settings = ", ".join(f"{naming(name)}={getattr(config, name)}" for name in wrong)
        raise StoreError(
            f"store {store.origin} holds draws from the teacher (profile 'sampled'). They are "
            "unbiased only in a loss whose gradient is linear in the teacher's "
            f"probabilities, which it is not with {settings}{when}; leave that at its default, or "
            "dump with another profile"
        )
