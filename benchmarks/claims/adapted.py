"""To be written."""

from benchmarks.claims.runs import Folders, Run


def runs(folders: Folders) -> list[Run]:
    return []
