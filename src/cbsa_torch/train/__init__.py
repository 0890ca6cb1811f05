"""Training and evaluation of image classifiers: configuration, data, loop, checkpoints."""

from cbsa_torch._core.optional import require

for _module in ("timm", "accelerate", "torchmetrics", "yaml", "rich"):
    require(_module, extra="train")

from cbsa_torch.train.config.base import TrainConfig, load_config  # noqa: E402
from cbsa_torch.train.evaluate import evaluate_checkpoint  # noqa: E402
from cbsa_torch.train.predict import predict_images  # noqa: E402
from cbsa_torch.train.trainer import train  # noqa: E402

__all__ = ["TrainConfig", "evaluate_checkpoint", "load_config", "predict_images", "train"]
