"""The table "What works where" of docs/reference/packages.md: every cell is a test, which must exist and do what it says."""

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

PAGE = ROOT / "docs/reference/packages.md"
EXPANDED = {
    "{family}": [*FAMILIES],
    "{smallest}": [model_name(family, "pico" if "pico" in sizes_of(family) else "tiny") for family in FAMILIES],
    "{pico}": [model_name(family, "pico") for family in FAMILIES if "pico" in sizes_of(family)],
    "{mixer}": [*MIXERS],
    "{plain}": [name for name in MIXERS if name not in ORTHOGONAL],
    "{orthogonal}": ORTHOGONAL,
    "{adapted}": [name for name in MODELS if name.startswith("adapted")],
    "{segmenter}": [name for name in MODELS if name.startswith("segmenter")],
    "{layer}": [name for name in MODELS if name.startswith("layer")],
    "{built in}": ["CBSA", "AgentAttention", "LinearCBSA", "MSSA", "MHSA", "TSSA"],
    "{inherits}": ["adapted_cbsa", "agent", "linear"],
    "{attention}": ["cbsa", "cbsa_agent", "linear"],
    "{gridless}": ["LinearCBSA", "LinearAttention", "MSSA", "MHSA", "TSSA"],
    "{place}": ["cpu", "disk"],
    "{tower}": ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIPVision", "SiglipVision"],
    "{multihead}": ["torchvision", "clip", "clip, sequence first", "detr"],
}
"""What stands for parameters of tests."""

ADAPTERS, WHOLE = "nn/test_adapters.py::", "models/test_adapters.py::"
REGISTRATION, WRAPPER = "models/adapt/test_registration.py::", "models/test_timm_wrapper.py::"
TIMM, GRAPHS, EXPORT = "models/test_timm.py::", "nn/test_scripted.py::", "models/test_export.py::"
NO_GRAPH = [TIMM + "test_what_fx_and_torchscript_cannot_take_is_refused_by_name"]
TABLE = {
    "timm: `features_only`": (
        [TIMM + "test_features_by_getter_hook_and_fx[{smallest}]"],
        [TIMM + "test_features_of_vits_of_timm_with_our_layers[{built in}]"],
        [TIMM + "test_features_of_vits_of_timm_with_our_layers[{inherits}]"],
        [TIMM + "test_models_without_features_say_so"],
    ),
    "FX graphs": (
        [TIMM + "test_fx_forward_and_backward[{smallest}]"],
        [
            GRAPHS + "test_every_mixer_in_graphs_of_fx_and_traced[{mixer}]",
            TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{built in}]",
        ],
        [
            TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{inherits}]",
            "models/adapt/test_multihead.py::test_graphs_of_fx_and_traced[{inherits}]",
        ],
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
        [TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{built in}]"],
        [TIMM + "test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted[{inherits}]"],
        [TIMM + "test_attention_extract_of_a_segmenter"],
    ),
    "timm: `reparameterize_model`": (
        [TIMM + "test_fused_models_in_torchscript_and_fx[{smallest}]"],
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
        [EXPORT + "test_any_size_of_every_model[{family}]"],
        [
            EXPORT + "test_any_size_of_every_model[{layer}]",
            EXPORT + "test_layers_without_a_grid_take_a_dynamic_number_of_tokens[{gridless}]",
        ],
        [EXPORT + "test_any_size_of_every_model[{adapted}]"],
        [EXPORT + "test_any_size_of_every_model[{segmenter}]"],
    ),
    "ONNX": (
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[{family}]"],
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[{layer}]"],
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[{adapted}]"],
        [EXPORT + "test_any_size_of_every_model_in_two_runtimes[{segmenter}]"],
    ),
    "transformers: `TimmWrapper`, `Trainer`, pipelines": (
        [WRAPPER + "test_saved_and_loaded[{family}]", WRAPPER + "test_trained_saved_and_asked_by_a_pipeline"],
        None,
        [WRAPPER + "test_saved_and_loaded[adapted]"],
        [WRAPPER + "test_masks_are_no_classes"],
    ),
    "transformers: `attn_implementation`": (
        [REGISTRATION + "test_names_that_have_no_effect_or_would_be_wrong_are_refused"],
        [
            REGISTRATION
            + "test_attention_by_name_equals_an_adapted_model_with_steps_of_one[{tower}-{attention}]"
        ],
        [REGISTRATION + "test_compiled_and_exported[{attention}]"],
        None,
    ),
    "transformers: `save_pretrained`": (
        [WRAPPER + "test_saved_and_loaded[{family}]"],
        None,
        [REGISTRATION + "test_adapted_models_survive_save_and_from_pretrained[{tower}]"],
        None,
    ),
    "`nn.MultiheadAttention`": (
        None,
        None,
        [
            "models/adapt/test_multihead.py::test_queries_keys_and_values_are_those_of_the_original[False-True]",
            "models/adapt/test_multihead.py::test_forward_backward_grid_and_state[{multihead}-{inherits}]",
            "models/adapt/test_multihead.py::test_compiled_exported_and_offloaded[{inherits}]",
        ],
        None,
    ),
    "peft: LoRA": (
        [WHOLE + "test_adapters_act_merge_and_are_saved[{family}]"],
        [
            ADAPTERS + "test_adapters_act_merge_and_are_saved[{plain}-lora]",
            ADAPTERS + "test_adapters_act_merge_and_are_saved[{plain}-dora]",
            ADAPTERS + "test_an_adapter_on_orthonormal_bases_is_refused[{orthogonal}]",
        ],
        [
            WHOLE + "test_adapters_act_merge_and_are_saved[{adapted}]",
            "models/adapt/test_multihead.py::test_adapters_of_peft_act_and_merge[{inherits}]",
        ],
        [WHOLE + "test_adapters_act_merge_and_are_saved[{segmenter}]"],
    ),
    "torchao: int8": (
        [WHOLE + "test_int8_of_torchao[{family}]"],
        [
            ADAPTERS + "test_int8_of_torchao[{plain}-Int8WeightOnlyConfig]",
            ADAPTERS + "test_int8_of_torchao[{plain}-Int8DynamicActivationInt8WeightConfig]",
            ADAPTERS + "test_int8_of_orthonormal_bases_is_refused_until_they_are_fused[{orthogonal}]",
        ],
        [WHOLE + "test_int8_of_torchao[{adapted}]"],
        [WHOLE + "test_int8_of_torchao[{segmenter}]"],
    ),
    "`quantize_dynamic`": (
        [WHOLE + "test_dynamic_quantisation_of_torch[{family}]"],
        [ADAPTERS + "test_dynamic_quantisation_of_torch[{mixer}]"],
        [WHOLE + "test_dynamic_quantisation_of_torch[{adapted}]"],
        [WHOLE + "test_dynamic_quantisation_of_torch[{segmenter}]"],
    ),
    "Accelerate: offloading to CPU and disk": (
        [WHOLE + "test_offloaded_weights[{family}-{place}]"],
        [ADAPTERS + "test_offloaded_weights[{mixer}-{place}]"],
        [WHOLE + "test_offloaded_weights[{adapted}-{place}]"],
        [WHOLE + "test_offloaded_weights[{segmenter}-{place}]"],
    ),
    "Opacus": (
        [
            WHOLE + "test_gradients_per_sample_by_opacus[{family}]",
            WHOLE + "test_what_opacus_does_not_take[cbt]",
        ],
        [
            ADAPTERS + "test_gradients_per_sample_by_opacus[cbsa]",
            ADAPTERS + "test_opacus_on_tied_projections_is_refused_where_it_sees_half_the_gradient[mssa tied]",
        ],
        [
            WHOLE + "test_gradients_per_sample_by_opacus[adapted]",
            WHOLE + "test_gradients_per_sample_by_opacus[adapted agent]",
            WHOLE + "test_gradients_per_sample_by_opacus[adapted linear]",
            WHOLE + "test_what_opacus_does_not_take[adapted eva]",
        ],
        [WHOLE + "test_what_opacus_does_not_take[segmenter]"],
    ),
    "`torch.func`: gradients per sample": (
        [WHOLE + "test_gradients_per_sample_by_torch_func[{family}]"],
        [
            ADAPTERS + "test_gradients_per_sample_by_torch_func[{mixer}]",
            ADAPTERS + "test_a_convolutional_stem_has_no_gradients_per_sample_in_training",
        ],
        [WHOLE + "test_gradients_per_sample_by_torch_func[{adapted}]"],
        [WHOLE + "test_gradients_per_sample_by_torch_func[{segmenter}]"],
    ),
    "`torch.compile`": (
        [
            "models/test_models.py::test_compiles_in_one_graph_and_exports[{pico}]",
            WHOLE + "test_compiled_in_one_graph[crate_original]",
        ],
        ["nn/test_mixer.py::test_compiles_in_one_graph[{mixer}-False-aot_eager]"],
        [
            WHOLE + "test_compiled_in_one_graph[adapted]",
            WHOLE + "test_compiled_in_one_graph[adapted agent]",
            WHOLE + "test_compiled_in_one_graph[adapted linear]",
        ],
        ["models/segmentation/test_model.py::test_compiles_in_one_graph_and_exports"],
    ),
    "torchvision's RetinaNet and FCN, MONAI's U-Net": (
        None,
        [
            "nn/test_map_block.py::test_norm_attention_and_residual_at_any_size[grid1]",
            "test_dense_examples.py::test_a_detector_with_cbsa_in_its_neck",
            "test_dense_examples.py::test_a_segmenter_with_cbsa_in_its_head",
            "test_dense_examples.py::test_a_unet_of_volumes_with_cbsa_in_its_bottleneck",
        ],
        None,
        None,
    ),
}
"""Tools, and the tests of models of images, single layers, adapted ViTs and segmenters; None where there is none."""
COMPARES = r"assert_close|assert_same|torch\.equal|assert_exported|_error\(|== whole"


class Collected:
    """What pytest finds in files, by id."""

    def __init__(self):
        self.items = {}

    @pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
    def pytest_collection_modifyitems(self, items):
        self.items = {item.nodeid.removeprefix("tests/"): item for item in items}


@pytest.fixture(scope="module")
def collected():
    found = Collected()
    files = sorted({str(ROOT / "tests" / name.partition("::")[0]) for name in every_test()})
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *files], plugins=[found])
    return found.items


def expanded(name):
    """The ids that a name stands for."""
    held = re.findall(r"\{[\w ]+\}", name)
    for values in itertools.product(*(EXPANDED[key] for key in held)):
        text = name
        for key, value in zip(held, values, strict=True):
            text = text.replace(key, value)
        yield text


def every_test():
    for cells in TABLE.values():
        for names in cells:
            for name in names or ():
                yield from expanded(name)


def read_table():
    """Tool to the texts of its cells."""
    section = PAGE.read_text(encoding="utf-8").partition("## What works where")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_page_has_these_rows_and_cells():
    table = read_table()
    assert list(table) == list(TABLE)
    for tool, texts in table.items():
        assert [text == "\N{EN DASH}" for text in texts] == [names is None for names in TABLE[tool]], tool


def test_every_test_exists(collected):
    assert {name for name in every_test() if name not in collected} == set()


def test_tests_compare_values_or_expect_an_error_as_the_cell_says(collected):
    for tool, texts in read_table().items():
        for text, names in zip(texts, TABLE[tool], strict=True):
            code = "".join(inspect.getsource(collected[next(expanded(name))].function) for name in names or ())
            assert not text.startswith(("equal", "within")) or re.search(COMPARES, code), (tool, text)
            assert "refused" not in text or "pytest.raises" in code, (tool, text)
