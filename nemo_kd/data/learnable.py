"""Check whether a configured loss can learn from a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nemo_kd.errors import NemoKDError
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


def check_stores(
    stores: Sequence[StoreFacts],
    config: KDConfig,
    *,
    training: bool = True,
    naming: Naming = FIELD,
) -> None:
    """Apply `check_schedule` to the stores of a mix.

    Errors: as there, and NemoKDError for a schedule of `alpha` where each store has its own.
    """
    for store in stores:
        check_schedule(store, config, store.alpha, naming=naming)
    alphas = [store.alpha for store in stores]
    end = config.alpha_end if isinstance(config, KDSchedule) else None
    if training and end is not None and alphas and None not in alphas:
        raise NemoKDError(
            f"{naming('alpha_end')}={end} has no effect on the training, since each store has its "
            f"own alpha, {alphas}: remove it, or the alpha of a store that is to follow it"
        )


def check_schedule(
    store: Store | StoreFacts,
    config: KDConfig,
    alpha: float | None = None,
    *,
    naming: Naming = FIELD,
) -> None:
    """Apply `check_learnable` to both ends of a schedule; `alpha` is the store's own weight.

    Errors: as `check_learnable`, and NemoKDError for `alpha` beside `sft_weight` or `kd_weight`,
    which another store's tokens would have on another scale.
    """
    if alpha is not None and (config.sft_weight, config.kd_weight) != (None, None):
        raise NemoKDError(
            f"alpha={alpha} gives store {store.origin} weights of its own: use {naming('alpha')} "
            f"for the others, not {naming('sft_weight')} and {naming('kd_weight')}"
        )
    ends = [(config, "")]
    if isinstance(config, KDSchedule):
        ends = [(config.at(0, 1), ""), (config.end, " at the end of the schedule")]
    for kd, when in ends:
        if alpha is not None:
            kd = replace(kd, alpha=alpha)
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
