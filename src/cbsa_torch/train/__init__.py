"""Training and evaluation of image classifiers, segmenters and adapted ViTs, from a configuration."""

from cbsa_torch._core.optional import require

require("train")

from cbsa_torch.train.config import (  # noqa: E402
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from cbsa_torch.train.evaluate import evaluate_checkpoint, open_trained, predict_images  # noqa: E402
from cbsa_torch.train.hub import push_to_hub, save_for_hub  # noqa: E402
from cbsa_torch.train.losses import DistillConfig  # noqa: E402
from cbsa_torch.train.registry import load_config  # noqa: E402
from cbsa_torch.train.tasks.adaptation.stages import recover  # noqa: E402
from cbsa_torch.train.tasks.adaptation.task import AdaptedModelConfig, AdaptTrainConfig  # noqa: E402
from cbsa_torch.train.tasks.base import WindowOptions  # noqa: E402
from cbsa_torch.train.tasks.segmentation.config import (  # noqa: E402
    ScenesConfig,
    SegmentationDataConfig,
    SegmentationModelConfig,
    SegmentationTrainConfig,
    WindowConfig,
)
from cbsa_torch.train.trainer import TrainResult, train  # noqa: E402

__all__ = [
    "AdaptTrainConfig",
    "AdaptedModelConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "ModelConfig",
    "OptimConfig",
    "ScenesConfig",
    "SegmentationDataConfig",
    "SegmentationModelConfig",
    "SegmentationTrainConfig",
    "TrainConfig",
    "TrainResult",
    "WindowConfig",
    "WindowOptions",
    "evaluate_checkpoint",
    "load_config",
    "open_trained",
    "predict_images",
    "push_to_hub",
    "recover",
    "save_for_hub",
    "train",
]
