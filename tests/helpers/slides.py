"""Small slides, written by h5py as TRIDENT and CLAM write theirs, that hold something to be found or do not."""

import copy
from pathlib import Path

import h5py
import numpy as np

from cbsa_torch.train.config import EngineConfig, OptimConfig
from cbsa_torch.train.tasks.slides.config import SlidesDataConfig, SlidesModelConfig, SlidesTrainConfig

TILE = 512
WIDTH = 8


def write_trident(path, features, coords, tile=TILE):
    """As TRIDENT's ``save_h5``: two datasets, the attributes of the patching on the coordinates."""
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features)
        file["features"].attrs["name"] = Path(path).stem
        if coords is not None:
            file.create_dataset("coords", data=coords)
            attributes = {
                "patch_size": 256,
                "patch_size_level0": tile,
                "level0_magnification": 40,
                "overlap": 0,
            }
            file["coords"].attrs.update({**attributes, "name": Path(path).stem})


def write_clam(path, features, coords):
    """As CLAM's ``save_hdf5``: datasets that can grow, appended to batch by batch, without attributes."""
    with h5py.File(path, "w") as file:
        for name, values in (("features", features), ("coords", coords)):
            first, rest = values[:7], values[7:]
            data = file.create_dataset(
                name, first.shape, first.dtype, maxshape=(None, *first.shape[1:]), chunks=(1, *first.shape[1:])
            )
            data[:] = first
            data.resize(len(values), axis=0)
            data[len(first) :] = rest


def draw_slide(generator, positive, tiles=60, width=WIDTH):
    """Tissue of two pieces on a lattice, the corners at level 0; if positive, tiles of one corner stand out."""
    places = np.array([(x, y) for x in range(12) for y in range(9) if (x - 5) ** 2 + (y - 4) ** 2 > 4])
    chosen = places[np.sort(generator.permutation(len(places))[:tiles])]
    features = generator.standard_normal((len(chosen), width)).astype(np.float32)
    if positive:
        features[chosen.sum(1) >= 14] += 4 * np.eye(width, dtype=np.float32)[0]
    return features, (chosen * TILE + (3000, 40000)).astype(np.int64)


def write_slides(root, count=24, seed=0):
    """``count`` slides, every second positive, of two per patient, and slides.csv; half of each tool's kind."""
    root.mkdir(parents=True)
    generator, rows = np.random.default_rng(seed), ["slide,label,patient"]
    for i in range(count):
        features, coords = draw_slide(generator, i % 2 == 1, tiles=50 + i)
        (write_trident if i % 4 < 2 else write_clam)(root / f"s{i:02}.h5", features, coords)
        rows.append(f"s{i:02},{'tumour' if i % 2 else 'normal'},p{i // 4}-{i % 2}")
    (root / "slides.csv").write_text("\n".join(rows) + "\n")
    return root


def slides_config(root, output, **model_args):
    """A configuration that trains in a second."""
    args = {"dim": 16, "depth": 1, "num_heads": 2, "num_representatives": 4, **model_args}
    return SlidesTrainConfig(
        output=str(output),
        model=SlidesModelConfig("token_set_cbt_tiny", args=args),
        data=SlidesDataConfig(root=str(root), val_fraction=0.3, test_fraction=0.3, max_tiles=40),
        optim=OptimConfig(
            "adamw", lr=3e-2, batch_size=2, epochs=3, warmup_epochs=0, label_smoothing=0.0, keep="last"
        ),
        engine=EngineConfig(accumulate=2, tracker="none", threads=1, cpu=True),
    )


def other(config, output):
    """The same configuration with another folder."""
    config = copy.deepcopy(config)
    config.output = str(output)
    return config
