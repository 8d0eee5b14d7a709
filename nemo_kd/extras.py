"""How to install this package's optional dependencies: it is on no index, but in a checkout."""


def install(extra: str, *packages: str) -> str:
    """Return the command that installs an extra of pyproject.toml, and other packages with it."""
    return f"{' '.join(['pip install', repr(f'.[{extra}]'), *packages])} in a checkout of nemo-kd"
