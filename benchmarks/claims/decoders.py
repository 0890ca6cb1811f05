"""Block 3: decoders of masks on CamVid, on one frozen encoder or with it (Fig. 2, 8; Table 3).

The encoder is the pretrained ViT-S/14; its features of all images and mirror images are computed once. Short
runs choose the block whose features are taken, and the learning rate of each decoder. All train by the same
recipe for as long, and go on from their last epoch. Scores are of whole masks at their own size.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import safetensors
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate
from torchvision.transforms.v2 import functional as transforms

from benchmarks.claims.runs import Folders, Measured, Run, read
from benchmarks.inside import certificates
from cbsa_torch import CBSA, interpret
from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret.robustness import SIGMAS
from cbsa_torch.models import MaskTransformerDecoder, Segmenter
from cbsa_torch.models.counting import count_model
from cbsa_torch.train.config import OptimConfig
from cbsa_torch.train.data import Splits
from cbsa_torch.train.engine.optim import make_optimizer, make_scheduler
from cbsa_torch.train.losses import mean_loss
from cbsa_torch.train.tasks.segmentation import (
    SegmentationDataConfig,
    SegmentationMetric,
    open_segmentation,
    to_record,
)
from cbsa_torch.train.tasks.segmentation.evaluation import SegmentationScores

ENCODER, ENCODER_ARGS = "vit_small_patch14_dinov2", {"img_size": 518}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (252, 336)
"""Of the images as the encoder sees them: 18 x 24 patches."""
BLOCKS = (9, 12)
"""After which features may be taken, through the encoder's last norm."""
DIM, CLASSES, PATCH = 384, 11, 14
IGNORED = 11
"""Value of the pixels in the masks that have no class."""


class Form(NamedTuple):
    """A decoder."""

    title: str
    mixer: str
    args: Mapping[str, Any] = {}
    seeds: int = 5


FORMS = {
    "cbsa": Form("CBSA (CBT)", "cbsa"),
    "mssa": Form("MSSA (DEPICT)", "mssa"),
    "mhsa": Form("MHSA (Segmenter)", "mhsa"),
    "certified": Form("CBSA, certified step", "cbsa", {"step": "certified"}),
    "cbsa_lattice": Form(
        "CBSA, 10 x 10 initial guesses as published", "cbsa", {"num_representatives": [10, 10]}, seeds=3
    ),
}
CHOOSING = ("cbsa", "mssa", "mhsa")
"""Decoders that choose the block."""
FINETUNED = ("cbsa", "mhsa")
"""Decoders that are also trained together with the encoder."""
RECIPE = OptimConfig(
    name="adamw", lr=5e-4, weight_decay=0.05, batch_size=8, epochs=8, warmup_epochs=0, schedule="poly"
)
RATES = (2.5e-4, 5e-4, 1e-3)
"""Learning rates that every decoder tries for as long."""
TRIAL_EPOCHS = 2
LOSS_SIZE = (36, 48)
"""Height and width of logits and labels in the loss: twice the grid of the patches."""
FINETUNING = replace(RECIPE, lr=1e-4, epochs=2)
"""Not tried on validation: one rate for all."""
ENCODER_SCALE = 0.1
"""The encoder's share of that learning rate."""
DISTURBED = 60
"""Test images, spread evenly, that noise and certificate are measured on."""
SIDES = (112, 224, 336, 448, 518, 672, 896, 1022, 1414, 2044)
"""Of square images whose cost is counted, in pixels."""
FEATURE_MINUTES, EPOCH_MINUTES, MEASURE_MINUTES, FINETUNE_MINUTES = 10.0, 0.7, 1.5, 28.0
"""Of a thread of the CPU that other processes leave alone."""


def runs(folders: Folders) -> list[Run]:
    """The features, the block, the learning rates, then seed after seed, then the fine-tuned encoders."""
    features_of, blocks = "decoders_features", tuple(map(block_run, BLOCKS))
    first = [
        Run(features_of, FEATURE_MINUTES, partial(compute_features, folders)),
        Run("decoders_cost", 1, partial(count_all, folders)),
    ]
    first += [
        Run(
            block_run(block),
            len(CHOOSING) * TRIAL_EPOCHS * EPOCH_MINUTES,
            partial(try_block, folders, block),
            seed=0,
            needs=(features_of,),
        )
        for block in BLOCKS
    ]
    trials = [
        Run(
            trial(form, rate),
            TRIAL_EPOCHS * EPOCH_MINUTES,
            partial(try_rate, folders, form, rate),
            seed=0,
            needs=(features_of, *blocks),
        )
        for form in FORMS
        for rate in RATES
    ]
    trained = [
        Run(
            trained_run(form, seed),
            RECIPE.epochs * EPOCH_MINUTES + MEASURE_MINUTES,
            partial(train_form, folders, form, seed),
            seed,
            needs=tuple(trial(form, rate) for rate in RATES),
        )
        for seed in range(max(one.seeds for one in FORMS.values()))
        for form in FORMS
        if seed < FORMS[form].seeds
    ]
    finetuned = [
        Run(
            f"decoders_{form}_finetuned",
            FINETUNE_MINUTES,
            partial(finetune, folders, form),
            seed=0,
            needs=(trained_run(form, 0),),
        )
        for form in FINETUNED
    ]
    return [*first, *trials, *trained, *finetuned]


def block_run(block: int) -> str:
    """The name of the run that tries the features of a block."""
    return f"decoders_block{block}"


def trial(form: str, rate: float) -> str:
    """The name of the run that tries a learning rate."""
    return f"decoders_{form}_lr{rate:g}"


def trained_run(form: str, seed: int) -> str:
    """The name of the run of a decoder on the frozen encoder."""
    return f"decoders_{form}_seed{seed}"


# --- images and features


class WithMirrorImages(Dataset[Any]):
    """All samples (image, mask), then all of them mirrored."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return 2 * len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mirrored, place = divmod(index, len(self.images))
        image, mask = self.images[place]
        return (image.flip(-1), mask.flip(-1)) if mirrored else (image, mask)


def open_images(folders: Folders) -> Splits:
    """CamVid as the encoder is fed, with masks at their own size; mirror images of the training split, too."""
    if folders.camvid is None:
        raise SystemExit("--camvid DIR is needed: the folder with train/, val/ and test/ of CamVid")
    config = SegmentationDataConfig(name="folder", root=str(folders.camvid), ignore_label=IGNORED)
    splits = open_segmentation(config)
    for images in splits.parts().values():
        images.transform = as_fed  # type: ignore[attr-defined]
    return splits._replace(train=WithMirrorImages(splits.train))


def as_fed(image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
    """``(3, *SIZE)`` of the image, and its labels as they are."""
    resized = image.resize(SIZE[::-1], Image.Resampling.BICUBIC)
    pixels = transforms.to_dtype(transforms.to_image(resized), torch.float32, scale=True)
    return transforms.normalize(pixels, list(MEAN), list(STD)).as_subclass(Tensor), torch.from_numpy(mask)


def batches(dataset: Any, indices: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs in float32 and labels, in this order."""
    for part in torch.tensor(list(indices)).split(RECIPE.batch_size):
        inputs, labels = default_collate([dataset[i] for i in part.tolist()])
        yield inputs.float(), labels.long()


def make_encoder() -> Any:
    """The ViT with new weights."""
    return timm.create_model(ENCODER, num_classes=0, dynamic_img_size=True, **ENCODER_ARGS)


def open_encoder(folders: Folders) -> Any:
    """The pretrained ViT."""
    if folders.vit is None:
        raise SystemExit(
            "--vit FILE is needed: the pretrained ViT, as `python -m benchmarks.claims.vit` writes it"
        )
    encoder = make_encoder()
    encoder.load_state_dict(load_file(folders.vit))
    return encoder.eval()


@torch.no_grad()
def encode(encoder: Any, blocks: Sequence[int], dataset: Any) -> tuple[list[Tensor], Tensor]:
    """``(images, DIM, h, w)`` features after each block, to half precision, and int8 masks."""
    features, masks = [], []
    for images, labels in batches(dataset, range(len(dataset))):
        found = encoder.forward_intermediates(
            images, indices=[block - 1 for block in blocks], norm=True, intermediates_only=True
        )
        features.append([one.half() for one in found])
        masks.append(labels.to(torch.int8))
    return [torch.cat(parts) for parts in zip(*features, strict=True)], torch.cat(masks)


def compute_features(folders: Folders) -> Measured:
    """Features of every split in a file, unless it is there."""
    encoder, splits, lines = open_encoder(folders), open_images(folders), []
    folder = folders.runs / "decoders_features"
    for split, dataset in splits.parts().items():
        start = time.perf_counter()
        features, masks = encode(encoder, BLOCKS, dataset)
        tensors = {f"block{block}": one for block, one in zip(BLOCKS, features, strict=True)}
        write_atomically(folder / f"{split}.safetensors", save({**tensors, "masks": masks}))
        share = [(masks == label).double().mean().item() for label in range(len(splits.class_names))]
        lines.append(
            {
                "split": split,
                "images": len(masks),
                "seconds": time.perf_counter() - start,
                "pixel_shares": dict(zip(splits.class_names, share, strict=True)),
                "largest_feature": max(one.abs().max().item() for one in features),
            }
        )
    write_log(folder / "log.jsonl", lines)
    values = {"encoder": ENCODER, "size": SIZE, "blocks": BLOCKS, "splits": lines}
    return Measured(values, folder / "log.jsonl")


def open_features(folders: Folders, block: int) -> Splits:
    """The features of a block and their masks."""
    splits = open_images(folders)
    parts: dict[str, Any] = {}
    for split in splits.parts():
        path = folders.runs / "decoders_features" / f"{split}.safetensors"
        if not path.exists():
            raise SystemExit(f"{path} is gone: delete the record decoders_features to compute it anew")
        with safetensors.safe_open(path, "pt") as file:
            parts[split] = TensorDataset(file.get_tensor(f"block{block}"), file.get_tensor("masks"))
    return splits._replace(**parts)


# --- training


def make_decoder(form: str) -> MaskTransformerDecoder:
    """A decoder with new weights."""
    member = FORMS[form]
    return MaskTransformerDecoder(CLASSES, DIM, mixer=member.mixer, **member.args)


def fit(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    dataset: Any,
    recipe: OptimConfig,
    folder: Path,
    *,
    block: int,
    seed: int,
    lr_scales: Mapping[str, float] = {},
) -> Path:
    """Train, or go on after the last epoch whose state is in the folder.

    A state of another block, recipe or seed is not gone on with.

    Args:
        model: whose parameters are trained.
        forward: from inputs to logits of any size.
        dataset: samples (inputs, labels).
        recipe: optimiser, schedule, epochs.
        folder: of state and log.
        block: of the encoder whose features the decoder knows.
        seed: of the order of the samples.
        lr_scales: of parameters with a learning rate of their own.

    Returns:
        The log, a JSON line for each epoch.
    """
    optimizer = make_optimizer(model, recipe, lr_scales)
    steps = -(-len(dataset) // recipe.batch_size)
    scheduler = make_scheduler(optimizer, recipe, steps)
    path, log, told = folder / "state.pt", folder / "log.jsonl", json.dumps([block, asdict(recipe), seed])
    lines: list[dict[str, Any]] = []
    if path.exists() and (state := torch.load(path, weights_only=True))["recipe"] == told:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        lines = state["log"]
    model.train()
    for epoch in range(len(lines), recipe.epochs):
        start = time.perf_counter()
        losses: list[float] = []
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for inputs, labels in batches(dataset, order.tolist()):
            scheduler.step_update(epoch * steps + len(losses))
            logits = F.interpolate(forward(inputs), LOSS_SIZE, mode="bilinear")
            targets = F.interpolate(labels[:, None].float(), LOSS_SIZE, mode="nearest-exact")[:, 0].long()
            loss = mean_loss(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        lines.append(
            {
                "epoch": epoch + 1,
                "loss": fmean(losses),
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - start,
            }
        )
        print(json.dumps(lines[-1]), flush=True)
        buffer = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": lines, "recipe": told}
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())
    write_log(log, lines)
    model.eval()
    return log


def write_log(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def train_decoder(
    folder: Path, form: str, block: int, train: Any, recipe: OptimConfig, seed: int
) -> tuple[MaskTransformerDecoder, Path]:
    """A decoder trained on features, and the log."""
    torch.manual_seed(seed)
    decoder = make_decoder(form)
    return decoder, fit(decoder, decoder, train, recipe, folder, block=block, seed=seed)


def open_decoder(folders: Folders, form: str, seed: int) -> MaskTransformerDecoder:
    """The decoder that a finished run has trained."""
    path = folders.runs / trained_run(form, seed) / "state.pt"
    if not path.exists():
        raise SystemExit(f"{path} is gone: delete the record {trained_run(form, seed)} to train it anew")
    decoder = make_decoder(form)
    decoder.load_state_dict(torch.load(path, weights_only=True)["model"])
    return decoder.eval()


# --- the runs


def try_block(folders: Folders, block: int) -> Measured:
    """Short runs of all but the variants of CBSA on the features of a block."""
    splits, folder, miou = open_features(folders, block), folders.runs / block_run(block), {}
    lines = []
    for form in CHOOSING:
        recipe = replace(RECIPE, epochs=TRIAL_EPOCHS)
        decoder, log = train_decoder(folder / form, form, block, splits.train, recipe, 0)
        miou[form] = evaluate(decoder, splits.val, splits.class_names).miou
        lines += [{"form": form, **json.loads(line)} for line in log.read_text().splitlines()]
    write_log(folder / "log.jsonl", lines)
    values = {"block": block, "lr": RECIPE.lr, "epochs": TRIAL_EPOCHS, "val_mious": miou}
    return Measured({**values, "val_miou": fmean(miou.values())}, folder / "log.jsonl")


def best_block() -> int:
    """The block whose features give the best validation mean IoU, the mean over decoders."""
    return max(BLOCKS, key=lambda block: read(block_run(block))["val_miou"])


def try_rate(folders: Folders, form: str, rate: float) -> Measured:
    """A short run, judged on the validation split."""
    block, name = best_block(), trial(form, rate)
    splits, recipe = open_features(folders, block), replace(RECIPE, lr=rate, epochs=TRIAL_EPOCHS)
    decoder, log = train_decoder(folders.runs / name, form, block, splits.train, recipe, 0)
    miou = evaluate(decoder, splits.val, splits.class_names).miou
    return Measured({"form": form, "block": block, "lr": rate, "epochs": TRIAL_EPOCHS, "val_miou": miou}, log)


def best_rate(form: str) -> float:
    """The learning rate of best validation mean IoU."""
    return max(RATES, key=lambda rate: read(trial(form, rate))["val_miou"])


def train_form(folders: Folders, form: str, seed: int) -> Measured:
    """Train a decoder on the frozen encoder, and measure it."""
    block, recipe = best_block(), replace(RECIPE, lr=best_rate(form))
    splits = open_features(folders, block)
    folder = folders.runs / trained_run(form, seed)
    decoder, log = train_decoder(folder, form, block, splits.train, recipe, seed)
    values = {"form": form, "block": block, "train_samples": len(splits.train), "recipe": asdict(recipe)}  # type: ignore[arg-type]
    return Measured({**values, **measure(form, decoder, splits)}, log)


def finetune(folders: Folders, form: str) -> Measured:
    """Train encoder and decoder together, from the decoder of seed 0, and measure the decoder.

    Blocks after the one whose features are taken are cut off.
    """
    block, splits, folder = best_block(), open_images(folders), folders.runs / f"decoders_{form}_finetuned"
    encoder = open_encoder(folders)
    encoder.prune_intermediate_layers([block - 1])
    model = Segmenter(encoder, open_decoder(folders, form, 0))

    def forward(images: Tensor) -> Tensor:
        return model.decoder(model.forward_features(images))

    scales = {name: ENCODER_SCALE for name, _ in model.named_parameters() if name.startswith("encoder.")}
    log = fit(model, forward, splits.train, FINETUNING, folder, block=block, seed=0, lr_scales=scales)
    parts: dict[str, Any] = {}
    for split in ("val", "test"):
        (features,), masks = encode(encoder, [block], splits.parts()[split])
        parts[split] = TensorDataset(features, masks)
    values = {
        "form": form,
        "block": block,
        "train_samples": len(splits.train),  # type: ignore[arg-type]
        "recipe": asdict(FINETUNING),
        "encoder_scale": ENCODER_SCALE,
        "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
    }
    return Measured({**values, **measure(form, model.decoder, splits._replace(**parts))}, log)


# --- measurements


@torch.no_grad()
def evaluate(decoder: nn.Module, dataset: Any, class_names: Sequence[str]) -> SegmentationScores:
    """Scores of masks upsampled to the labels' size."""
    metric = SegmentationMetric(class_names, sync=False)
    for features, labels in batches(dataset, range(len(dataset))):
        metric.update(decoder(features, labels.shape[-2:]).argmax(1), labels)
    found: SegmentationScores = metric.compute()
    return found


def measure(form: str, decoder: MaskTransformerDecoder, splits: Splits) -> dict[str, Any]:
    """Scores, cost, noise on the parameters of the attention (Fig. 8), and what steps of CBSA do to rates."""
    test: Any = splits.test
    few = Subset(test, torch.linspace(0, len(test) - 1, min(DISTURBED, len(test))).long().tolist())
    noisy = interpret.robustness(
        decoder, lambda model: evaluate(model, few, splits.class_names).miou, sigmas=SIGMAS
    )
    measured = {
        "title": FORMS[form].title,
        **{
            split: to_record(evaluate(decoder, dataset, splits.class_names))
            for split, dataset in (("val", splits.val), ("test", test))
        },
        "cost": cost(form, SIZE),
        "robustness": {"images": len(few), "clean": noisy.clean, "sigmas": SIGMAS, "values": noisy.values},
    }
    layers = [layer for layer in decoder.modules() if isinstance(layer, CBSA)]
    if layers:
        features = torch.stack([few[i][0].float() for i in range(len(few))])
        if layers[0].step == "certified":
            measured["certificates"] = certificates(decoder, features)
        measured["rates"] = interpret.certificate(decoder.double(), features.double(), batch_size=8).record()
    return measured


def cost(form: str, size: tuple[int, int]) -> dict[str, int]:
    """FLOPs and similarities of a decoder for one image, and its parameters."""
    with torch.device("meta"):  # softmax attention of a large image would not fit into memory
        total = count_model(make_decoder(form), (DIM, size[0] // PATCH, size[1] // PATCH)).total
    return {
        "flops": total.counts.flops,
        "similarities": total.counts.similarities,
        "parameters": total.parameters,
    }


def encoder_flops(size: tuple[int, int]) -> int:
    """FLOPs of the whole encoder for one image."""
    with torch.device("meta"):
        return count_model(make_encoder(), (3, *size)).total.counts.flops


def count_all(folders: Folders) -> Measured:
    """The cost of every decoder, and beside it the encoder's, against the side of the image."""
    sides = [
        {
            "side": side,
            "encoder_flops": encoder_flops((side, side)),
            "decoders": {form: cost(form, (side, side)) for form in FORMS},
        }
        for side in SIDES
    ]
    log = folders.runs / "decoders_cost" / "log.jsonl"
    write_log(log, sides)
    return Measured({"sides": sides}, log)
