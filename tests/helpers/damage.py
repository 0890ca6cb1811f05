"""Files that are dangerous or damaged."""

from pathlib import Path


class Trap:
    """Unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip_bit(path: Path, share: float, bit: int = 0) -> None:
    """Change one bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[min(int(share * len(data)), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)
