"""Which code turns a .beton's records into views."""

from collections.abc import Callable
from typing import Literal

from varscale.data import libffcv
from varscale.errors import UserError

Decoder = Literal["ffcv", "torch"]


def installed_decoder() -> Decoder:
    """The faster one that there is on this machine."""
    return "torch" if libffcv.imdecode() is None else "ffcv"


def check_decoder(decoder: Decoder) -> None:
    """Raises UserError where FFCV's is asked for and not installed."""
    if decoder == "ffcv" and libffcv.imdecode() is None:
        raise UserError(
            "FFCV's decoder is missing: FFCV is not installed, or was built for other system libraries; "
            "install it (see the README), or set data.loader=torch, which is slower"
        )


def decode_views_by(decoder: Decoder) -> Callable[..., tuple[int, int]]:
    """`decode_views` of a decoder. Raises UserError as `check_decoder` does."""
    check_decoder(decoder)
    if decoder == "torch":
        from varscale.data.torch_decoding import decode_views

        return decode_views
    from varscale.data.decoding import decode_views

    return decode_views
