"""A plain script of timm, with one argument that is ours."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SCRIPT = """
import sys
import timm, timm.data, timm.loss, timm.optim, timm.scheduler, timm.utils, torch
from cbsa_torch import {mixer}

timm.utils.random_seed(0)
model = timm.create_model(
    "vit_small_patch16_224", attn_layer={mixer}, depth=2, embed_dim=48, num_heads=3, num_classes=2,
    img_size=(32, 64), reg_tokens=1, drop_path_rate=0.1,
)
model.set_grad_checkpointing()
ema = timm.utils.ModelEmaV3(model, decay=0.9)
dataset = timm.data.create_dataset("", root=sys.argv[1])
loader = timm.data.create_loader(
    dataset, input_size=(3, 32, 64), batch_size=8, is_training=True, use_prefetcher=False, num_workers=0,
    device=torch.device("cpu"), no_aug=True,
)
mixup = timm.data.Mixup(mixup_alpha=0.1, num_classes=2)
optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05)
scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=6, updates_per_epoch=len(loader))
saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=sys.argv[2])
criterion, losses = timm.loss.SoftTargetCrossEntropy(), []
for epoch in range(6):
    model.train()
    meter = timm.utils.AverageMeter()
    for images, targets in loader:
        images, targets = mixup(images, targets)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        meter.update(loss.item(), len(images))
    scheduler.step(epoch + 1)
    saver.save_checkpoint(epoch, metric=meter.avg)
    losses.append(meter.avg)
assert losses[-1] < losses[0], losses

model.eval()
images, targets = next(iter(loader))
print("accuracy", timm.utils.accuracy(model(images), targets)[0].item())
again = timm.create_model(
    "vit_small_patch16_224", attn_layer={mixer}, depth=2, embed_dim=48, num_heads=3, num_classes=2,
    img_size=(32, 64), reg_tokens=1, checkpoint_path=sys.argv[2] + "/last.pth.tar",
).eval()
timm.models.load_checkpoint(again, sys.argv[2] + "/last.pth.tar", use_ema=False)
assert torch.equal(again(images), model(images))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Red images and blue ones."""
    root = tmp_path_factory.mktemp("images")
    for name, channel in (("blue", 2), ("red", 0)):
        (root / name).mkdir()
        for i in range(16):
            pixels = np.random.default_rng(i).integers(0, 80, (32, 64, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_it_trains_with_cbsa_in_an_interpreter_of_its_own(folder, tmp_path):
    arguments = ["-W", "error::UserWarning", "-c", SCRIPT.format(mixer="CBSA"), str(folder), str(tmp_path)]
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["accuracy", "100.0"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves the files of images open
@pytest.mark.parametrize("mixer", ["AgentAttention", "MSSA", "TSSA"])
def test_it_trains_with_the_others(mixer, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", str(folder), str(tmp_path)])
    exec(SCRIPT.format(mixer=mixer), {})
    assert capsys.readouterr().out.split() == ["accuracy", "100.0"]
