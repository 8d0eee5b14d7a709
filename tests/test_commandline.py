"""Every Hydra spelling of a `model.kd` override means the same; others stay as they are."""

from nemo_kd.commandline import accept_every_spelling


def test_kd_overrides_become_add_or_change() -> None:
    spellings = ["+model.kd.alpha=0.5", "model.kd.alpha=0.5", "++model.kd.alpha=0.5"]
    assert set(accept_every_spelling(spellings)) == {"++model.kd.alpha=0.5"}


def test_a_selection_of_positions_is_no_function_of_hydras() -> None:
    (argument,) = accept_every_spelling(["model.kd.positions=top_entropy(0.2)"])
    assert argument == "++model.kd.positions='top_entropy(0.2)'"


def test_other_arguments_are_left_alone() -> None:
    others = ["model.optim.lr=1", "+trainer.x=2", "--cfg", "job", "~model.kd.alpha", "model.kdx=1"]
    assert accept_every_spelling(others) == others
