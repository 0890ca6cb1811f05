"""The table "What works where" of docs/use/packages.md: every cell is a test, which must exist and do what it says."""

import contextlib
import inspect
import io
import itertools
import re

import pytest

from cbsa_torch.models.registry import FAMILIES, model_name, sizes_of
from tests.helpers.doc_pages import ROOT
from tests.helpers.exports import MODELS
from tests.helpers.mixers import MIXERS, ORTHOGONAL

PAGE = ROOT / "docs/use/packages.md"
EXPANDED = {
    "{family}": [*FAMILIES],
    "{smallest}": [model_name(family, "pico" if "pico" in sizes_of(family) else "tiny") for family in FAMILIES],
    "{mixer}": [*MIXERS],
    "{plain}": [name for name in MIXERS if name not in ORTHOGONAL],
    "{orthogonal}": ORTHOGONAL,
    "{adapted}": [name for name in MODELS if name.startswith("adapted")],
    "{segmenter}": [name for name in MODELS if name.startswith("segmenter")],
    "{layer}": ["CBSA", "AgentAttention", "LinearCBSA", "MSSA", "MHSA", "TSSA"],
    "{inherits}": ["adapted_cbsa", "agent", "linear"],
    "{attention}": ["cbsa", "cbsa_agent", "linear"],
    "{tower}": ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIPVision", "SiglipVision"],
    "{multihead}": ["torchvision", "clip", "clip, sequence first", "detr"],
}
"""What stands for parameters of tests."""

ADAPTERS, WHOLE = "nn/test_adapters.py::", "models/test_adapters.py::"
TIMM, GRAPHS, EXPORT = "models/test_timm.py::", "nn/test_scripted.py::", "models/test_export.py::"
NO_GRAPH = [TIMM + "test_what_fx_and_torchscript_cannot_take_is_refused_by_name"]
TABLE = {
    "timm: `features_only`": (
        [TIMM + "test_features_by_getter_hook_and_fx[{smallest}]"],
        [TIMM + "test_features_of_vits_of_timm_with_our_layers[{layer}]"],
        [TIMM + "test_features_of_vits_of_timm_with_our_layers[{inherits}]"],
        [TIMM + "test_models_without_features_say_so"],
    ),
    "FX graphs": (
        [TIMM + "test_fx_forward_and_backward[{smallest}]"],
        [
            GRAPHS + "test_every_mixer_in_graphs_of_fx_and_traced[{mixer}]",
            TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{layer}]",
        ],
        [TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{inherits}]"],
        NO_GRAPH,
    ),
    "`torch.jit.trace`": (
        [TIMM + "test_traced_in_both_modes_and_channels_last[{smallest}]"],
        [GRAPHS + "test_every_mixer_in_graphs_of_fx_and_traced[{mixer}]"],
        [
            TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{inherits}]",
            EXPORT + "test_a_traced_model_refuses_other_sizes[adapted-size0]",
        ],
        [EXPORT + "test_a_traced_model_refuses_other_sizes[segmenter-size0]"],
    ),
    "`torch.jit.script`": (
        [TIMM + "test_torchscript_at_any_size[{smallest}]"],
        [GRAPHS + "test_every_mixer_has_its_values_and_gradients_in_torchscript_or_says_why_not[{mixer}]"],
        [TIMM + "test_layers_that_learn_their_grid_from_hooks_are_refused_by_torchscript"],
        NO_GRAPH,
    ),
    "timm: `AttentionExtract`": (
        [TIMM + "test_attention_extract_takes_layers_by_name[{smallest}]"],
        [TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{layer}]"],
        [TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{inherits}]"],
        [TIMM + "test_attention_extract_of_a_segmenter"],
    ),
    "timm: `reparameterize_model`": (
        [TIMM + "test_fused_models_keep_these_doors[{smallest}]"],
        [ADAPTERS + "test_fused[{mixer}]"],
        ["models/test_fused.py::test_a_fused_model_computes_the_same[adapted cbsa]"],
        ["models/test_fused.py::test_a_fused_model_computes_the_same[segmenter of a ViT]"],
    ),
    "timm: a training script": (
        ["test_experiments.py::test_parts_of_timm_train_save_and_resume_our_names[cbt_nano_patch4_32]"],
        ["models/test_timm_script.py::test_it_trains_with_the_others[AgentAttention]"],
        [TIMM + "test_averaged_saved_and_resumed_by_timm[adapted_vit]"],
        [TIMM + "test_averaged_saved_and_resumed_by_timm[segmenter]"],
    ),
    "`torch.export`": (
        [EXPORT + "test_program_of_any_size[{family}]"],
        [EXPORT + "test_layers_without_a_grid_take_a_dynamic_number_of_tokens[{layer}]"],
        [EXPORT + "test_any_size_of_every_model[{adapted}]"],
        [EXPORT + "test_any_size_of_every_model[{segmenter}]"],
    ),
    "ONNX": (
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[{family}]"],
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[layer]"],
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[{adapted}]"],
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[{segmenter}]"],
    ),
}
