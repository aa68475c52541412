"""What a JPEG's header says of it, for the conversion and, compiled, for the loader."""


def frame_size(jpeg):
    """(height, width) from a JPEG's frame header (ITU-T T.81, B.2.2); (0, 0) where none is found.

    jpeg: bytes, or (n,) uint8.
    """
    at = 2
    while at + 8 < len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers that stand alone, without a length
            at += 2
            continue
        is_frame = 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC
        if is_frame:
            return jpeg[at + 5] * 256 + jpeg[at + 6], jpeg[at + 7] * 256 + jpeg[at + 8]
        at += 2 + jpeg[at + 2] * 256 + jpeg[at + 3]
    return 0, 0
