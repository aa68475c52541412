"""Which code turns a .beton's records into views."""

from collections.abc import Callable
from typing import Literal

from varscale.data import libffcv
from varscale.errors import UserError

Decoder = Literal["ffcv", "torch"]


def installed_decoder() -> Decoder:
    """The faster one that there is on this machine."""
    return "torch" if libffcv.imdecode() is None else "ffcv"


def decode_views_by(decoder: Decoder) -> Callable[..., tuple[int, int]]:
    """`decode_views` of a decoder. Raises UserError where FFCV's is asked for and not installed."""
    if decoder == "torch":
        from varscale.data.torch_decoding import decode_views

        return decode_views
    try:
        from varscale.data.decoding import decode_views
    except ImportError as error:
        raise UserError(f"{error}; install it (see the README), or set data.loader=torch, which is slower") from None
    return decode_views
