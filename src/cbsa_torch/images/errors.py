"""What can be wrong with images and their folders."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used: missing, empty, without labels, or an unreadable image.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import DataError, class_folders
        >>> try:
        ...     class_folders(Path("photos/train/red"))
        ... except DataError as error:
        ...     print("no class folders" in str(error))
        True
    """

    def __init__(self, message: str) -> None:
        # A DataLoader rebuilds an error of a worker from its traceback, whose last line is the message.
        if message.startswith("Caught DataError in DataLoader worker"):
            message = message.strip().splitlines()[-1].partition("DataError: ")[2]
        super().__init__(message)


class UnreadableImageError(DataError):
    """An image or mask that cannot be used; the message is the reason alone, one line without the file.

    Examples:
        >>> from cbsa_torch.images import UnreadableImageError, read_image_file
        >>> try:
        ...     read_image_file("scenes/classes.txt", "RGB")
        ... except UnreadableImageError as error:
        ...     print(error)
        not an image, or of a kind that Pillow does not know
    """
