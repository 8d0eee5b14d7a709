"""Profiles: how a sample's `TopK` is encoded on disk."""

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs.base import Codec
from nemo_kd.store.codecs.compact import Compact
from nemo_kd.store.codecs.plain import Plain
from nemo_kd.store.codecs.sampled import Sampled
from nemo_kd.store.codecs.top_p import TopP
from nemo_kd.store.spec import StoreSpec

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Plain, Compact, Sampled, TopP)}


def codec_of(spec: StoreSpec) -> Codec:
    """Return the codec for the spec's profile; raise StoreError if the profile is unknown."""
    if spec.profile not in CODECS:
        raise StoreError(f"profile must be one of {', '.join(CODECS)}, not {spec.profile!r}")
    return CODECS[spec.profile](spec)


__all__ = ["CODECS", "Codec", "Sampled", "TopP", "codec_of"]
