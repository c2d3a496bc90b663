import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from warpmap.models.configs import MODELS, config
from warpmap.models.foundations.parameter_count import count

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"

# what a checkpoint holds, as the Hugging Face Hub counts it
EXACT = {
    "Llama 2 7B": 6_738_415_616,
    "Llama 2 13B": 13_015_864_320,
    "Llama 2 70B": 68_976_648_192,
    "Llama 3 8B": 8_030_261_248,
    "Llama 3 70B": 70_553_706_496,
    "Llama 3.1 405B": 405_853_388_800,
    "Mistral 7B v0.1": 7_241_732_096,
    "Mixtral 8x7B": 46_702_792_704,
    "Mixtral 8x22B": 140_620_634_112,
    "Qwen3 8B": 8_190_735_360,
    "Qwen3 32B": 32_762_123_264,
    "Qwen3 30B-A3B": 30_532_122_624,
    "Qwen3 235B-A22B": 235_093_634_560,
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V3": 671_026_419_200,  # without the extra predictor
    "gpt-oss 20B": 20_914_757_184,
    "gpt-oss 120B": 116_829_156_672,
}
# what model cards say, rounded there: total, without embedding and head
QWEN_CARDS = {
    "Qwen3 0.6B": (0.6, 0.44),
    "Qwen3 8B": (8.2, 6.95),
    "Qwen3 32B": (32.8, 31.2),
    "Qwen3 30B-A3B": (30.5, 29.9),
    "Qwen3 235B-A22B": (235, 234),
}
each_model = pytest.mark.parametrize("name", MODELS)


def digits(number):
    """Decimal places of a number as written."""
    return len(str(number).partition(".")[2])


@pytest.mark.parametrize("name", EXACT)
def test_total_is_the_published_one(name):
    assert count(config(name)).total == EXACT[name]
    assert config(name).published_total == EXACT[name]


@pytest.mark.parametrize("name", QWEN_CARDS)
def test_totals_round_to_the_model_card(name):
    n = count(config(name))
    for got, card in zip(
        (n.total, n.non_embedding), QWEN_CARDS[name], strict=True
    ):
        assert round(got / 1e9, digits(card)) == card


@each_model
def test_any_changed_size_changes_the_total(name):
    """So an exact total vouches for every size that it is made of."""
    model = config(name)
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        free = {"max_context", "window", "windowed_layers", "mtp_layers"}
        free |= {"experts_per_token", "published_total", "published_active"}
        if model.kv_lora_rank:
            free |= {"kv_heads"}
        if field.name in free or not isinstance(value, int) or not value:
            continue
        if isinstance(value, bool):
            changed = False
        elif field.name in ("heads", "kv_heads"):
            changed = 2 * value if field.name == "heads" else value // 2
        else:
            changed = value + 1
        wrong = dataclasses.replace(model, **{field.name: changed})
        assert count(wrong).total != count(model).total, field.name


@each_model
def test_heads_divide(name):
    model = config(name)
    assert model.heads % model.kv_heads == 0
    if model.kv_lora_rank:
        assert model.head_dim == 0
        assert model.qk_nope_head_dim
        assert model.qk_rope_head_dim
        assert model.v_head_dim
    else:
        assert model.head_dim in (64, 128)


@each_model
def test_parts_are_given_whole(name):
    model = config(name)
    assert bool(model.experts) == bool(model.experts_per_token)
    assert bool(model.experts) == bool(model.moe_intermediate_size)
    assert bool(model.experts) == bool(model.published_active)
    has_dense = bool(model.dense_layers) or not model.experts
    assert has_dense == bool(model.intermediate_size)
    assert bool(model.window) == bool(model.windowed_layers)
    assert model.windowed_layers <= model.layers
    assert model.window < model.max_context


@each_model
def test_name_and_sources_are_there(name):
    model = config(name)
    assert model.name == name
    assert len(set(model.source)) == 2
    config_url, paper_url = model.source
    assert config_url.startswith("https://huggingface.co/")
    assert config_url.endswith("/config.json")
    assert paper_url.startswith("https://")


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"got 'llama 3 9b': 'Llama 3 8B'"):
        config("llama 3 9b")
    with pytest.raises(ValueError, match="see MODELS"):
        config("#")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config("Llama 3 8B").layers = 33


def test_reads_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.models.configs import config\n"
        "print(config('Qwen3 0.6B').tied_embeddings)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SRC,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "True"
