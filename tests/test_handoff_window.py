"""handoff/window.py: one rule for every name of a model's window."""

import pytest
from transformers import CONFIG_MAPPING

from handoff.window import model_window, window


@pytest.mark.parametrize(
    ("architecture", "keys", "tokens"),
    [
        ("gpt2", {"n_positions": 128}, 128),
        ("gptj", {"n_positions": 96}, 96),
        ("gpt_neox", {"max_position_embeddings": 96}, 96),
        ("opt", {"max_position_embeddings": 96}, 96),
        ("mpt", {"max_seq_len": 96}, 96),
        ("dbrx", {"max_seq_len": 96}, 96),
        ("llama", {"max_position_embeddings": 96}, 96),
        ("mamba2", {}, None),
    ],
)
def test_every_architectures_own_name_is_read(architecture, keys, tokens):
    found = window(CONFIG_MAPPING[architecture](**keys).to_dict())
    assert (None if found is None else found.tokens) == tokens
    if found is not None:
        assert found.key in keys


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "dynamic", "factor": 2.0}, 200),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 25}, 100),
        ({"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 10}, 100),
        (
            {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}},
            800,
        ),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_reach_as_far_as_their_scaling(key, scaling, tokens):
    found = window({"max_position_embeddings": 100, key: scaling})
    assert found is not None and found.tokens == tokens


def test_the_text_part_of_a_model_of_images_counts():
    found = window({"max_position_embeddings": 7, "text_config": {"max_position_embeddings": 32}})
    assert found is not None and (found.tokens, found.key) == (32, "max_position_embeddings")


def test_a_configuration_with_infinity_has_a_window(tmp_path):
    """transformers writes `Infinity` for Mamba 2 and its hybrids, although it is not JSON."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64, "time_step_limit": [0.0, Infinity]}')
    found = model_window(tmp_path)
    assert found is not None and found.tokens == 64
